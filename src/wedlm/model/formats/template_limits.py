# SPDX-License-Identifier: Apache-2.0
"""Limits on the time and memory of a Jinja template, which anybody may have written.

Steps are counted where a program can repeat itself: in the body and the condition of every loop, in macros and calls.
Filters repeat their argument for every element (``map``, ``groupby``), so attributes and tests check the clock. Memory
is counted where values are made: results of operators, filters, calls, slices and literals, and the output. Operations
that could take long within one step (a string times a number, padding, formats) are checked before they run.
"""

import datetime
import re
import string
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from functools import wraps
from types import BuiltinMethodType, MethodType
from typing import Any, cast

from jinja2 import Undefined, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE_CHARACTERS = 2**16
# Jinja compiles a template in a time that grows with the levels above each of its parts, added up over all parts; those
# of published templates add up to less than a quarter of this, which takes a second.
_MAX_LEVELS = 100_000
# What a template may use beside what it is given; of each byte of the messages it may use more.
_STEPS, _STEPS_A_BYTE = 300_000, 4
_MADE_BYTES, _MADE_BYTES_A_BYTE = 2**26, 100
_VALUE_BYTES, _VALUE_BYTES_A_BYTE = 2**21, 16
_SECONDS, _SECONDS_A_BYTE = 0.8, 1e-5
_MAX_RANGE = 100_000
_MAX_NUMBER_BITS = 4096
_MAX_WIDTH = 1000

_PERCENT_WIDTH = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(?:\*|\d{4,}|\d*\.(?:\*|\d{4,}))")
# Methods of Python's own types that make nothing larger than what they are given, or whose result is foreseen below.
_STR_METHODS = (
    "capitalize casefold center count endswith expandtabs find format format_map index isalnum isalpha isascii "
    "isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join ljust lower lstrip "
    "partition removeprefix removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines "
    "startswith strip striptags swapcase title unescape upper zfill"
)
_METHODS: tuple[tuple[type, frozenset[str]], ...] = (
    (str, frozenset(_STR_METHODS.split())),
    (dict, frozenset({"copy", "get", "items", "keys", "values"})),
    (list, frozenset({"copy", "count", "index"})),
    (tuple, frozenset({"count", "index"})),
    (range, frozenset({"count", "index"})),
    (int, frozenset({"bit_length", "is_integer"})),
    (float, frozenset({"is_integer"})),
)
_PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs"})
# Filters whose integers say how much to make.
_SIZED_FILTERS = frozenset({"batch", "center", "indent", "round", "slice", "tojson", "truncate", "wordwrap"})


class ExceededError(Exception):
    """The template exceeds a limit; the message continues the words "the chat template"."""


class Budget:
    """What one rendering may still use. ``with Budget.of(inputs)`` makes it this thread's ``current()``."""

    now: datetime.datetime

    def __init__(self, input_bytes: int) -> None:
        self.steps = _STEPS + _STEPS_A_BYTE * input_bytes
        self.made_bytes = _MADE_BYTES + _MADE_BYTES_A_BYTE * input_bytes
        self.value_bytes = _VALUE_BYTES + _VALUE_BYTES_A_BYTE * input_bytes
        self.seconds = _SECONDS + _SECONDS_A_BYTE * input_bytes
        self._deadline = time.thread_time() + self.seconds
        self._known: dict[int, int] = {}
        self._all = (self.steps, self.made_bytes)
        self._looks = 0

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> "Budget":
        """A budget for a template with these variables, which must not change while it runs."""
        known: dict[int, int] = {}
        budget = cls(_weigh(dict(inputs), known, sys.maxsize))
        budget._known = known
        return budget

    @staticmethod
    def current() -> "Budget":
        return _current.get() or Budget(0)  # None: Jinja folds constants while it compiles

    def __enter__(self) -> "Budget":
        self._token = _current.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _current.reset(self._token)

    def step(self, output_bytes: int = 0) -> bool:
        """Count one more turn of a loop, which writes ``output_bytes`` itself. Returns True, for loops' conditions."""
        self.steps -= 1
        if self.steps < 0:
            raise ExceededError(f"runs more than {self._all[0]} steps; expected a template that ends")
        self.look_at_clock()
        if output_bytes:
            self._spend(output_bytes)
        return True

    def look_at_clock(self) -> None:
        """Check the time; call it often, because only one call in 32 reads the clock."""
        self._looks += 1
        if self._looks % 32 == 0 and time.thread_time() > self._deadline:
            raise ExceededError(f"runs longer than {self.seconds:.3g} s; expected a template that ends")

    def made(self, value: Any) -> Any:
        """Count and return ``value``, which the template has made."""
        if isinstance(value, str | list | tuple | dict):
            self._spend(sys.getsizeof(value))
            self.check(_weigh(value, self._known, self.value_bytes))
        return value

    def check(self, num_bytes: int) -> None:
        """Check the size of a value before it is made."""
        if num_bytes > self.value_bytes:
            raise ExceededError(f"makes a value of more than {self.value_bytes} bytes; expected less text")

    def _spend(self, num_bytes: int) -> None:
        self.made_bytes -= num_bytes
        if self.made_bytes < 0:
            raise ExceededError(f"makes more than {self._all[1]} bytes of text; expected less")


