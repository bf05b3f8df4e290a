# SPDX-License-Identifier: Apache-2.0
"""Chat templates: Jinja programs that come with a checkpoint, run in a sandbox with what such templates rely on."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


def render_chat_template(source: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
    """The prompt for ``messages`` (each with ``role`` and ``content``); ``variables`` are visible to the template.

    Raises ValueError for a template that does not parse, that fails, or that refuses the messages.
    """
    try:
        return _compile(source).render(messages=messages, **variables)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid Jinja (line {error.lineno}): {error.message}") from error
    except _RefusedError as error:
        raise ValueError(f"the chat template refused the messages: {error.message}") from error
    except Exception as error:  # A template is a foreign program: it can fail with anything.
        raise ValueError(f"the chat template failed on these messages: {error}") from error


class _RefusedError(jinja2.TemplateError):
    pass


class _GenerationTag(Extension):
    """``{% generation %}…{% endgeneration %}`` marks the assistant's text for training; here it only renders it."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML, which would corrupt a prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> str:
    raise _RefusedError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
