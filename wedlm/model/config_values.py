# SPDX-License-Identifier: Apache-2.0
"""Reading one value of a configuration file: each function returns a checked value or raises ValueError naming it."""

from collections.abc import Mapping
from typing import Any


def read_token_ids(name: str, value: Any) -> tuple[int, ...]:
    """Token ids as configs write them: null, one integer or a list."""
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    for token_id in ids:
        check_integer(name, token_id, minimum=0)
    return ids


def check_integer(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} is {value!r}; expected an integer of at least {minimum}")


def read_integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    check_integer(key, value, minimum=1)
    return int(value)  # type: ignore[arg-type]


def read_number(config: Mapping[str, Any], key: str, default: float) -> float:
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{key} is {value!r}; expected a number above 0")
    return float(value)


def read_flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}; expected true or false")
    return value
