# SPDX-License-Identifier: Apache-2.0
"""Lets the reference (api.md) show each engine option with its default and its help, which ``_option`` declares."""

import ast
from typing import Any

import griffe


class Options(griffe.Extension):
    """Replaces ``_option(default, help, check)`` by the default, with the help as the attribute's docstring."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        value = attr.value
        if isinstance(value, griffe.ExprCall) and value.function.canonical_name == "_option":
            default, help, _check = value.arguments
            attr.value = default
            attr.docstring = griffe.Docstring(ast.literal_eval(str(help)), parent=attr)
