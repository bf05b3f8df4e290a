# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness's model interface with a memory; subclasses compute the answers.

``Backend`` is a loaded model that evaluations run on: our engine, replicas of it, or another engine.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from wedlm.engine.sampling_params import SamplingParams
from wedlm.evaluate.answer_log import Answer, AnswerLog
from wedlm.evaluate.provenance import ModelProvenance
from wedlm.model import Tokenizer

# Options of a task's generation_kwargs that are understood; until_chat replaces until under a chat template, and
# window_size is the widest window of streaming and block decoding.
_GENERATION_OPTIONS = {
    "until",
    "until_chat",
    "max_gen_toks",
    "temperature",
    "do_sample",
    "top_p",
    "top_k",
    "window_size",
}


class StopEvaluation(Exception):
    """Raised to leave the harness before it scores: all answers are in the logs, and scores were not requested."""


@dataclass(frozen=True)
class GenerationSettings:
    """How a model answers.

    ``params``: decoding of generated answers; a task's generation_kwargs override it. ``chat``: prompts arrive rendered
    by the chat template. ``log_of``: the log of a task; answers found there are not computed again, and every new one
    is kept there; None keeps them in memory. ``progress`` is called with a task and the number of its answers so far.
    ``answers_only``: raise ``StopEvaluation`` instead of returning answers.
    """

    params: SamplingParams
    chat: bool = False
    log_of: Callable[[str], AnswerLog] | None = None
    progress: Callable[[str, int, int], None] = lambda *_: None
    answers_only: bool = False


class Backend(Protocol):
    """A loaded model on some engine."""

    @property
    def provenance(self) -> ModelProvenance: ...

    @property
    def max_length(self) -> int:
        """The longest prompt and answer together, in tokens."""
        ...

    @property
    def environment(self) -> Answer:
        """Versions and machine."""
        ...

    def lm(self, generation: GenerationSettings) -> "CachingLM": ...


