# SPDX-License-Identifier: Apache-2.0
"""jaxtyping's checks, once for each combination of shapes that a function gets and gives.

A check binds the arguments to the signature and goes through them several times, which takes longer than most of the
functions; and a nested function is decorated anew at each call of the outer one, which takes milliseconds. What a check
says depends on nothing but the forms below.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any

import jaxtyping
import torch
from torch import Tensor

_in_full = jaxtyping.jaxtyped
_seen: dict[Hashable, set[Hashable]] = {}  # by function; a nested one is the same at each call of the outer one


def check_once_a_form() -> None:
    """Let the import hook decorate with ``jaxtyped`` below."""
    jaxtyping.jaxtyped = jaxtyped  # type: ignore[assignment]


def jaxtyped(fn: Any = None, *, typechecker: Any) -> Any:
    """As jaxtyping's: checks a function, or what a dataclass is made of."""
    if fn is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(fn):
        if dataclasses.is_dataclass(fn):
            fn.__init__ = jaxtyped(fn.__init__, typechecker=typechecker)  # type: ignore[misc]
        return fn
    if not inspect.isfunction(fn):  # a property or a class method
        return _in_full(fn, typechecker=typechecker)
    seen = _seen.setdefault((fn.__module__, fn.__qualname__, fn.__code__), set())

    @functools.wraps(fn)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return fn(*args, **kwargs)
        given = form((args, kwargs))
        if given not in seen:
            result = _in_full(fn, typechecker=typechecker)(*args, **kwargs)
            seen.update((given, (given, form(result))))
            return result
        result = fn(*args, **kwargs)
        both = given, form(result)
        if both not in seen:
            _in_full(_returning(result, fn), typechecker=typechecker)(*args, **kwargs)
            seen.add(both)
        return result

    return wrapper


def _returning(result: object, fn: Callable) -> Callable:
    """A function of ``fn``'s signature whose result is known."""

    @functools.wraps(fn)
    def known(*args: Any, **kwargs: Any) -> object:
        return result

    return known


def form(value: Any) -> Hashable:
    """What a check may depend on: types, and of tensors also number format and shape."""
    if isinstance(value, Tensor):
        return type(value), value.dtype, value.shape
    if isinstance(value, tuple):
        return type(value), *map(form, value)
    if isinstance(value, list):
        return list, frozenset(map(form, value))
    if isinstance(value, dict):
        return dict, frozenset((key, form(part)) for key, part in value.items())
    return value if isinstance(value, str) else type(value)
