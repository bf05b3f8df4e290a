# SPDX-License-Identifier: Apache-2.0
"""The layers: algorithm ← model, attention ← engine ← everything that users meet. And what every file has."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "wedlm").rglob("*.py"))
FILES = [
    *SOURCES,
    *(path for name in ("tests", "benchmarks", "examples") for path in sorted((ROOT / name).rglob("*.py"))),
]
# What a part may import of wedlm, besides itself.
MAY_IMPORT = {
    "algorithm": set(),
    "kernels": {"algorithm"},
    "model": {"algorithm", "kernels", "attention"},
    "attention": {"algorithm", "kernels"},
    "engine": {"algorithm", "kernels", "attention", "model"},
    "train": {"algorithm", "attention", "model"},
    "hf": {"algorithm", "attention", "model", "engine"},
    "bench": {"algorithm", "kernels", "attention", "model", "engine", "evaluate"},
}
ENGINE_AND_BELOW = {"algorithm", "kernels", "model", "attention", "engine"}
# The paper on its own: what algorithm/ needs besides the standard library.
ALGORITHM_NEEDS = {"torch", "jaxtyping"}


def imported(path: Path) -> Iterator[str]:
    """Full names of all modules that a file imports, wherever in it, the type-checking-only ones included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.relative_to(ROOT / "src").parts[: -node.level]
                base = ".".join([*package, *([base] if base else [])])
            # `from wedlm import engine` imports wedlm.engine.
            yield from (f"{base}.{alias.name}" for alias in node.names) if base == "wedlm" else (base,)


def parts(path: Path) -> set[str]:
    """The parts of wedlm that a file imports."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("wedlm.")}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "src" / "wedlm").parts[0].removesuffix(".py")


def test_imports_are_found(tmp_path, monkeypatch):
    """A test of layers that sees no import passes always."""
    package = tmp_path / "src" / "wedlm" / "algorithm"
    package.mkdir(parents=True)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = package / "bad.py"
    for line in (
        "import wedlm.engine.llm",
        "from wedlm.engine import llm",
        "from wedlm import engine as e",
        "from .. import engine",
        "from ..engine.llm import LLM",
        "def f():\n    import wedlm.engine",
        "if TYPE_CHECKING:\n    from wedlm.engine.llm import LLM",
    ):
        path.write_text(line)
        assert parts(path) == {"engine"}, line
    path.write_text("from . import select\nfrom .select import x\nimport torch, wedlmx.engine")
    assert parts(path) == {"algorithm"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_layers(path):
    part = part_of(path)
    if part in MAY_IMPORT:
        allowed = MAY_IMPORT[part] | {part}
        assert parts(path) <= allowed, f"wedlm.{part} may import {sorted(allowed)}"


def test_every_lower_part_has_a_rule():
    present = {part_of(path) for path in SOURCES}
    assert present >= ENGINE_AND_BELOW
    assert set(MAY_IMPORT) >= ENGINE_AND_BELOW


def test_the_algorithm_needs_torch_alone():
    import sys

    for path in (ROOT / "src" / "wedlm" / "algorithm").glob("*.py"):
        for name in imported(path):
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names or top in ALGORITHM_NEEDS or name.startswith("wedlm.algorithm"), path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_licence_line(path):
    text = path.read_text(encoding="utf-8")

    if text:  # an empty __init__.py says nothing that could be licensed
        assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")


def test_no_path_of_a_machine():
    for path in FILES:
        if path != Path(__file__):
            for word in ("/work/", "/home/", "/root/"):
                assert word not in path.read_text(encoding="utf-8"), f"{word} in {path.relative_to(ROOT)}"
