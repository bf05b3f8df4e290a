# SPDX-License-Identifier: Apache-2.0
"""Extract the function from an answer in prose and code, as a person would copy it out.

An answer is cut into fenced blocks (``fenced_blocks``). ``function_source`` takes the last one that defines the
requested function, with the imports and helpers of the blocks before it, and leaves out code that only shows the
function at work: printed examples, assertions, ``if __name__ == "__main__"``. Python's own parser decides what is
Python.
"""

import ast
import itertools
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_FENCE = re.compile(r"(?P<indent>[ \t>]*)(?P<marks>`{3,}|~{3,})(?P<info>[^`\n]*)\Z")
_CLOSING_AT_END = re.compile(r"(.*\S)[ \t]*(`{3,}|~{3,})[ \t]*\Z")
_PYTHON = re.compile(r"\{?\.?(?:python|py|ipython|sage)(?:[ \t]?[\d.]+)?\}?(?![\w-])", re.IGNORECASE)
_CODE_LINE = re.compile(r"(?:async def|def|class|import|from|@\w|return\b|if |for |while |[A-Za-z_]\w* ?=[^=])")
_START = re.compile(r"(?:async def|def|class|import|from|@\w|[A-Za-z_]\w* ?=[^=])")
_SHOWS = {"print", "input", "__name__"}
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
# A longer answer is not a function, and Python's parser is not made for a stranger's megabyte.
_MOST_CHARACTERS, _MOST_BLOCKS, _MOST_ENDS, _MOST_CUTS = 100_000, 100, 8, 50


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: the first word after the fence in lower case, "python" for all of Python's names; its lines."""

    language: str
    code: str


def function_source(text: str, name: str | None, prompt: str = "") -> str:
    """The source in the answer ``text`` that defines ``name``; all its code if ``name`` is None or missing there.

    ``prompt``: the beginning of the function, if the model was asked to complete it; an answer may then be only the
    body. ``text`` may begin inside a block that the prompt opened.
    """
    text = _clean(text)
    before = prompt[: match.start()] if (match := _definition_in(prompt, name)) else ""
    blocks = list(itertools.islice(fenced_blocks(text), _MOST_BLOCKS))
    codes = [code for block in blocks for code in _versions(block.code)]
    if head := _before_first_closing(text, blocks):
        codes.insert(0, head)
    for index in range(len(codes) - 1, -1, -1):
        if (source := _defining(codes[index], name)) is not None:
            return _join([before, *_helpers(codes[:index], name), source])
    is_body = text.lstrip("\n").startswith((" ", "\t"))
    if not codes and not is_body and (source := _defining(_from_first_code_line(text, name), name)) is not None:
        return _join([before, source])
    for code in codes or [text]:
        may_be_body = prompt and (is_body or not _definition_in(code, name))
        if may_be_body and (source := _completed(prompt, code, name)) is not None:
            return source
    python = [block.code for block in blocks if block.language in ("", "python")]
    return prompt + next(iter([*python, *codes, text]))


def fenced_blocks(text: str) -> Iterator[Block]:
    """The blocks between fences of three or more ` or ~, indented or not; the last may lack its closing fence.

    A fence with a word after it never closes a block. If the code up to a closing fence is not Python, because the
    fence is inside a docstring, the block continues to the next fence.
    """
    lines, at = text.split("\n"), 0
    while at < len(lines):
        opening = _FENCE.match(lines[at])
        if opening is None:
            at += 1
            continue
        first, at = _after_language(opening["info"]), at + 1
        ends = _ends(lines, at, opening["marks"])
        chosen = next((end for end in ends if _parses(_body(lines, at, end, opening, first[1]))), None)
        if chosen is None:
            chosen = ends[0] if ends else (len(lines), "")
        yield Block(first[0], _body(lines, at, chosen, opening, first[1]))
        at = chosen[0] + 1


def called_name(tests: Sequence[str]) -> str | None:
    """The function that assertions are about: the first one called in them that is not built in."""
    import builtins

    for test in tests:
        tree = _parse(test)
        for node in ast.walk(tree) if tree is not None else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not hasattr(builtins, node.func.id):
                return node.func.id
    return None


def _clean(text: str) -> str:
    text = text.rpartition("</think>")[2][:_MOST_CHARACTERS]
    return re.sub(r"\r\n?", "\n", text).replace("\u00a0", " ").replace("\ufeff", "")


def _after_language(info: str) -> tuple[str, str]:
    """(the block's language, code on the fence's own line)."""
    info = info.strip()
    python = _PYTHON.match(info)
    rest = info[python.end() :].strip() if python else info
    if _CODE_LINE.match(rest):
        return "python", rest
    return ("python", "") if python else ((info.split() or [""])[0].lower(), "")


def _ends(lines: list[str], start: int, marks: str) -> list[tuple[int, str]]:
    """(line, code before the fence there) of each line that can close a block, up to the next block's opening."""
    found: list[tuple[int, str]] = []
    for index in range(start, len(lines)):
        if len(found) == _MOST_ENDS:
            break
        fence = _FENCE.match(lines[index])
        if fence is not None and fence["marks"].startswith(marks):
            if fence["info"].strip():
                if found:
                    break
                continue
            found.append((index, ""))
        elif (at_end := _CLOSING_AT_END.match(lines[index])) and at_end[2].startswith(marks) and "`" not in at_end[1]:
            found.append((index, at_end[1]))
    return found


def _body(lines: list[str], start: int, end: tuple[int, str], opening: re.Match[str], first: str) -> str:
    indent = opening["indent"]
    body = [line.removeprefix(indent) if ">" in indent else line for line in lines[start : end[0]]]
    if end[1]:
        body.append(end[1])
    return "\n".join([first, *body] if first else body) + "\n"


