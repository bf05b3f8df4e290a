# SPDX-License-Identifier: Apache-2.0
"""What a user may ask of one request, checked where it is made."""

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
    """Options of one request; every value is checked on construction (ValueError naming field, value, expectation).
    The first eight, in this order, may be given by position, as in the original implementation.

    temperature: 0 takes the most probable token; otherwise sampled after min_p, top_k, then top_p, then temperature.
    top_k: keep the k most probable tokens; 0 or -1 keeps all. top_p: keep the smallest set with this probability mass.
    min_p: drop tokens whose probability is less than this share of the most probable one's.
    max_tokens: cut of the output; the model's length cuts too. min_tokens: no end before this many tokens.
    stop: strings that end the text; they are removed from it, save with include_stop_str_in_output.
    stop_token_ids: end tokens besides the checkpoint's own. ignore_eos: go on after the checkpoint's end tokens.
    seed: same seed, same text; None draws one.
    logprobs: report the log-probability of each token and of this many most probable ones (0 to 20), always of the
    model's own distribution, before any of the following. repetition_penalty: the logit of a token that prompt or
    output have is divided by it where positive, and multiplied elsewhere. logit_bias: token id -> number from -100 to
    100, added to its logit. presence_penalty, frequency_penalty: subtracted from the logit of a token that the output
    has, and once for each time that it has it. json_schema: a JSON schema as a dict or as text; the output is JSON that
    it admits. grammar: a context-free grammar that the output keeps to, in llguidance's Lark syntax or as EBNF with
    ::= (GBNF, whose first rule is root). Both need the serve extra.
    cache_salt: keys are shared through the prefix cache only with requests of the same one.
    priority: where the engine's scheduling_policy is "priority", requests with a lower number run first.
    decoding: "auto", "streaming", "verified", "block" or "autoregressive"; None is the engine's default.
    wedlm_window_size: W of streaming and block decoding, most rows a step of verified and auto; None is the engine's.
    wedlm_entropy_threshold: τ in nats; None fills one position a step. wedlm_pos_penalty_factor: λ, nats per position.
    wedlm_next_token: "masked" or "causal"; None is the checkpoint's. Streaming only: what decides the leftmost masked
    position. "masked": its own row, once it is sure enough (the paper's rule); "causal": in each step the row of the
    token before it, as in AR decoding, so that each forward gives at least one token. A gap is always filled "masked".
    remasking_strategy: which positions block decoding fills: "entropy" (by τ and λ), or by the probability of their
    tokens, "low_confidence_static" (the highest) or "low_confidence_dynamic" (all above confidence_threshold, at least
    as many as the former); None is the model's. denoising_steps: most steps that these two take for a block; None is
    one a position.
    wedlm_draft_entropy: verified decoding drafts up to the first masked row whose entropy reaches this (nats).
    wedlm_lookup_drafts: most drafts a step that come from prompt and output, where these go on as they did before: in
    verified decoding in place of masked rows' whenever there are some, in auto if they pay; 0: none. None is the
    engine's: as many as the window has rows for in auto, and in verified decoding none, unless the model has no masked
    rows. Never above 63.
    suffix_token_ids: known tokens after the answer, which fills the gap of max_tokens positions between the prompt and
    them, or a part of it that an end token closes (docs/infilling.md). By streaming or block decoding; where decoding
    is None and the engine's default is another, by streaming.
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
            raise ValueError("grammar is set beside json_schema; expected one of them")
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
        """The mode, where ``default`` is the engine's."""
        decoding = self.decoding or default
        return "streaming" if self.suffix_token_ids and decoding not in GAP_DECODINGS else decoding

    def _set(self, name: str, value: object) -> None:
        """Store the checked value: a plain Python number or tuple, whatever kind the user gave."""
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
    """The schema as JSON text, its keys in the order given: output has properties in that order."""
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
    """Whether what JSON holds is nested at most ``limit`` deep."""
    if not isinstance(value, dict | list):
        return True
    return limit > 0 and all(depth_within(v, limit - 1) for v in (value.values() if isinstance(value, dict) else value))
