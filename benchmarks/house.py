# SPDX-License-Identifier: Apache-2.0
"""What the sources look like: lines and files by package, circles of imports, places that declare one engine option.

    python benchmarks/house.py                 # this tree
    python benchmarks/house.py --rev e7d5c80   # a revision of its repository

Last line: JSON.
"""

import argparse
import ast
import io
import json
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]


def sources_of(revision: str | None) -> dict[str, str]:
    """Text of every module by its path inside the package."""
    if revision is None:
        folder = ROOT / "src" / "wedlm"
        return {str(path.relative_to(folder)): path.read_text(encoding="utf-8") for path in folder.rglob("*.py")}
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", revision], check=True, capture_output=True).stdout
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            name = member.name.removeprefix("src/")
            file = tar.extractfile(member)
            if file is not None and name.startswith("wedlm/") and name.endswith(".py"):
                found[name.removeprefix("wedlm/")] = file.read().decode()
    return found


def imports_of(sources: dict[str, str]) -> dict[str, set[str]]:
    """Modules that each module imports, wherever in it, those for type checking included."""
    names = {module_name(path) for path in sources}
    found = {}
    for path, text in sources.items():
        own = found[module_name(path)] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                own |= {alias.name for alias in node.names} & names
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                full = {f"{node.module}.{alias.name}" for alias in node.names}
                own |= (full & names) or ({node.module} & names)
        own.discard(module_name(path))
    return found


def module_name(path: str) -> str:
    return "wedlm." + path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected groups of more than one module."""
    reach: dict[str, set[str]] = {}
    for start in imports:
        seen, left = set(), [start]
        while left:
            new = imports[left.pop()] - seen
            seen |= new
            left += new
        reach[start] = seen
    groups = {frozenset({a, *(b for b in reach[a] if a in reach[b])}) for a in imports if a in reach[a]}
    return sorted(sorted(group) for group in groups)


def declares(text: str, option: str) -> bool:
    """Whether a module names an option as a parameter, a field, a keyword or a string of exactly that name."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.arg | ast.keyword) and node.arg == option:
            return True
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == option:
            return True
        if isinstance(node, ast.Constant) and node.value == option:
            return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rev", help="a git revision; default: the files of this tree")
    parser.add_argument("--option", default="capture_chunks", help="the engine option to look for")
    arguments = parser.parse_args()
    sources = sources_of(arguments.rev)
    lines, files = Counter(), Counter()
    for path, text in sources.items():
        package = path.split("/")[0] if "/" in path else "."
        lines[package] += text.count("\n")
        files[package] += 1
    report = {
        "revision": arguments.rev or "the tree",
        "lines": dict(sorted(lines.items())),
        "files": dict(sorted(files.items())),
        "total": {"lines": sum(lines.values()), "files": sum(files.values())},
        "circles": circles(imports_of(sources)),
        "engine.py": sources["engine/engine.py"].count("\n"),
        f"modules that name {arguments.option}": sorted(p for p, t in sources.items() if declares(t, arguments.option)),
    }
    for package in report["lines"]:
        print(f"{package:12} {files[package]:4} files {lines[package]:6} lines")
    for name in list(report)[3:]:
        print(f"{name}: {report[name]}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
