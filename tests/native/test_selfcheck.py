# SPDX-License-Identifier: Apache-2.0
"""Random shapes in every weight format, through every instruction set: equal bits, on Arm and with sanitizers, too."""

import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from wedlm.native.library import paths

ROOT = Path(__file__).parents[2]
SOURCES = [*sorted((ROOT / "src/wedlm/native/csrc").glob("*.cpp")), Path(__file__).with_name("selfcheck.cpp")]
STRICT = ["-Wall", "-Wextra", "-Werror"]


def setup_flags(machine: str) -> tuple[list[str], dict[str, list[str]]]:
    """(flags of all units, flags of some) that the installation compiles with."""
    scope: dict[str, object] = {"__name__": "setup_flags"}
    source = (ROOT / "setup.py").read_text(encoding="utf-8")
    exec(source[: source.index("class BuildNative")], scope)
    return scope["FLAGS"], scope["UNIT_FLAGS"].get(machine, {})  # type: ignore[return-value, attr-defined]


def build(directory: Path, compiler: str, machine: str, extra: list[str]) -> Path:
    flags, unit_flags = setup_flags(machine)

    def compile_one(source: Path) -> Path:
        out = directory / f"{source.stem}.o"
        own = unit_flags.get(source.name, [])
        if "-DWEDLM_EVEX_VNNI" in extra and source.name == "kernels_avxvnni.cpp":
            # With AVX-VNNI allowed as well, the compiler takes its shorter encoding, which is what is not here.
            own = [*(flag for flag in own if flag != "-mavxvnni"), "-mavx512vl", "-mavx512vnni"]
        command = [compiler, *flags, *STRICT, *own, *extra, f"-I{SOURCES[0].parent}", "-c", str(source), "-o", str(out)]
        subprocess.run(command, check=True)
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    program = directory / "selfcheck"
    subprocess.run([compiler, "-pthread", *extra, *map(str, objects), "-o", str(program)], check=True)
    return program


def hashes(command: list[str], first: int, count: int) -> tuple[list[str], str]:
    """(a line for each seed, the paths that ran)."""
    result = subprocess.run([*command, str(first), str(count)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == count
    return lines, result.stderr.strip()


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++")
def test_500_shapes_here_and_on_arm(tmp_path, record_property):
    (tmp_path / "here").mkdir()
    ours, ran = hashes([str(build(tmp_path / "here", "g++", platform.machine(), []))], 0, 500)
    record_property("here", ran)
    cross = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if None in cross or platform.machine() == "aarch64":
        pytest.skip("the shapes are equal here; there is no aarch64-linux-gnu-g++ or no qemu-aarch64")
    (tmp_path / "arm").mkdir()
    program = build(tmp_path / "arm", "aarch64-linux-gnu-g++", "aarch64", ["-static"])
    theirs, ran = hashes([str(cross[1]), str(program)], 0, 500)
    record_property("arm", ran)
    assert "neon" in ran
    assert theirs == ours


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++")
def test_avx_vnni_by_avx512(tmp_path, record_property):
    """The AVX-VNNI unit on a processor without AVX-VNNI: AVX-512's encoding of its dot product is all that differs."""
    if "avx512-vnni" not in [path.name for path in paths() if path.runs]:
        pytest.skip("the processor has no AVX-512 VNNI")
    _, ran = hashes([str(build(tmp_path, "g++", platform.machine(), ["-DWEDLM_EVEX_VNNI"]))], 0, 100)
    record_property("paths", ran)
    assert "avx-vnni" in ran


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++") or sys.platform != "linux", reason="there is no g++ with its sanitizers")
@pytest.mark.parametrize("kind", ["address,undefined", "thread"])
def test_sanitizers(tmp_path, kind):
    extra = [f"-fsanitize={kind}", "-fno-sanitize-recover=all", "-O1", "-g", "-Wno-error=maybe-uninitialized"]
    hashes([str(build(tmp_path, "g++", platform.machine(), extra))], 0, 40)
