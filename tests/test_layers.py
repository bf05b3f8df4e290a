# SPDX-License-Identifier: Apache-2.0
"""The layers: algorithm ← model, attention ← native ← engine ← everything that users meet. And what every file has."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "wedlm").rglob("*.py"))
# What a part may import of wedlm, besides itself. Above the engine no part imports another; what two of them need lies
# below both, and the command line puts them together, as accelerate puts training and measurement together, and deploy
# copies of the server.
_ENGINE_AND_BELOW = {"algorithm", "kernels", "native", "attention", "model", "engine"}
MAY_IMPORT = {
    "algorithm": set(),
    "kernels": {"algorithm"},
    "model": {"algorithm", "kernels", "attention"},
    "attention": {"algorithm", "kernels"},
    "native": {"algorithm", "attention", "model"},
    "engine": _ENGINE_AND_BELOW,
    "extras": set(),
    "plotting": {"extras"},
    "tables": set(),
    "machine": set(),
    "cluster": set(),
    "train": _ENGINE_AND_BELOW | {"extras", "plotting"},
    "hf": _ENGINE_AND_BELOW,
    "server": _ENGINE_AND_BELOW,
    "evaluate": _ENGINE_AND_BELOW | {"plotting", "machine", "extras", "cluster"},
    "deploy": _ENGINE_AND_BELOW | {"server", "cluster"},
    "bench": _ENGINE_AND_BELOW | {"plotting", "machine", "extras", "tables"},
    "accelerate": _ENGINE_AND_BELOW | {"train", "plotting", "machine"},
    "cli": _ENGINE_AND_BELOW
    | {"plotting", "machine", "extras", "tables", "cluster"}
    | {"train", "accelerate", "hf", "server", "evaluate", "bench", "deploy"},
    "__init__": {"engine"},
}
# Folders of programs beside the package: what they may import of it, and of each other nothing.
PROGRAMS = {
    "recipes": _ENGINE_AND_BELOW | {"train"},
    "benchmarks": set(MAY_IMPORT) - {"cli", "__init__"},
    "examples": set(MAY_IMPORT) - {"cli", "__init__"},
    "integrations": set(MAY_IMPORT) - {"cli", "__init__"},
    "docs": set(MAY_IMPORT) - {"cli", "__init__"},
}
FILES = [
    *SOURCES,
    *(path for name in ("tests", *PROGRAMS) for path in sorted((ROOT / name).rglob("*.py"))),
]
# The paper on its own: what algorithm/ needs besides the standard library.
ALGORITHM_NEEDS = {"torch", "jaxtyping"}


def imported(path: Path, anywhere: bool = True) -> Iterator[str]:
    """Full names of all modules that a file imports, wherever in it, the type-checking-only ones included; or only
    those that it imports whenever it is imported."""
    module = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(module) if anywhere else module.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = path.relative_to(ROOT / "src").parts[: -node.level]
                base = ".".join([*package, *([base] if base else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)  # perhaps a module: from wedlm import engine


def parts(path: Path) -> set[str]:
    """The parts of wedlm that a file imports; a name of the package itself, such as LLM, is the engine's, but for the
    version, which belongs to all."""
    found = {name.split(".")[1] for name in imported(path) if name.startswith("wedlm.")} - {"__version__"}
    return {part if part in MAY_IMPORT else "engine" for part in found}


def part_of(path: Path) -> str:
    """An entry point (``python -m``) is the command line's, wherever it lies."""
    return "cli" if path.stem == "__main__" else path.relative_to(ROOT / "src" / "wedlm").parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")


def cycles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of two or more modules of which each reaches each other one."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            new = arrows.get(ahead.pop(), set()) - seen
            seen |= new
            ahead += new
        return seen

    reach = {module: reached(module) for module in arrows}
    groups = {tuple(sorted(o for o in reach[m] if m in reach.get(o, ()))) for m in arrows if m in reach[m]}
    return [list(group) for group in sorted(groups)]


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


def test_cycles_are_found():
    """A test of cycles that sees none passes always."""
    assert cycles({"a": {"b"}, "b": {"c", "x"}, "c": {"a"}, "d": {"a"}, "e": {"f"}, "f": {"e"}}) == [
        ["a", "b", "c"],
        ["e", "f"],
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_layers(path):
    part = part_of(path)
    allowed = MAY_IMPORT[part] | {part}
    assert parts(path) <= allowed, f"wedlm.{part} may import {sorted(allowed)}"


def test_one_rank_imports_nothing_of_several():
    """What runs on several ranks is imported where several were asked for."""
    mentioning = [path for path in SOURCES if "engine.ranks" in path.read_text(encoding="utf-8")]
    found = {path for path in mentioning if any("engine.ranks" in name for name in imported(path, anywhere=False))}
    outside = {path.relative_to(ROOT).as_posix() for path in found if path.parent.name != "ranks"}
    assert outside == {"src/wedlm/cli/replica.py"}  # one of several processes


PROGRAM_FILES = [(name, path) for name in PROGRAMS for path in sorted((ROOT / name).rglob("*.py"))]


@pytest.mark.parametrize(("folder", "path"), PROGRAM_FILES, ids=lambda x: str(getattr(x, "name", x)))
def test_layers_of_programs(folder, path):
    assert parts(path) <= PROGRAMS[folder], f"{folder} may import {sorted(PROGRAMS[folder])}"
    assert not {name.split(".")[0] for name in imported(path)} & {"tests", *PROGRAMS}


def test_the_package_imports_nothing_beside_it():
    for path in SOURCES:
        assert not {name.split(".")[0] for name in imported(path)} & {"tests", *PROGRAMS}, path


def test_no_test_module_is_imported():
    """What several tests need lies in a module of its own, beside them."""
    for path in FILES:
        for name in imported(path):
            assert not any(part.startswith("test_") for part in name.split(".")), f"{path.name} imports {name}"


def test_every_part_has_a_rule():
    present = {part_of(path) for path in SOURCES}
    assert present <= set(MAY_IMPORT)
    assert set(MAY_IMPORT) - present <= {"native"}, "a rule for a part that is not there"


def test_no_modules_import_each_other():
    """Imports for type checkers alone and within functions count: a circle is one, whenever it is closed."""
    modules = {module_of(path) for path in SOURCES}
    arrows = {module_of(path): {name for name in imported(path) if name in modules} for path in SOURCES}
    assert cycles(arrows) == []


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