_current: ContextVar[Budget | None] = ContextVar("budget of the running template", default=None)


def _weigh(value: Any, known: dict[int, int], most: int, seen: dict[int, int] | None = None) -> int:
    """The bytes of a value when written out; a part that occurs twice counts twice, although it is in memory once.

    ``known`` has the weights of containers by identity; without ``seen``, an input's own are noted there.
    """
    if isinstance(value, str):
        return sys.getsizeof(value)
    if isinstance(value, range):
        return 8 * len(value)
    if not isinstance(value, list | tuple | dict):
        return 32
    if id(value) in known:
        return known[id(value)]
    notes = (known if most == sys.maxsize else {}) if seen is None else seen
    if id(value) in notes:
        return notes[id(value)]
    parts: Iterable[Any] = value if not isinstance(value, dict) else (part for pair in value.items() for part in pair)
    weight = sys.getsizeof(value)
    for part in parts:
        weight += _weigh(part, known, most, notes)
        if weight > most:  # a value of that size is refused: do not read on
            break
    notes[id(value)] = weight
    return weight


class _OpaqueNamespace(Namespace):
    """A namespace that is not written out, because namespaces can contain each other and writing them could take
    forever."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Counting(NodeTransformer):
    """Puts a step into each loop's body and condition and each macro, and ``made`` around everything that
    makes values."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _step(node, node.body))
        if node.test is not None:
            node.test = nodes.And(_call(node, "count_step", nodes.Const(0)), node.test, lineno=node.lineno)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _step(node, node.body))
        return node

    visit_CallBlock = visit_Macro

    def visit_List(self, node: nodes.List | nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load" or all(isinstance(item, nodes.Const) for item in node.items):
            return node
        return _call(node, "count_made", node)

    visit_Tuple = visit_List

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        return _call(node, "count_made", self.generic_visit(node))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _call(node, "count_made", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call(node, "concatenate", *node.nodes)


def _call(origin: nodes.Node, method: str, *arguments: Any) -> nodes.Call:
    line = origin.lineno
    function = nodes.EnvironmentAttribute(method, lineno=line)
    return nodes.Call(function, list(arguments), [], None, None, lineno=line)


def _step(origin: nodes.Node, body: list[nodes.Node]) -> nodes.ExprStmt:
    written = sum(len(data.data.encode(errors="replace")) for node in body for data in _own_data(node))
    return nodes.ExprStmt(_call(origin, "count_step", nodes.Const(written)), lineno=origin.lineno)


def _own_data(node: nodes.Node) -> Iterable[nodes.TemplateData]:
    if isinstance(node, nodes.TemplateData):
        yield node
    elif not isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
        for child in node.iter_child_nodes():
            yield from _own_data(child)


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which templates use up the current ``Budget``."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=self._write, **options)
        for unbounded in ("pprint", "random", "urlize", "xmlattr"):  # and of no use in a prompt
            del self.filters[unbounded]
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)
        self.tests = {name: _timed(cast(Callable[..., Any], test)) for name, test in self.tests.items()}
        del self.globals["lipsum"]
        self.globals |= {"range": _range, "namespace": _OpaqueNamespace}

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Make a function a filter whose result is counted."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            budget = Budget.current()
            budget.step()
            value, *rest = args[first:]
            if isinstance(value, Iterable) and not isinstance(value, str | Mapping | Undefined) and name == "join":
                value = budget.made(list(value))  # a generator can be read once
            _foresee_filter(budget, name, value, [*rest, *kwargs.values()])
            return budget.made(function(*args[:first], value, *rest, **kwargs))

        self.filters[name] = counted

    def getitem(self, obj: Any, argument: Any) -> Any:
        Budget.current().look_at_clock()
        return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        Budget.current().look_at_clock()
        return super().getattr(obj, attribute)

    def _parse(self, *args: Any) -> nodes.Template:
        """Check the nesting here rather than rely on Python's own limit of recursion, which other libraries raise
        (torch's compiler)."""
        tree = super()._parse(*args)
        levels, depth, row = 0, 0, [cast(nodes.Node, tree)]
        while row:
            levels += depth * len(row)
            if levels > _MAX_LEVELS:
                raise ExceededError(f"is nested {depth} levels deep around {len(row)} parts; expected a simpler one")
            row = [child for node in row for child in node.iter_child_nodes()]
            depth += 1
        return tree

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        counted = _Counting().visit(source)
        counted.set_environment(self)
        return super()._generate(counted, *args, **kwargs)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(__obj, "__self__", None) is __self:
            return __obj(*args)  # one of the three methods below; Jinja adds a loop's variables as keywords
        budget = Budget.current()
        budget.step()
        if isinstance(__obj, BuiltinMethodType | MethodType):
            _foresee_method(budget, __obj.__self__, __obj.__name__, args, kwargs)
        return budget.made(super().call(__context, __obj, *args, **kwargs))

    def count_step(self, output_bytes: int) -> bool:
        return Budget.current().step(output_bytes)

    def count_made(self, value: Any) -> Any:
        return Budget.current().made(value)

    def concatenate(self, *parts: Any) -> str:
        budget = Budget.current()
        texts, size = [], 0
        for part in parts:
            texts.append(str(part))
            size += sys.getsizeof(texts[-1])
            budget.check(size)
        return str(budget.made("".join(texts)))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = Budget.current()
        budget.step()
        _foresee_operator(budget, operator, left, right)
        return budget.made(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        formatted = super().wrap_str_format(value)
        if formatted is None:
            return None
        fields = 0
        for _, _, form, _ in string.Formatter().parse(value.__self__):
            fields += 1
            if form and ("{" in form or re.search(r"\d{4,}", form)):
                raise ExceededError(f"pads text by the format {form[:40]!r}; expected at most {_MAX_WIDTH} characters")

        def foreseen(*args: Any, **kwargs: Any) -> str:
            budget = Budget.current()
            budget.check(fields * _weigh([args, kwargs], budget._known, budget.value_bytes))
            return str(formatted(*args, **kwargs))

        return foreseen

    @staticmethod
    def _write(value: Any) -> Any:
        text = value if isinstance(value, str) else str(value)
        budget = Budget.current()
        budget.check(sys.getsizeof(text))
        budget._spend(len(text))
        return text


def _timed(test: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(test)
    def timed(*args: Any) -> Any:
        Budget.current().look_at_clock()
        return test(*args)

    return timed


def _range(*args: int) -> range:
    numbers = range(*args)
    if numbers and (len(numbers) if abs(numbers[-1] - numbers[0]) < sys.maxsize else sys.maxsize) > _MAX_RANGE:
        raise ExceededError(f"asks for a range of more than {_MAX_RANGE} numbers; expected fewer")
    return numbers


def _foresee_operator(budget: Budget, operator: str, left: Any, right: Any) -> None:
    both_sized = [isinstance(side, str | list | tuple) for side in (left, right)]
    if operator == "+" and all(both_sized):
        budget.check(sys.getsizeof(left) + sys.getsizeof(right))
    elif operator == "*" and any(both_sized):
        repeated, times = (left, right) if both_sized[0] else (right, left)
        if isinstance(times, int):
            budget.check(_weigh(repeated, budget._known, budget.value_bytes) * max(times, 0))
    elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * abs(right)
        if bits > _MAX_NUMBER_BITS:
            raise ExceededError(f"makes a number of more than {_MAX_NUMBER_BITS} bits; expected a smaller one")
    elif operator == "%" and isinstance(left, str):
        _check_percent(budget, left, right)


def _check_percent(budget: Budget, form: str, values: Any) -> None:
    wide = _PERCENT_WIDTH.search(form)
    if wide is not None:
        raise ExceededError(f"pads text by the format {wide[0][:40]!r}; expected at most {_MAX_WIDTH} characters")
    budget.check(form.count("%") * _weigh(values, budget._known, budget.value_bytes))


def _check_widths(what: str, values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > _MAX_WIDTH:
            raise ExceededError(f"uses {what} with the number {str(value)[:20]}; expected at most {_MAX_WIDTH}")


def _check_replaced(budget: Budget, text: str, arguments: list[Any]) -> None:
    if len(arguments) >= 2:
        old, new = str(arguments[0]), str(arguments[1])
        budget.check(sys.getsizeof(text) + (text.count(old) if old else len(text) + 1) * sys.getsizeof(new))


def _check_joined(budget: Budget, separator: str, parts: Any) -> None:
    budget.check(_weigh(parts, budget._known, budget.value_bytes) + len(parts) * len(separator))


def _foresee_filter(budget: Budget, name: str, value: Any, arguments: list[Any]) -> None:
    if name in _SIZED_FILTERS:
        limit = [argument for argument in arguments if not isinstance(argument, bool)]
        _check_widths(f"the filter {name}", limit)
        if name in ("indent", "wordwrap", "tojson"):
            # An indentation, a break or a separator comes once a line or a value, each of at least one character.
            widest = max(
                [argument if isinstance(argument, int) else len(str(argument)) for argument in limit], default=0
            )
            places = (
                str(value).count("\n") + 1
                if name == "indent"
                else _weigh(value, budget._known, budget.value_bytes) // 8
            )
            budget.check(places * max(widest, 0) if widest > 16 or name == "indent" else 0)
    elif name == "format":
        _check_percent(budget, str(value), arguments)
    elif name == "replace":
        _check_replaced(budget, str(value), arguments)
    elif name == "join" and isinstance(value, list):
        _check_joined(budget, str(arguments[0]) if arguments else "", value)


def _foresee_method(budget: Budget, owner: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if isinstance(owner, bytes | bytearray):
        raise ExceededError("works with bytes; expected text")
    methods = next((names for kind, names in _METHODS if isinstance(owner, kind)), None)
    if methods is None:
        return
    if name not in methods:
        raise ExceededError(f"calls {type(owner).__name__}.{name}, which templates must not call; expected another way")
    if not isinstance(owner, str):
        return
    arguments = [*args, *kwargs.values()]
    if name in _PADDING:
        _check_widths(f"str.{name}", arguments)
        if name == "expandtabs":
            budget.check(
                sys.getsizeof(owner) + owner.count("\t") * max([8, *(a for a in arguments if isinstance(a, int))])
            )
    elif name == "replace":
        _check_replaced(budget, owner, arguments)
    elif name == "join" and arguments and isinstance(arguments[0], list | tuple | dict):
        _check_joined(budget, owner, arguments[0])
    elif name == "join" and arguments and not isinstance(arguments[0], str):
        raise ExceededError(f"joins a {type(arguments[0]).__name__}; expected a list")
