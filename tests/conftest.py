# SPDX-License-Identifier: Apache-2.0
"""Set-up of all tests: shapes in signatures are checked in the layers that state them, except in long runs."""

import functools
import os
import platform
import signal
import sys
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Without a GPU our kernels run in Triton's interpreter, which must be chosen before they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# How long one example takes says something about the machine's load, nothing about the code.
settings.register_profile("wedlm", deadline=None)
settings.load_profile("wedlm")

# params.py states no shapes, and beartype's random draws would disturb hypothesis, which builds those.
_CHECKED = [
    "algorithm.dual_stream",
    "algorithm.noise",
    "algorithm.objective",
    "algorithm.reorder",
    "algorithm.sample",
    "algorithm.select",
    "algorithm.verify",
    "algorithm.window",
    "attention",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report-long", type=Path, help="write what the tests recorded to this Markdown file")
    parser.addoption("--report-append", action="store_true", help="and keep what it says of tests that do not run now")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # one test process per core
    # A shell's background job (`nohup make test &`) starts with Ctrl-C ignored, and its children inherit that: tests
    # that send one would wait for ever.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.option.markexpr != "long":  # the checks cost five times the work of a stub model's step
        install_import_hook([f"wedlm.{name}" for name in _CHECKED], "beartype.beartype")
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
        _patch_triton_once_a_kernel()
    if config.option.report_long is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_LongReport(config.option.report_long, config.option.report_append))


def _patch_triton_once_a_kernel() -> None:
    """Triton's interpreter patches its language at each call of a device function, which takes longer than the call."""
    from triton import language
    from triton.runtime import interpreter

    # It also makes a table of all number formats whenever it looks one up.
    look_up = interpreter._get_np_dtype
    known = functools.cache(look_up)
    interpreter._get_np_dtype = lambda kind: look_up(kind) if kind.scalar.is_ptr() else known(kind.scalar)
    patch_lang = interpreter._patch_lang
    anywhere = SimpleNamespace(__globals__={"tl": language, "core": language.core})  # the names that kernels call it by
    running = False

    def patch_once(_: object) -> interpreter._LangPatchScope:
        nonlocal running
        if running:  # within a kernel, whose own scope is restored at its end
            return interpreter._LangPatchScope()
        running, scope = True, patch_lang(anywhere)
        restore = scope.restore

        def end() -> None:
            nonlocal running
            running = False
            restore()

        scope.restore = end
        return scope

    interpreter._patch_lang = patch_once


class _LongReport:
    """The committed report of `make test-long`: outcome, time and recorded figures of each test."""

    def __init__(self, path: Path, append: bool) -> None:
        self.path = path
        old = path.read_text().splitlines() if append and path.exists() else []
        self.rows = {line.split(" | ")[0]: line for line in old if line.startswith("| tests/")}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            figures = "; ".join(f"{name} {value}" for name, value in report.user_properties)
            row = f"| {report.nodeid} | {report.outcome} | {report.duration:.0f} | {figures} |"
            self.rows[f"| {report.nodeid}"] = row

    def pytest_sessionfinish(self) -> None:
        versions = f"Python {platform.python_version()}, torch {torch.__version__}, {sys.platform}"
        head = f"# Report of `make test-long`\n\n{date.today().isoformat()}, {versions}.\n\n"
        table = "| test | outcome | s | figures |\n| --- | --- | --- | --- |\n"
        self.path.write_text(head + table + "\n".join(sorted(self.rows.values())) + "\n")


@pytest.fixture
def fp8_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 models on a CPU, where the products' slow twin runs and users are told that there is none."""
    monkeypatch.setattr("wedlm.model.inference.quantization.check_fp8_device", lambda _: None)
