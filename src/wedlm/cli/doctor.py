# SPDX-License-Identifier: Apache-2.0
"""``wedlm doctor``: what this machine has, and what wedlm chooses accordingly."""

import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from wedlm import __version__
from wedlm.cli.options import command
from wedlm.cli.terminal import write
from wedlm.extras import install_extras
from wedlm.machine import cpu_name, memory_bytes, usable_cores

_GIB = 2**30


@command
def doctor() -> None:
    """Say what this machine has, and what wedlm chooses for it.

    \b
    Example:
    wedlm doctor

    It prints one line for each fact, and fetches or changes nothing. Please include the lines when you report a bug.
    """
    for line in report():
        write(line + "\n")


def report() -> Iterator[str]:
    """The lines. If a fact cannot be found out, its line says why."""
    for name, fact in FACTS.items():
        try:
            text = fact()
        except Exception as error:  # whatever is broken here, the other lines are what its user needs
            text = f"cannot be told: {type(error).__name__}: {error}"
        yield f"{name:<14}{' '.join(text.split())}"
    yield from _extras()


def _wedlm() -> str:
    return f"{__version__}, decoding auto unless a request names a mode"


def _python() -> str:
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"


def _torch() -> str:
    import torch

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
    return f"{torch.__version__}, {build}, {torch.get_num_threads()} CPU threads (--threads changes them)"


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return "no device that torch can use" if torch.version.cuda else "none: this torch is built for CPUs"
    found = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return ", ".join(f"{one.name} ({one.total_memory / _GIB:.0f} GiB, {one.major}.{one.minor})" for one in found)


def _triton() -> str:
    found = _installed("triton")
    return f"{found}, for steps as CUDA graphs" if found else "not installed: on CUDA, steps are plain torch operations"


def _cpu() -> str:
    import torch

    features = torch.backends.cpu.get_cpu_capability()
    bfloat16 = "with" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "without"
    return f"{cpu_name()}, {usable_cores()} of {os.cpu_count()} cores, {features}, {bfloat16} bfloat16 instructions"


def _native() -> str:
    """The instruction set of the native forward and why, or what is missing and what that costs."""
    from wedlm.native import describe

    return describe()


def _memory() -> str:
    total = memory_bytes()
    return f"{total / _GIB:.1f} GiB, of which keys and values take at most a quarter on a CPU (--kv-cache-bytes)"


def _choice() -> str:
    """What ``LLM()`` would run on."""
    from wedlm.engine.factory import native_obstacle
    from wedlm.engine.resolve_options import read_device, read_dtype

    device = read_device("auto")
    dtype = str(read_dtype("auto", device) or "the checkpoint's type").removeprefix("torch.")
    reason = {"cuda": "torch can use CUDA"}.get(device.type, "torch can use no CUDA device")
    graphs = device.type == "cuda" and _installed("triton") is not None
    steps = "CUDA graphs, where heads allow it" if graphs else "plain torch operations"
    if device.type == "cpu" and native_obstacle() is None:
        steps = (
            "the native forward, where weights are of 16 bits (they become int8) or of a file's fewer, else " + steps
        )
    return f"{device.type}, because {reason}; weights in {dtype}; steps as {steps}"


def _cache() -> str:
    from wedlm.model.demo import default_cache_dir

    directory = default_cache_dir()
    existing = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    writable = "writable" if os.access(existing, os.W_OK) else "NOT WRITABLE"
    why = "$WEDLM_CACHE" if os.environ.get("WEDLM_CACHE") else "WEDLM_CACHE changes it"
    return f"{directory} ({why}), {writable}, {shutil.disk_usage(existing).free / 1e9:.1f} GB free"


def _demo() -> str:
    from wedlm.model.demo import DEMO_FILE, default_cache_dir

    given = os.environ.get("WEDLM_DEMO_GGUF")
    path = os.path.expanduser(given) if given else str(default_cache_dir() / DEMO_FILE)
    if os.path.isfile(path):
        return f"present, {os.path.getsize(path) / 1e6:.0f} MB at {path}"
    return f"WEDLM_DEMO_GGUF names {given}, where there is no file" if given else "absent, fetched at first use (93 MB)"


def _extras() -> Iterator[str]:
    """A line for each optional part of the package: complete, or what it lacks."""
    try:
        stated = requires("wedlm") or []
    except PackageNotFoundError:
        yield f"{'extras':<14}cannot be told: wedlm is not installed, it runs from its folder"
        return
    extras: dict[str, list[str]] = {}
    for one in stated:
        condition = re.search(r"""extra == ["']([\w-]+)["']""", one)
        if condition and condition[1] not in ("dev", "docs"):
            extras.setdefault(condition[1], []).append(re.split(r"[^\w.-]", one, maxsplit=1)[0])
    for extra, packages in extras.items():
        missing = [name for name in packages if _installed(name) is None]
        text = f"without {', '.join(missing)}: {install_extras(extra)}" if missing else "installed"
        yield f"{'[' + extra + ']':<14}{text}"


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


FACTS: dict[str, Callable[[], str]] = {
    "wedlm": _wedlm,
    "Python": _python,
    "torch": _torch,
    "CUDA": _cuda,
    "Triton": _triton,
    "CPU": _cpu,
    "native": _native,
    "memory": _memory,
    "LLM() runs on": _choice,
    "cache": _cache,
    "demo model": _demo,
}
