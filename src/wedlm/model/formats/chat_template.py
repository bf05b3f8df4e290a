# SPDX-License-Identifier: Apache-2.0
"""Chat templates: Jinja programs that come with a checkpoint. They run in a sandbox with the functions that such
templates rely on.

A template is a stranger's program. The sandbox lets it see only its variables, and ``template_limits.py`` bounds its
time and memory.
"""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from wedlm.model.formats.template_limits import MAX_SOURCE_CHARACTERS, Budget, ExceededError, LimitedEnvironment


def render_chat_template(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    now: datetime.datetime | None = None,
) -> str:
    """Render the prompt for ``messages`` (each with ``role`` and ``content``); the template sees ``variables``. ``now``
    is the time for the template's ``strftime_now``; None means the time of the call.

    Raises ValueError for a template that does not parse, fails, takes too long, or refuses the messages.
    """
    inputs = {"messages": messages, **variables}
    try:
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise ExceededError(f"has {len(source)} characters; expected at most {MAX_SOURCE_CHARACTERS}")
        with Budget.of(inputs) as budget:
            budget.now = now or datetime.datetime.now()
            return _compile(source).template.render(inputs)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid Jinja (line {error.lineno}): {error.message}") from error
    except _RefusedError as error:
        raise ValueError(f"the chat template refused the messages: {error.message}") from error
    except ExceededError as error:
        raise ValueError(f"the chat template {error}") from error
    except Exception as error:  # A template is a foreign program: it can fail with anything.
        reason = str(error) or type(error).__name__
        raise ValueError(f"the chat template failed on these messages: {reason}") from error


def template_constants(source: str) -> frozenset[str]:
    """The string constants in the expressions of a template that was rendered before."""
    return _compile(source).constants


class _RefusedError(jinja2.TemplateError):
    pass


class _GenerationTag(Extension):
    """``{% generation %}…{% endgeneration %}`` marks the assistant's text for training; here it only renders it."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


@dataclass(frozen=True, slots=True)
class _Compiled:
    template: jinja2.Template
    constants: frozenset[str]


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> _Compiled:
    environment = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
    environment.add_filter("tojson", _to_json)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    constants = (node.value for node in environment.parse(source).find_all(nodes.Const))
    texts = frozenset(text for text in constants if isinstance(text, str))
    try:
        return _Compiled(environment.from_string(source), texts)
    except SyntaxError as error:  # of the Python that Jinja makes, which may not be nested as deep as a template
        raise ExceededError(f"is too complicated ({error.msg}); expected a simpler one") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which would corrupt a prompt. Piece by piece, because in one
    # call a megabyte of tools would keep all other threads waiting.
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return "".join(encoder.iterencode(value))


def _refuse(message: str) -> str:
    raise _RefusedError(message)


def _strftime_now(form: str) -> str:
    if len(form) > 200:
        raise ExceededError(f"asks for the time in a form of {len(form)} characters; expected at most 200")
    return Budget.current().now.strftime(form)
