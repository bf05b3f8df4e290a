# SPDX-License-Identifier: Apache-2.0
"""What a user may ask of one request, checked on construction."""

import json
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from numbers import Integral, Real

from wedlm.algorithm.params import (
    DECODINGS,
    NEXT_TOKENS,
    REMASKINGS,
    DecodeParams,
    Decoding,
    NextToken,
    Remasking,
)

MAX_LOGPROBS = 20
MAX_BIASES = 1024
GAP = 16  # positions, where no number is asked for; a completion has as many tokens
GAP_DECODINGS = ("streaming", "block")  # that fill a gap before a suffix
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
MAX_GRAMMAR_CHARACTERS, MAX_SCHEMA_DEPTH = 65536, 64
_MAX_SALT = 1024
_LARGEST = 1e30  # what is multiplied with or divided by must stay finite in float32: inf · 0 and inf / inf are nan


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The options of one request. Every value is checked on construction (ValueError naming field, value and
    expectation). The first eight, in this order, may be given by position, as in the original implementation.

    * ``temperature``: 0 takes the most probable token. Otherwise tokens are sampled after min_p, top_k, then top_p,
      then temperature.
    * ``top_p``: keep the smallest set of tokens with this probability mass.
    * ``top_k``: keep the k most probable tokens; 0 or -1 keeps all.
    * ``max_tokens``: the largest number of tokens of the answer; the model's length limits it, too.
    * ``stop_token_ids``: end tokens in addition to the checkpoint's own.
    * ``stop``: strings that end the text. They are removed from it, unless ``include_stop_str_in_output`` is set.
    * ``wedlm_entropy_threshold``: τ in nats; None fills one position per step.
    * ``wedlm_pos_penalty_factor``: λ, nats per position.
    * ``min_p``: drop tokens whose probability is less than this share of the most probable one's.
    * ``min_tokens``: the answer does not end before this many tokens.
    * ``ignore_eos``: continue after the checkpoint's end tokens.
    * ``seed``: the same seed gives the same text; None draws one.
    * ``logprobs``: report the log-probability of each token and of this many most probable ones (0 to 20). They are
      always those of the model's own distribution, before biases, penalties and grammars.
    * ``logit_bias``: token id -> number from -100 to 100, which is added to its logit.
    * ``presence_penalty``, ``frequency_penalty``: subtracted from the logit of a token that the output contains, the
      second once for each time.
    * ``repetition_penalty``: if prompt or output contain a token, its logit is divided by this where positive, and
      multiplied by it elsewhere.
    * ``json_schema``: a JSON schema as a dict or as text; the output is JSON that it admits. Needs the serve extra.
    * ``grammar``: a context-free grammar that the output follows, in llguidance's Lark syntax or as EBNF with ::=
      (GBNF, whose first rule is root). Needs the serve extra.
    * ``cache_salt``: share keys through the prefix cache only with requests that have the same salt.
    * ``priority``: with the engine option ``scheduling_policy="priority"``, requests with a lower number run first.
    * ``decoding``: "auto", "streaming", "verified", "block" or "autoregressive"; None takes the engine's default.
    * ``wedlm_window_size``: W of streaming and block decoding, or the most rows per step of verified and auto; None
      takes the engine's.
    * ``wedlm_next_token``: what decides the leftmost masked position in streaming. "masked" takes its own row, once
      that is sure enough (the paper's rule). "causal" takes, in each step, the row of the token before it, as in AR
      decoding, so that each forward gives at least one token. None takes the checkpoint's. A gap is always filled by
      "masked".
    * ``remasking_strategy``: which positions block decoding fills. "entropy" goes by τ and λ. "low_confidence_static"
      fills the positions whose tokens are most probable, and "low_confidence_dynamic" all whose probability is above
      ``confidence_threshold``, but at least as many as the former. None takes the model's.
    * ``denoising_steps``: the most steps that these two take for a block; None means one per position.
    * ``wedlm_draft_entropy``: verified decoding drafts up to the first masked row whose entropy reaches this (nats).
    * ``wedlm_lookup_drafts``: the most drafts per step, never above 63, that come from prompt and output, where these
      continue as they did before. Verified decoding uses them in place of masked rows' drafts whenever it finds some,
      auto if they pay off; 0 turns them off. None takes the engine's default: as many as the window has rows for in
      auto, and none in verified decoding, unless the model has no masked rows.
    * ``suffix_token_ids``: known tokens after the answer. The answer fills the gap of ``max_tokens`` positions between
      the prompt and them, or the part of it that an end token closes (docs/infilling.md), by streaming or block
      decoding. If ``decoding`` is None and the engine's default is another mode, streaming fills it.
    """

    temperature: float = DecodeParams.temperature
    top_p: float = DecodeParams.top_p
    top_k: int = DecodeParams.top_k
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] | list[int] | None = None
    stop: str | tuple[str, ...] | list[str] | None = None
    wedlm_entropy_threshold: float | None = DecodeParams.entropy_threshold
    wedlm_pos_penalty_factor: float = DecodeParams.pos_penalty
    _: KW_ONLY
    min_p: float = 0.0
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    json_schema: str | dict | None = None
    grammar: str | None = None
    cache_salt: str = ""
    priority: int = 0
    decoding: Decoding | None = None
    wedlm_window_size: int | None = None
    wedlm_next_token: NextToken | None = None
    remasking_strategy: Remasking | None = None
    confidence_threshold: float = DecodeParams.confidence_threshold
    denoising_steps: int | None = DecodeParams.denoising_steps
    wedlm_draft_entropy: float = DecodeParams.draft_entropy
    wedlm_lookup_drafts: int | None = None
    suffix_token_ids: tuple[int, ...] | list[int] | None = None

    def __post_init__(self) -> None:
        self._set("temperature", _number("temperature", self.temperature, high=_LARGEST))
        if self.top_p == 0 and not isinstance(self.top_p, bool):
            raise ValueError(f"top_p is {self.top_p!r}; expected a number > 0 and <= 1")
        self._set("top_p", _number("top_p", self.top_p, high=1.0))
        self._set("top_k", _integer("top_k", self.top_k, low=-1))
        self._set("max_tokens", _integer("max_tokens", self.max_tokens, low=1))
        self._set("min_tokens", _integer("min_tokens", self.min_tokens, low=0))
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}; expected at most max_tokens, {self.max_tokens}")
        self._set("stop", _strings("stop", self.stop))
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        self._set("min_p", _number("min_p", self.min_p, high=1.0))
        for name in ("ignore_eos", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected True or False")
        if not isinstance(self.cache_salt, str) or len(self.cache_salt) > _MAX_SALT:
            raise ValueError(f"cache_salt is {self.cache_salt!r:.80}; expected at most {_MAX_SALT} characters")
        self._set("priority", _integer("priority", self.priority, low=-(2**31)))
        if self.seed is not None:
            self._set("seed", _integer("seed", self.seed, low=-(2**63), high=2**63 - 1))
        if self.logprobs is not None:
            self._set("logprobs", _integer("logprobs", self.logprobs, low=0, high=MAX_LOGPROBS))
        self._set("logit_bias", _biases("logit_bias", self.logit_bias))
        for name in ("presence_penalty", "frequency_penalty"):
            self._set(name, _number(name, getattr(self, name), low=-2.0, high=2.0))
        self._set("repetition_penalty", _number("repetition_penalty", self.repetition_penalty, low=0.01, high=100.0))
        self._set("json_schema", _schema("json_schema", self.json_schema))
        if self.grammar is not None and not (isinstance(self.grammar, str) and self.grammar.strip()):
            raise ValueError(f"grammar is {self.grammar!r}; expected the text of a grammar")
        if self.grammar is not None and len(self.grammar) > MAX_GRAMMAR_CHARACTERS:
            raise ValueError(f"grammar has {len(self.grammar)} characters; expected at most {MAX_GRAMMAR_CHARACTERS}")
        if self.grammar is not None and self.json_schema is not None:
            raise ValueError("grammar is set and so is json_schema; expected one of them")
        if self.decoding is not None and self.decoding not in DECODINGS:
            raise ValueError(f"decoding is {self.decoding!r}; expected one of {', '.join(DECODINGS)}")
        if self.remasking_strategy is not None and self.remasking_strategy not in REMASKINGS:
            raise ValueError(
                f"remasking_strategy is {self.remasking_strategy!r}; expected one of {', '.join(REMASKINGS)}"
            )
        confidence = _number("confidence_threshold", self.confidence_threshold, high=1.0)
        self._set("confidence_threshold", confidence)
        if self.denoising_steps is not None:
            self._set("denoising_steps", _integer("denoising_steps", self.denoising_steps, low=1))
        if self.wedlm_window_size is not None:
            self._set("wedlm_window_size", _integer("wedlm_window_size", self.wedlm_window_size, low=1))
        if self.wedlm_entropy_threshold is not None:
            self._set("wedlm_entropy_threshold", _number("wedlm_entropy_threshold", self.wedlm_entropy_threshold))
        penalty = _number("wedlm_pos_penalty_factor", self.wedlm_pos_penalty_factor, high=_LARGEST)
        self._set("wedlm_pos_penalty_factor", penalty)
        if self.wedlm_next_token is not None and self.wedlm_next_token not in NEXT_TOKENS:
            names = " or ".join(NEXT_TOKENS)
            raise ValueError(f"wedlm_next_token is {self.wedlm_next_token!r}; expected {names}")
        self._set("wedlm_draft_entropy", _number("wedlm_draft_entropy", self.wedlm_draft_entropy))
        if self.wedlm_lookup_drafts is not None:
            self._set("wedlm_lookup_drafts", _integer("wedlm_lookup_drafts", self.wedlm_lookup_drafts, low=0))
        self._set("suffix_token_ids", _token_ids("suffix_token_ids", self.suffix_token_ids))
        if self.suffix_token_ids and self.decoding not in (None, *GAP_DECODINGS):
            raise ValueError(
                f"decoding is {self.decoding!r}, whose text is AR's, which sees no suffix; expected "
                f"{' or '.join(GAP_DECODINGS)} to fill a gap"
            )

    def decoding_of(self, default: Decoding) -> Decoding:
        """The decoding mode, given the engine's ``default``."""
        decoding = self.decoding or default
        return "streaming" if self.suffix_token_ids and decoding not in GAP_DECODINGS else decoding

    def _set(self, name: str, value: object) -> None:
        """Store the checked value as a plain Python number or tuple, whatever type the user gave."""
        object.__setattr__(self, name, value)


def _number(name: str, value: object, low: float = 0.0, high: float = math.inf) -> float:
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        number = math.nan
    if not low <= number <= high:
        upper = "" if high == math.inf else f" and <= {high:g}"
        raise ValueError(f"{name} is {value!r}; expected a number >= {low:g}{upper}")
    return number


def _integer(name: str, value: object, low: int, high: int = 2**31 - 1) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or not low <= int(value) <= high:
        raise ValueError(f"{name} is {value!r}; expected an integer >= {low} and <= {high}")
    return int(value)


def _strings(name: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, str | list | tuple | None):
        raise ValueError(f"{name} is {value!r}; expected a string or a list of strings")
    strings = (value,) if isinstance(value, str) else tuple(value or ())
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(f"{name} contains {string!r}; expected non-empty strings")
    return strings


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple | None):
        raise ValueError(f"{name} is {value!r}; expected a list of token ids")
    return tuple(_integer(name, token, low=0) for token in value or ())


