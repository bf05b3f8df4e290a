# SPDX-License-Identifier: Apache-2.0
"""Grammars over the tokens of a tokenizer, through llguidance (extra ``serve``), imported when one is asked for."""

import functools
import json
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from wedlm.engine.constraints.one_of import check_one_of
from wedlm.engine.sampling_params import SamplingParams
from wedlm.model import Tokenizer

_CACHED_GRAMMARS = 64
# One optional space wherever JSON may have white space: a weak model cannot go on with blanks for ever. oneOf is taken
# for anyOf, after ``check_one_of`` has found that it is the same: llguidance's own proof does not follow references.
_JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": "[ ]?", "lenient": False, "coerce_one_of": True}


class Matcher(Protocol):
    """A grammar, and how far some text has come in it. Knows text tokens only; what ends the text is not its business.

    A matcher that gave up on its own limits of work is ``failed`` and refuses everything, until the tokens on whose way
    it did so are taken back.
    """

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, [vocabulary]."""

    def advance(self, token: int) -> bool:
        """Go on by a token; False, with nothing changed, if it may not come next."""

    def rewind(self, count: int) -> None:
        """Take the last ``count`` tokens back."""

    @property
    def accepting(self) -> bool:
        """Whether the text may end here."""

    @property
    def complete(self) -> bool:
        """Whether it may end here and nothing may follow."""

    @property
    def failed(self) -> bool: ...


@functools.lru_cache(maxsize=4)
def grammars_of(tokenizer: Tokenizer, vocab_size: int) -> "Grammars":
    """The grammars of a tokenizer, whose tables take a fraction of a second to make, for as long as it lives."""
    return Grammars(tokenizer, vocab_size)


class Grammars:
    """Compiles grammars; may be used by several threads. ``vocab_size`` is the model's, which may be padded."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """ValueError if llguidance is missing, or cannot read the tokenizer."""
        self.vocab_size = vocab_size
        library = _library()
        try:
            size = max(vocab_size, tokenizer.vocab_size)
            self._tokens = library.LLTokenizer(tokenizer.backend.to_str(), n_vocab=size)
        except Exception as error:  # The Rust library raises plain Exception.
            raise ValueError(f"this model's tokenizer has no grammars: {_sentence(error)}") from error
        self._compile = functools.lru_cache(maxsize=_CACHED_GRAMMARS)(self._compile_new)

    def matcher(self, params: SamplingParams) -> Matcher:
        """A matcher at the beginning of the text. ValueError, naming the field, if the grammar is none."""
        schema = params.json_schema
        assert not isinstance(schema, dict), "SamplingParams keeps schemas as text"
        return LibraryMatcher(self._compile(schema, params.grammar), self.vocab_size)

    def _compile_new(self, schema: str | None, grammar: str | None) -> Any:
        library, name = _library(), "grammar" if schema is None else "json_schema"
        try:
            if schema is not None:
                check_one_of(json.loads(schema))
                source = library.LLMatcher.grammar_from_json_schema(schema, overrides=_JSON_OPTIONS)
            else:
                source = library.LLMatcher.grammar_from_lark(grammar)
        except ValueError as error:
            raise ValueError(f"{name} is not usable: {_sentence(error)}") from error
        limits = library.LLParserLimits(verbose_errors=False)
        matcher = library.LLMatcher(self._tokens, source, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # some limits are met only here; and copies share what it has found out
        if "NoExtension" in (matcher.stop_reason() + matcher.get_error()):
            raise ValueError(f"{name} is not usable: it admits no text of at least one token")
        if matcher.is_error():
            raise ValueError(f"{name} is not usable: {_sentence(matcher.get_error())}")
        return matcher


class LibraryMatcher:
    """llguidance's matcher as a ``Matcher``; starts from a copy of ``beginning``, which it leaves alone."""

    def __init__(self, beginning: Any, vocab_size: int) -> None:
        self._beginning, self._vocab_size = beginning, vocab_size
        self._matcher = beginning.deep_copy()
        self._tokens: list[int] = []

    def allowed(self) -> NDArray[np.bool_]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(np.bool_)

    def advance(self, token: int) -> bool:
        moved = self._matcher.try_consume_tokens([token]) == 1
        if moved:
            self._tokens.append(token)
        return moved

    def rewind(self, count: int) -> None:
        if not count:
            return
        del self._tokens[len(self._tokens) - count :]
        if not self.failed:
            self._matcher.rollback(count)
            return
        # It failed on a way that was only tried, and it never leaves that state.
        self._matcher = self._beginning.deep_copy()
        self._matcher.try_consume_tokens(self._tokens)

    @property
    def accepting(self) -> bool:
        return not self.failed and self._matcher.is_accepting()

    @property
    def complete(self) -> bool:
        return self.accepting and self._matcher.is_stopped()

    @property
    def failed(self) -> bool:
        return self._matcher.is_error()


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ValueError(
            "json_schema and grammar need the package llguidance; expected pip install 'wedlm[serve]'"
        ) from error
    return llguidance


def _sentence(error: object) -> str:
    """The first line of a report; of one that quotes a pattern, the reason, which comes after the quotation."""
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    reasons = [line.removeprefix("error: ") for line in more if line.startswith("error: ")]
    return (f"{first.rstrip(':')}: {reasons[0]}" if reasons else first)[:200]
