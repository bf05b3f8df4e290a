# SPDX-License-Identifier: Apache-2.0
"""The compiled library: where it is, what it offers, and its C interface (csrc/capi.h) in Python."""

import ctypes
import functools
import importlib.machinery
import os
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

_ABI_VERSION = 6
_MISSING = (
    "the native CPU forward was not built: no C++ compiler (g++ or clang++) was found at installation; everything "
    "works on torch, and a step on a CPU takes several times as long"
)
PORTABLE = "portable"  # the reference of all instruction sets, which takes many times as long
PATH_VARIABLE = "WEDLM_NATIVE_PATH"  # forces an instruction set


class NativeError(ValueError):
    """The library is missing, or refuses its input; the message is one sentence for the user."""


class Shape(Structure):
    """``WedlmShape``."""

    _fields_ = (
        *((name, c_int32) for name in ("num_layers", "hidden_size", "intermediate_size", "num_heads")),
        *((name, c_int32) for name in ("num_kv_heads", "head_dim", "vocab_size")),
        ("rms_norm_eps", c_float),
    )


class Step(Structure):
    """``WedlmStep``; pointers are addresses."""

    _fields_ = (
        ("num_rows", c_int64),
        ("num_sequences", c_int64),
        *((name, c_void_p) for name in ("tokens", "positions", "starts", "counts", "pages", "page_offsets")),
        *((name, c_void_p) for name in ("shared", "own_start", "factors", "keys", "values")),
        ("key_scale", c_void_p),
        ("value_scale", c_void_p),
        ("cache_type", c_int32),
        ("page_size", c_int32),
        ("num_slots", c_int64),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("num_positions", c_int64),
        ("num_logits", c_int64),
        *((name, c_void_p) for name in ("logits_rows", "logits", "token", "token_logit", "entropy", "logsumexp")),
        ("banned", c_void_p),
        ("banned_offsets", c_void_p),
    )


class InstructionSet(NamedTuple):
    """An instruction set that was compiled in."""

    name: str
    runs: bool  # on this processor
    needs: str


def is_available() -> bool:
    """Whether the library was built."""
    return _library_file() is not None


def _library_file() -> Path | None:
    directory = Path(__file__).parent
    names = (f"_library{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((directory / name for name in names if (directory / name).is_file()), None)


@functools.cache
def load() -> ctypes.CDLL:
    """Load the library. Raises NativeError if it was not built or cannot be loaded."""
    file = _library_file()
    if file is None:
        raise NativeError(_MISSING)
    try:
        library = ctypes.CDLL(str(file))
    except OSError as error:
        raise NativeError(f"the native CPU forward cannot be loaded: {error}") from error
    if library.wedlm_abi_version() != _ABI_VERSION:
        raise NativeError(f"{file.name} is of another version of wedlm; expected a fresh `pip install`")
    error_at = (c_char_p, c_int64)
    for name, result, arguments in (
        ("path", c_int32, (c_int32, POINTER(c_char_p), POINTER(c_int32), POINTER(c_char_p))),
        ("model_new", c_void_p, (POINTER(Shape), c_char_p, c_int32, *error_at)),
        ("model_free", None, (c_void_p,)),
        ("model_path", c_char_p, (c_void_p,)),
        ("model_set_matrix", c_int32, (c_void_p, *(c_int32,) * 5, c_void_p, c_void_p, *error_at)),
        ("model_set_vector", c_int32, (c_void_p, *(c_int32,) * 2, c_int64, c_void_p, *error_at)),
        ("model_set_factors", c_int32, (c_void_p, *(c_int32,) * 5, *(c_void_p,) * 4, *error_at)),
        ("model_set_start", c_int32, (c_void_p, c_int32, c_int64, c_void_p, *error_at)),
        ("model_drop_factors", None, (c_void_p, c_int32)),
        ("model_tie", None, (c_void_p,)),
        ("model_bytes", c_int64, (c_void_p,)),
        ("model_forward", c_int32, (c_void_p, POINTER(Step), *error_at)),
        ("test_product", c_int32, (c_char_p, *(c_int32,) * 3, c_void_p, c_void_p, c_int32, c_void_p, c_void_p)),
        ("test_unpack", c_int32, (*(c_int32,) * 3, c_void_p, c_void_p, c_void_p)),
        ("test_norm", c_int32, (c_char_p, c_void_p, c_void_p, c_float, c_int64, c_void_p)),
        ("test_rotate", c_int32, (c_char_p, c_void_p, c_void_p, c_void_p, c_int64)),
        ("test_silu_mul", c_int32, (c_char_p, c_void_p, c_void_p, c_int64)),
        ("test_exp", c_int32, (c_char_p, c_void_p, c_int64, c_void_p)),
    ):
        function = getattr(library, f"wedlm_{name}")
        function.restype, function.argtypes = result, arguments
    return library


def paths() -> list[InstructionSet]:
    """Instruction sets that were compiled in, the fastest first."""
    library = load()
    found: list[InstructionSet] = []
    name, runs, needs = c_char_p(), c_int32(), c_char_p()
    while library.wedlm_path(len(found), name, runs, needs) == 0:
        found.append(InstructionSet((name.value or b"").decode(), bool(runs.value), (needs.value or b"").decode()))
    return found


def chosen_path(asked: str | None = None) -> str:
    """The instruction set to run: ``asked``, else $WEDLM_NATIVE_PATH, else the fastest. Raises NativeError."""
    known = paths()
    name = asked or os.environ.get(PATH_VARIABLE)
    if not name:
        return next(path.name for path in known if path.runs)
    for path in known:
        if path.name == name:
            if not path.runs:
                raise NativeError(f"the instruction set is {name!r}; expected a processor that has {path.needs}")
            return name
    expected = ", ".join(path.name for path in known)
    raise NativeError(f"the instruction set is {name!r}; expected one of {expected}")


def describe(asked: str | None = None) -> str:
    """One sentence: which instruction set runs and why, or why none does."""
    try:
        name, known = chosen_path(asked), paths()
    except NativeError as error:
        return f"{error}."
    if asked or os.environ.get(PATH_VARIABLE):
        return f"The native forward runs on {name}, as asked."
    faster = known[0]
    passed = "" if name == faster.name else f"; {faster.name}, which is faster, would need {faster.needs}"
    return f"The native forward runs on {name}, the fastest set that this processor has{passed}."


def num_threads(asked: int | None) -> int:
    """``asked``, checked; None takes the cores that this process may use. Raises NativeError."""
    if asked is None:
        return int(load().wedlm_physical_cores())
    most = os.cpu_count() or 1
    if isinstance(asked, bool) or not isinstance(asked, int) or not 1 <= asked <= most:
        raise NativeError(f"threads is {asked!r}; expected 1 to {most}, the processors of this machine")
    return asked
