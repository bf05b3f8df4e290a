# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness's model interface over our engine, in the same process."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from wedlm.engine.outputs import GenerationOutput
from wedlm.engine.sampling_params import SamplingParams
from wedlm.evaluate.journal import Entry, Journal
from wedlm.evaluate.likelihood import LikelihoodScorer

if TYPE_CHECKING:
    from wedlm.engine.llm import LLM

# Options of a task's generation_kwargs that are understood; until_chat replaces until under a chat template.
_GENERATION_OPTIONS = {"until", "until_chat", "max_gen_toks", "temperature", "do_sample", "top_p", "top_k"}


class Answered(Exception):
    """All answers are in the journals, and no more was asked for: how ``EngineLM`` leaves the harness unscored."""


class EngineLM(TemplateLM):
    """An ``LLM`` as the harness's model.

    ``params``: decoding of generated answers; what a task's generation_kwargs say goes before it. ``chat``: prompts
    come rendered by the chat template. ``journal_of``: the journal of a task; answers found there are not computed
    again, and every new one is kept there. ``progress`` is called with a task and how many of its answers there are.
    ``answers_only``: raise ``Answered`` instead of returning answers.
    """

    def __init__(
        self,
        llm: "LLM",
        params: SamplingParams | None = None,
        chat: bool = False,
        journal_of: Callable[[str], Journal] | None = None,
        progress: Callable[[str, int, int], None] = lambda *_: None,
        answers_only: bool = False,
    ) -> None:
        super().__init__()
        self.answers_only = answers_only
        self.llm, self.params, self.chat, self.progress = llm, params or SamplingParams(), chat, progress
        self.scorer = LikelihoodScorer(llm)
        self._totals: dict[str, int] = {}
        self._journals: dict[str, Journal] = {}
        self._journal_of = journal_of or (lambda task: self._journals.setdefault(task, Journal()))

    @property
    def tokenizer_name(self) -> str:
        return type(self.llm.tokenizer).__name__

    @property
    def eot_token_id(self) -> int:
        return self.llm.model_config.eos_token_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the BOS token, or an end token."""
        bos = self.llm.tokenizer.special_tokens.get("bos_token")
        token = None if bos is None else self.llm.tokenizer.token_id(bos)
        return self.eot_token_id if token is None else token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            bos = self.llm.tokenizer.special_tokens.get("bos_token")
            add_special_tokens = not (bos and string.startswith(bos))
        return self.llm.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.llm.tokenizer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts of the answers. All requests that no journal knows are given to the engine at once."""
        open_requests = self._start(requests)
        prepared = [self._prepare(request) for request in open_requests]
        for request, output, truncated in self._generate(open_requests, prepared):
            assert output.stats is not None
            self._keep(
                request,
                {
                    "text": output.text,
                    "token_ids": output.token_ids,
                    "token_steps": output.token_steps,
                    "finish_reason": output.finish_reason,
                    "forwards": output.stats.num_forwards,
                    "rows": output.stats.num_rows,
                    "prompt_tokens": output.stats.num_prompt_tokens,
                    "truncated": truncated,
                },
            )
        return [entry["text"] for entry in self._all_known(requests)]

    def _generate(
        self, requests: Sequence[Instance], prepared: Sequence[tuple[list[int], SamplingParams, bool]]
    ) -> Iterator[tuple[Instance, GenerationOutput, bool]]:
        """Outputs in the requests' order. All run together: reading one stream steps the engine for everybody."""
        streams = [self.llm.generate_stream(ids, params) for ids, params, _ in prepared]
        try:
            for request, stream, (_, _, truncated) in zip(requests, streams, prepared, strict=True):
                output = None
                for piece in stream:
                    output = piece.output
                assert output is not None, "the last piece of a stream carries the output"
                yield request, output, truncated
        finally:
            for stream in streams:
                stream.close()  # type: ignore[attr-defined]

    def _prepare(self, request: Instance) -> tuple[list[int], SamplingParams, bool]:
        """Prompt, parameters, and whether the prompt had to lose its beginning to leave room for the answer."""
        context, options = request.args
        params = self._sampling_params(dict(options))
        ids = self.tok_encode(context, add_special_tokens=False if self.chat else None)
        room = self.llm.engine.config.max_model_len - params.max_tokens
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
        stop = options.get("until_chat", options.get("until")) if self.chat else options.get("until")
        changes: dict[str, Any] = {"stop": stop or None}
        if options.get("do_sample") is False:
            changes["temperature"] = 0.0
        elif "temperature" in options:
            changes["temperature"] = float(options["temperature"])
        if "max_gen_toks" in options:
            changes["max_tokens"] = int(options["max_gen_toks"])
        changes |= {name: options[name] for name in ("top_p", "top_k") if name in options}
        return replace(self.params, **changes)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would write it."""
        open_requests = self._start(requests)
        pairs = [self._pair(*request.args) for request in open_requests]
        stats, told = self.scorer.stats, replace(self.scorer.stats)
        for index, score in self.scorer.score(pairs):
            entry = {
                "logprob": score.logprob,
                "greedy": score.greedy,
                "computed": stats.num_computed_tokens - told.num_computed_tokens,
                "reused": stats.num_reused_tokens - told.num_reused_tokens,
            }
            told = replace(stats)
            self._keep(open_requests[index], entry)
        return [(entry["logprob"], entry["greedy"]) for entry in self._all_known(requests)]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids as the harness splits them."""
        if context:
            return self._encode_pair(context, continuation)
        ids = self.tok_encode(continuation, add_special_tokens=False)
        return ([self.prefix_token_id], ids) if ids[:1] != [self.prefix_token_id] else (ids[:1], ids[1:])

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        scores = dict(self.scorer.score([(context, continuation) for _, context, continuation in requests]))
        return [(scores[index].logprob, scores[index].greedy) for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of whole texts, in windows of the model's length that predict each token once."""
        totals = []
        for request in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.scorer.max_length,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in windows]
            totals.append(sum(score.logprob for _, score in self.scorer.score(pairs)))
        return totals

    def _entry(self, request: Instance) -> Entry | None:
        return self._journal(request).find(*_place(request))

    def _all_known(self, requests: Sequence[Instance]) -> list[Entry]:
        """Entries of requests that have all been answered. ``Answered`` if nobody wants to see them."""
        if self.answers_only:
            raise Answered
        entries = [self._entry(request) for request in requests]
        assert all(entry is not None for entry in entries), "every request has been answered"
        return entries  # type: ignore[return-value]

    def _journal(self, request: Instance) -> Journal:
        return self._journal_of(request.task_name or "")

    def _start(self, requests: Sequence[Instance]) -> list[Instance]:
        """The requests that no journal knows; time counts from here."""
        for request in requests:
            self._journal(request).start()
        self._totals = dict(Counter(request.task_name or "" for request in requests))
        for name in self._totals:
            self._tell(name)
        return [request for request in requests if self._entry(request) is None]

    def _keep(self, request: Instance, entry: Entry) -> None:
        self._journal(request).add(*_place(request), entry)
        self._tell(request.task_name or "")

    def _tell(self, name: str) -> None:
        self.progress(name, len(self._journal_of(name).entries), self._totals[name])


def _place(request: Instance) -> tuple[int, int]:
    """Where a request stands in its task."""
    assert request.doc_id is not None
    return request.doc_id, request.idx