class CachingLM(TemplateLM):
    """Takes answers from logs, and new ones from ``answer`` and ``score`` of a subclass.

    ``eos_token_id``: the model's; ``max_length``: the longest prompt and answer together, in tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, eos_token_id: int, max_length: int, generation: GenerationSettings
    ) -> None:
        super().__init__()
        self.tokenizer, self.eos_token_id, self.max_length, self.generation = (
            tokenizer,
            eos_token_id,
            max_length,
            generation,
        )
        self._totals: dict[str, int] = {}
        self._logs: dict[str, AnswerLog] = {}
        self._log_of = generation.log_of or (lambda task: self._logs.setdefault(task, AnswerLog()))

    @abstractmethod
    def answer(self, requests: Sequence[Instance]) -> Iterator[tuple[Instance, Answer]]:
        """Yield entries of generated answers, in any order."""

    @abstractmethod
    def score(self, requests: Sequence[Instance]) -> Iterator[tuple[Instance, Answer]]:
        """Yield entries of likelihoods, in any order."""

    @property
    def tokenizer_name(self) -> str:
        return type(self.tokenizer).__name__

    @property
    def eot_token_id(self) -> int:
        return self.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: the BOS token, or an end token."""
        bos = self.tokenizer.special_tokens.get("bos_token")
        token = None if bos is None else self.tokenizer.token_id(bos)
        return self.eot_token_id if token is None else token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = self._takes_special_tokens(string)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The texts of the answers. Requests that are not in a log are answered together."""
        for request, entry in self.answer(self._start(requests)):
            self._keep(request, entry)
        return [entry["text"] for entry in self._all_known(requests)]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would write it."""
        for request, entry in self.score(self._start(requests)):
            self._keep(request, entry)
        return [(entry["logprob"], entry["greedy"]) for entry in self._all_known(requests)]

    def prepare(self, request: Instance) -> tuple[list[int], SamplingParams, bool]:
        """The prompt, the parameters, and whether the prompt had to lose its beginning to leave room for the answer."""
        context, options = request.args
        params = self._sampling_params(dict(options))
        ids = self.tok_encode(context, add_special_tokens=False if self.generation.chat else None)
        room = self.max_length - params.max_tokens
        if room < 1:
            length = room + params.max_tokens
            raise ValueError(f"max_tokens is {params.max_tokens}; expected less than the model's length, {length}")
        return ids[-room:], params, len(ids) > room

    def _sampling_params(self, options: dict[str, Any]) -> SamplingParams:
        unknown = set(options) - _GENERATION_OPTIONS
        if unknown:
            raise ValueError(
                f"generation_kwargs has {', '.join(sorted(unknown))}; expected some of {sorted(_GENERATION_OPTIONS)}"
            )
        stop = options.get("until_chat", options.get("until")) if self.generation.chat else options.get("until")
        changes: dict[str, Any] = {"stop": stop or None}
        if options.get("do_sample") is False:
            changes["temperature"] = 0.0
        elif "temperature" in options:
            changes["temperature"] = float(options["temperature"])
        if "max_gen_toks" in options:
            changes["max_tokens"] = int(options["max_gen_toks"])
        changes |= {name: options[name] for name in ("top_p", "top_k") if name in options}
        asked = self.generation.params
        if (
            "window_size" in options
            and asked.decoding in ("streaming", "block")
            and asked.wedlm_window_size is not None
        ):
            changes["wedlm_window_size"] = min(asked.wedlm_window_size, options["window_size"])
        return replace(self.generation.params, **changes)

    def pairs(self, requests: Sequence[Instance]) -> list[tuple[list[int], list[int]]]:
        """Token ids of contexts and continuations, split as the harness does; every text is encoded once."""
        halves = []
        for context, continuation in (request.args for request in requests):
            kept = context.rstrip()  # spaces at a context's end belong to the continuation's first token
            halves.append((kept, context[len(kept) :] + continuation))
        texts = dict.fromkeys(text for context, rest in halves if context for text in (context + rest, context))
        ids = dict(zip(texts, self._encode_all(list(texts)), strict=True))
        found = []
        for context, rest in halves:
            if context:
                head = ids[context]
                found.append((head, ids[context + rest][len(head) :]))
                continue
            alone = self.tok_encode(rest, add_special_tokens=False)
            begins = alone[:1] == [self.prefix_token_id]
            found.append((alone[:1], alone[1:]) if begins else ([self.prefix_token_id], alone))
        return found

    def _encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = [[]] * len(texts)
        for special in (False, True):
            chosen = [index for index, text in enumerate(texts) if self._takes_special_tokens(text) is special]
            encoded = self.tokenizer.encode_batch([texts[index] for index in chosen], add_special_tokens=special)
            for index, ids in zip(chosen, encoded, strict=True):
                found[index] = ids
        return found

    def _takes_special_tokens(self, text: str) -> bool:
        """Whether to add special tokens to the text: not if it already has its BOS."""
        bos = self.tokenizer.special_tokens.get("bos_token")
        return not (bos and text.startswith(bos))

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("loglikelihood does not use this method")

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        raise NotImplementedError("no task asks for the likelihood of whole texts")

    def _entry(self, request: Instance) -> Answer | None:
        return self._log(request).find(*_place(request))

    def _all_known(self, requests: Sequence[Instance]) -> list[Answer]:
        """Entries of requests that have all been answered. Raises ``StopEvaluation`` if they should not be scored."""
        if self.generation.answers_only:
            raise StopEvaluation
        entries = [self._entry(request) for request in requests]
        assert all(entry is not None for entry in entries), "every request has been answered"
        return entries  # type: ignore[return-value]

    def _log(self, request: Instance) -> AnswerLog:
        return self._log_of(request.task_name or "")

    def _start(self, requests: Sequence[Instance]) -> list[Instance]:
        """The requests that are not in a log; time counts from here."""
        for request in requests:
            self._log(request).start()
        self._totals = dict(Counter(request.task_name or "" for request in requests))
        for name in self._totals:
            self._report(name)
        return [request for request in requests if self._entry(request) is None]

    def _keep(self, request: Instance, entry: Answer) -> None:
        self._log(request).add(*_place(request), entry)
        self._report(request.task_name or "")

    def _report(self, name: str) -> None:
        self.generation.progress(name, len(self._log_of(name).entries), self._totals[name])


def _place(request: Instance) -> tuple[int, int]:
    """The place of a request in its task."""
    assert request.doc_id is not None
    return request.doc_id, request.idx