def _before_first_closing(text: str, blocks: list[Block]) -> str:
    """The text before the first fence, if that can only close a block which the prompt opened."""
    lines = text.split("\n")
    for index, line in enumerate(lines):
        if fence := _FENCE.match(line):
            head = "\n".join(lines[:index])
            is_bare = not fence["info"].strip() and bool(head.strip())
            return head + "\n" if is_bare and (_parses(head) or _parses(f"def f():\n{head}\n")) else ""
    return ""


def _versions(code: str) -> list[str]:
    """A block's code, and if it is an interpreter's session, what was typed."""
    typed = [line[4:] for line in code.split("\n") if line.startswith((">>> ", "... "))]
    return [code, "\n".join(typed) + "\n"] if any(line.startswith(">>> ") for line in code.split("\n")) else [code]


def _parse(code: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _parses(code: str) -> bool:
    return _parse(textwrap.dedent(code)) is not None


def _defining(code: str, name: str | None) -> str | None:
    """The code that defines ``name``, up to its first error, without code that only shows it at work; None if there is
    none."""
    if name is not None and _definition_in(code, name) is None and f"{name} =" not in code:
        return None
    code = textwrap.dedent(code)
    for _ in range(_MOST_CUTS):
        tree = _parse(code)
        if tree is not None:
            if name is None or any(name in _bound(node) and not _is_empty(node) for node in tree.body):
                return _lines_of(code, _kept(tree, name))
            return None
        cut = _before_error(code)
        if cut is None:
            return None
        code = cut
    return None


def _before_error(code: str) -> str | None:
    """The lines before the one that Python refuses."""
    lines = code.rstrip().split("\n")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse("\n".join(lines))
    except SyntaxError as error:
        last = min((error.lineno or len(lines)) - 1, len(lines) - 1)
        return "\n".join(lines[:last]) if last > 0 else None
    except (ValueError, RecursionError, MemoryError):
        return None
    return None


def _kept(tree: ast.Module, name: str | None) -> list[ast.stmt]:
    """The statements that the function needs."""
    kept = []
    for node in tree.body:
        bound = _bound(node)
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        is_definition = isinstance(node, _Definition) or (name is not None and name in bound)
        called = node.value.func if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
        is_set_up = isinstance(called, ast.Attribute)  # sys.setrecursionlimit(...)
        is_prose = isinstance(node, ast.AnnAssign) and node.value is None  # "Note: ..."
        is_shown = is_prose or isinstance(node, ast.Assert) or (isinstance(node, ast.Expr) and not is_set_up)
        if is_definition or not (is_shown or names & (_SHOWS | ({name} if name else set()))):
            kept.append(node)
    return kept


def _lines_of(code: str, nodes: Sequence[ast.stmt]) -> str:
    """The lines of these statements."""
    lines = code.split("\n")
    numbers: set[int] = set()
    for node in nodes:
        decorators = node.decorator_list if isinstance(node, _Definition) else []
        first = min([node.lineno, *(one.lineno for one in decorators)])
        numbers.update(range(first - 1, node.end_lineno or node.lineno))
    return "".join(f"{lines[number]}\n" for number in sorted(numbers))


def _bound(node: ast.stmt) -> set[str]:
    if isinstance(node, _Definition):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _helpers(codes: list[str], name: str | None) -> list[str]:
    """Imports and definitions of the blocks before, other than earlier versions of the function."""
    found = []
    for code in codes:
        code = textwrap.dedent(code)
        tree = _parse(code)
        nodes = [node for node in _kept(tree, name) if name not in _bound(node)] if tree is not None else []
        found.append(_lines_of(code, [n for n in nodes if isinstance(n, _Definition | ast.Import | ast.ImportFrom)]))
    return found


def _completed(prompt: str, code: str, name: str | None) -> str | None:
    """The prompt with the body that ``code`` begins with. Code at the margin after the function is left out, except for
    further definitions."""
    for body in (code, textwrap.indent(textwrap.dedent(code), "    ")):
        source = prompt + body
        for _ in range(_MOST_CUTS):
            tree = _parse(source)
            if tree is not None:
                break
            cut = _before_error(source)
            if cut is None or len(cut) < len(prompt.rstrip()):
                break
            source = cut
        if tree is None:
            continue
        nodes = [node for node in tree.body if isinstance(node, _Definition) and name in _bound(node)]
        if nodes and not _is_empty(nodes[0]):
            return _lines_of(source, [node for node in _kept(tree, name) if node not in nodes[1:]])
    return None


def _is_empty(node: ast.stmt) -> bool:
    """Whether a function consists only of its docstring, as the prompt's own does, or of a mere "pass" or "..."."""
    return isinstance(node, _Definition) and all(
        isinstance(one, ast.Pass) or (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))
        for one in node.body
    )


def _definition_in(code: str, name: str | None) -> re.Match[str] | None:
    if name is None:
        return None
    return re.search(rf"^[ \t>.]*(?:async[ \t]+)?(?:def|class)[ \t]+{re.escape(name)}\b", code, re.MULTILINE)


def _from_first_code_line(text: str, name: str | None) -> str:
    """Cut prose around code without fences: start from the imports and helpers right before the function."""
    lines = text.split("\n")
    found = _definition_in(text, name)
    if found is None:
        return text
    at = text.count("\n", 0, found.start())
    for start in range(at):
        if _START.match(lines[start]) and _parse("\n".join(lines[start:at])) is not None:
            return "\n".join(lines[start:])
    return "\n".join(lines[at:])


def _join(parts: list[str]) -> str:
    return "\n".join(part for part in parts if part.strip())
