# SPDX-License-Identifier: Apache-2.0
"""What a release has: sources, the wheel built of those, and that installed, with a C++ compiler and without."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import wedlm
from tests.engine.tiny_llm import save_tiny
from wedlm.model import load_model, save_model

ROOT = Path(__file__).parents[1]
# What the installed package says of itself, on a checkpoint of 16 bits; its own folder is not on the path.
_PROGRAM = """
import sys, wedlm, wedlm.native
from wedlm import LLM, SamplingParams
assert sys.argv[2] in wedlm.__file__, wedlm.__file__
llm = LLM(sys.argv[1], device="cpu")
assert llm.generate("abc", SamplingParams(max_tokens=4))[0].stats.num_tokens == 4
print(wedlm.native.is_available(), wedlm.native.describe(), llm.describe(), sep="\\n")
"""


def install(folder: Path, environment: dict[str, str]) -> Path:
    """What `python -m build` makes of the repository goes to ``folder / "dist"``: the archive of sources, and the wheel
    made of that, which is installed into a new environment that sees this one's packages."""
    copy, dist, target = folder / "source", folder / "dist", folder / "environment"
    ignored = shutil.ignore_patterns("*.so", "*.egg-info", ".*", "build", "dist")  # __pycache__ is ours to leave out
    shutil.copytree(ROOT, copy, ignore=ignored, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(copy)]
    subprocess.run(build, env=environment, capture_output=True, text=True, check=True, timeout=900)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(target)], check=True, timeout=120)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = target / "lib" / version / "site-packages"
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = dist.glob("wedlm-*.whl")
    place = [*pip, "install", "--no-deps", "--quiet", "--target", str(packages), str(wheel)]
    subprocess.run(place, capture_output=True, check=True, timeout=300)
    return target


def check_contents(dist: Path) -> None:
    """All that the package needs, licences included, and nothing else."""
    (archive,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    assert archive.name == f"wedlm-{wedlm.__version__}.tar.gz"
    with tarfile.open(archive) as opened:
        sources = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    with zipfile.ZipFile(wheel) as opened_wheel:
        installed = {name for name in opened_wheel.namelist() if not name.endswith("/")}
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "src"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = set(tracked.stdout.split())
    own = {"LICENSE", "README.md", "CHANGELOG.md", "MANIFEST.in", "pyproject.toml", "setup.py"}
    made = {name for name in sources if name.startswith("src/wedlm.egg-info")} | {"PKG-INFO", "setup.cfg"}
    folders = {str(parent) for name in sources for parent in Path(name).parents}
    assert sources - made - folders == files | own
    packaged = {name.removeprefix("src/") for name in files if "/csrc/" not in name}
    extra = installed - packaged
    assert packaged <= installed
    assert all(name.startswith((f"wedlm-{wedlm.__version__}.dist-info/", "wedlm/native/_library.")) for name in extra)
    licences = {Path(name).name for name in extra if "/licenses/" in name}
    assert licences == {"LICENSE", "LICENSE.dompurify", "LICENSE.markdown-it"}


@pytest.mark.long
@pytest.mark.parametrize("has_compiler", [True, False])
def test_a_wheel(tmp_path, has_compiler):
    """Without a compiler all works on torch, and one line says what is missing and what it costs."""
    if has_compiler and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("no C++ compiler")
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", "PYTHONPATH")}
    environment["WEDLM_REQUIRE_NATIVE"] = "1"
    if not has_compiler:
        (tmp_path / "empty").mkdir()
        environment |= {"PATH": str(tmp_path / "empty"), "WEDLM_REQUIRE_NATIVE": "0"}
    target = install(tmp_path, environment)
    check_contents(tmp_path / "dist")
    model = save_tiny(tmp_path / "model")
    save_model(*load_model(model, torch.bfloat16), model)
    run = [str(target / "bin" / "python"), "-c", _PROGRAM, str(model), str(target)]
    said = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=300)
    available, native, engine = said.stdout.splitlines()
    assert available == str(has_compiler)
    if has_compiler:
        assert native.startswith("The native forward runs on ")
        assert "native C++ forward" in engine
        assert "weights: int8;" in engine
    else:
        assert native.startswith("the native CPU forward was not built: no C++ compiler (g++ or clang++) was found")
        assert "because the native library was not built: no C++ compiler" in engine
