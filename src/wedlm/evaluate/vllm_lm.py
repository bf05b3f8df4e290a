# SPDX-License-Identifier: Apache-2.0
"""vLLM's AR decoding as a baseline: the same tasks, prompts (token for token) and scoring on another engine.

Needs the package vllm, which brings its own torch, and a checkpoint that vLLM reads. Written for vLLM 0.24.
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from lm_eval.api.instance import Instance

from wedlm.engine.sampling_params import SamplingParams
from wedlm.evaluate.answer_log import Answer
from wedlm.evaluate.caching_lm import CachingLM, GenerationSettings
from wedlm.evaluate.provenance import environment, provenance_of_files
from wedlm.extras import pip_install
from wedlm.model import load_tokenizer

# Requests given to vLLM at a time: what a killed run may lose.
_PART = 1024


class VllmBackend:
    """A checkpoint in vLLM. ``options``: model, dtype, max_model_len, max_num_seqs, gpu_memory_utilization,
    cuda_graphs. Raises ValueError without the package."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        try:
            import vllm
        except ModuleNotFoundError as error:
            raise ValueError(
                f"--engine is vllm, but {error.name} is not installed; expected {pip_install('vllm')}"
            ) from error
        shared = ("dtype", "max_model_len", "max_num_seqs", "gpu_memory_utilization")
        given = {name: options[name] for name in shared if options.get(name)}
        if options.get("cuda_graphs") is False:
            given["enforce_eager"] = True
        self._llm = vllm.LLM(model=str(options["model"]), seed=0, enable_prefix_caching=True, **given)
        config = self._llm.llm_engine.model_config
        self._tokenizer = load_tokenizer(options["model"])
        self.max_length = int(config.max_model_len)
        ends = config.hf_config.eos_token_id
        self._eos_token_id = ends if isinstance(ends, int) else ends[0]
        dtype = str(config.dtype).removeprefix("torch.")
        self.provenance = provenance_of_files(str(options["model"]), None, dtype, "cuda", engine="vllm")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.environment = {**environment(device), "vllm": version("vllm")}

    def lm(self, generation: GenerationSettings) -> "VllmLM":
        """The harness's model. Raises ValueError for any decoding except AR."""
        if generation.params.decoding != "autoregressive":
            raise ValueError(f"decoding is {generation.params.decoding}; expected autoregressive with --engine vllm")
        return VllmLM(self._llm, self._tokenizer, self._eos_token_id, self.max_length, generation)


class VllmLM(CachingLM):
    """A ``vllm.LLM`` as the harness's model."""

    def __init__(self, llm: Any, *rest: Any) -> None:
        super().__init__(*rest)
        self._llm = llm

    def answer(self, requests: Sequence[Instance]) -> Iterator[tuple[Instance, Answer]]:
        for start in range(0, len(requests), _PART):
            part = requests[start : start + _PART]
            prepared = [self.prepare(request) for request in part]
            outputs = self._generate([ids for ids, _, _ in prepared], [_sampling(params) for _, params, _ in prepared])
            for request, (ids, _, truncated), output in zip(part, prepared, outputs, strict=True):
                (best,) = output.outputs
                tokens = list(best.token_ids)
                entry = {
                    "text": best.text,
                    "token_ids": tokens,
                    "token_steps": list(range(len(tokens))),
                    "finish_reason": best.finish_reason,
                    # As ours counts them: the prompt's forward is none of these.
                    "forwards": len(tokens),
                    "rows": len(tokens),
                    "prompt_tokens": len(ids),
                    "truncated": truncated,
                }
                yield request, entry

    def score(self, requests: Sequence[Instance]) -> Iterator[tuple[Instance, Answer]]:
        from vllm import SamplingParams as VllmParams

        ask = VllmParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        for start in range(0, len(requests), _PART):
            part = requests[start : start + _PART]
            pairs = self.pairs(part)
            # vLLM wants room for the token that it must generate, which is not needed here.
            inputs = [(context + continuation)[1 - self.max_length :] for context, continuation in pairs]
            for request, (_, continuation), ids, output in zip(
                part, pairs, inputs, self._generate(inputs, [ask] * len(part)), strict=True
            ):
                rows = list(zip(continuation, output.prompt_logprobs[-len(continuation) :], strict=True))
                entry = {
                    "logprob": sum(row[token].logprob for token, row in rows),
                    "greedy": all(row[token].rank == 1 for token, row in rows),
                    "computed": len(ids),
                    "reused": 0,
                }
                yield request, entry

    def _generate(self, prompts: Sequence[list[int]], params: Sequence[Any]) -> Any:
        return self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], list(params), use_tqdm=False)


def _sampling(params: SamplingParams) -> Any:
    """Our parameters in vLLM's form."""
    from vllm import SamplingParams as VllmParams

    return VllmParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        seed=params.seed,
        max_tokens=params.max_tokens,
        stop=list(params.stop or ()),
    )
