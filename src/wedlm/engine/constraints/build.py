# SPDX-License-Identifier: Apache-2.0
"""Compile grammars with llguidance (extra ``serve``), which is imported when one is needed. The server's process and
the worker that tries a grammar first (``trial_worker.py``) share this module, so it imports nothing large."""

import json
import re
from typing import Any

# One optional space wherever JSON may have white space: a weak model cannot write blanks forever. oneOf is taken
# for anyOf, after ``check_one_of`` has found that it is the same: llguidance's own proof does not follow references.
_JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": "[ ]?", "lenient": False, "coerce_one_of": True}
# At 1 to 2 kB each: what a grammar may come to hold while text is generated. The steps' own limits, about 15 ms of
# work for a mask, are llguidance's defaults.
_MAX_LEXER_STATES = 50_000
_EBNF = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)


def library() -> Any:
    """The module llguidance. Raises ValueError if it is missing."""
    try:
        import llguidance
    except ImportError as error:
        raise ValueError(
            "json_schema and grammar need the package llguidance; expected pip install 'wedlm[serve]'"
        ) from error
    return llguidance


def load_tokens(tokenizer_json: str, vocab_size: int) -> Any:
    """Make llguidance's tables of a tokenizer. Raises ValueError if it cannot read the tokenizer."""
    try:
        tokens = library().LLTokenizer(tokenizer_json, n_vocab=vocab_size)
        special = [one["id"] for one in json.loads(tokenizer_json)["added_tokens"] if one["special"]]
        if special and tokens.eos_token not in special:
            # It knows no end token by its name and takes the first token of all, a piece of text, which it would then
            # both admit and refuse. Which one ends the text is our business; any that is no text will do.
            return library().LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=special[0])
        return tokens
    except ValueError:
        raise
    except Exception as error:  # The Rust library raises plain Exception.
        raise ValueError(f"this model's tokenizer cannot be used with grammars: {sentence(error)}") from error


def build(tokens: Any, schema: str | None, grammar: str | None) -> Any:
    """Compile a JSON schema or a grammar, in Lark's syntax or as EBNF, to llguidance's matcher and compute its first
    mask. Raises ValueError for an invalid one.

    Takes as much time and memory as it needs, so only the worker calls this with something that was not tried before.
    """
    matchers = library().LLMatcher
    if schema is not None:
        source = matchers.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
    else:
        source = matchers.grammar_from_lark(_lark(grammar))
    limits = library().LLParserLimits(verbose_errors=False, max_lexer_states=_MAX_LEXER_STATES)
    matcher = matchers(tokens, source, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()  # some limits are met only here; and copies share what it has found out
    if "NoExtension" in (matcher.stop_reason() + matcher.get_error()):
        raise ValueError("it admits no text of at least one token")
    if matcher.is_error():
        raise ValueError(sentence(matcher.get_error()))
    return matcher


def _lark(grammar: str | None) -> str | None:
    if grammar is None or not _EBNF.search(grammar):
        return grammar
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(grammar)
    except Exception as error:
        raise ValueError(f"it is not valid EBNF: {sentence(error)}") from error


def sentence(error: object) -> str:
    """The first line of an error. If it quotes a pattern, the reason, which comes after the quotation."""
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    reasons = [line.removeprefix("error: ") for line in more if line.startswith("error: ")]
    return (f"{first.rstrip(':')}: {reasons[0]}" if reasons else first)[:200]
