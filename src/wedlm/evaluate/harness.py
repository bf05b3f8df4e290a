# SPDX-License-Identifier: Apache-2.0
"""The harness's model interface over our engine, in the same process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from wedlm.engine.sampling_params import SamplingParams
from wedlm.evaluate.answer_log import Answer
from wedlm.evaluate.caching_lm import CachingLM, GenerationSettings
from wedlm.evaluate.likelihood import LikelihoodScorer
from wedlm.evaluate.provenance import ModelProvenance, environment

if TYPE_CHECKING:
    from wedlm.engine.llm import LLM


@dataclass(frozen=True)
class EngineBackend:
    """An ``LLM`` of this process."""

    llm: "LLM"
    provenance: ModelProvenance

    @property
    def max_length(self) -> int:
        return self.llm.engine.config.max_model_len

    @cached_property
    def environment(self) -> Answer:
        return environment(self.llm.device)

    def lm(self, generation: GenerationSettings) -> "EngineLM":
        return EngineLM(self.llm, generation)


class EngineLM(CachingLM):
    """An ``LLM`` as the harness's model."""

    def __init__(self, llm: "LLM", generation: GenerationSettings | None = None) -> None:
        config = llm.engine.config
        super().__init__(
            llm.tokenizer,
            llm.model_config.eos_token_ids[0],
            config.max_model_len,
            generation or GenerationSettings(SamplingParams()),
        )
        self.llm, self.scorer = llm, LikelihoodScorer(llm)

    def answer(self, requests: Sequence[Instance]) -> Iterator[tuple[Instance, Answer]]:
        """Answer all requests together; an entry comes as soon as its answer ends."""
        prepared = [self.prepare(request) for request in requests]
        each = self.llm.generate_each([ids for ids, _, _ in prepared], [params for _, params, _ in prepared])
        for place, output in each:
            assert output.stats is not None
            entry = {
                "text": output.text,
                "token_ids": output.token_ids,
                "token_steps": output.token_steps,
                "finish_reason": output.finish_reason,
                "forwards": output.stats.num_forwards,
                "rows": output.stats.num_rows,
                "prompt_tokens": output.stats.num_prompt_tokens,
                "truncated": prepared[place][2],
            }
            yield requests[place], entry

    def score(self, requests: Sequence[Instance]) -> Iterator[tuple[Instance, Answer]]:
        pairs = self.pairs(requests)
        stats, told = self.scorer.stats, replace(self.scorer.stats)
        for index, score in self.scorer.score(pairs):
            entry = {
                "logprob": score.logprob,
                "greedy": score.greedy,
                "computed": stats.num_computed_tokens - told.num_computed_tokens,
                "reused": stats.num_reused_tokens - told.num_reused_tokens,
            }
            told = replace(stats)
            yield requests[index], entry

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        scores = dict(self.scorer.score([(context, continuation) for _, context, continuation in requests]))
        return [(scores[index].logprob, scores[index].greedy) for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """The log-probability of whole texts, in windows of the model's length that predict each token once."""
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