def _biases(name: str, value: object) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {value!r}; expected token ids with numbers from -100 to 100")
    if len(value) > MAX_BIASES:
        raise ValueError(f"{name} has {len(value)} entries; expected at most {MAX_BIASES}")
    return {
        _integer(name, token, low=0): _number(f"{name}[{token}]", bias, low=-100.0, high=100.0)
        for token, bias in value.items()
    }


def _schema(name: str, value: object) -> str | None:
    """The schema as JSON text, with its keys in the order given, because the output has its properties in
    that order."""
    if value is None:
        return None
    try:
        schema = json.loads(value) if isinstance(value, str) else value
        deep = not depth_within(schema, MAX_SCHEMA_DEPTH)
        # Piece by piece: a megabyte in one call would keep all other threads waiting.
        text = "" if deep else "".join(_ENCODER.iterencode(schema))
    except (ValueError, TypeError, RecursionError):
        text, deep, schema = "", False, None
    if deep:
        raise ValueError(f"{name} is nested more than {MAX_SCHEMA_DEPTH} deep; expected at most that")
    if not isinstance(schema, dict):
        shown = value if not isinstance(value, str) or len(value) <= 80 else value[:80] + "..."
        raise ValueError(f"{name} is {shown!r}; expected a JSON schema, which is an object")
    if len(text) > MAX_GRAMMAR_CHARACTERS:
        raise ValueError(f"{name} has {len(text)} characters; expected at most {MAX_GRAMMAR_CHARACTERS}")
    return text


def depth_within(value: object, limit: int) -> bool:
    """Whether a JSON value is nested at most ``limit`` deep."""
    if not isinstance(value, dict | list):
        return True
    return limit > 0 and all(depth_within(v, limit - 1) for v in (value.values() if isinstance(value, dict) else value))
