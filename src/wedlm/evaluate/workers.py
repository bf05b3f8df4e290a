# SPDX-License-Identifier: Apache-2.0
"""Replicas of a model, with Ray, on one machine or a cluster; each answers a part of the questions.

A replica is the ordinary engine on requests that are split at questions. Texts are therefore those of one worker (in
float32, where the engine's text does not depend on what else is in the batch), and likelihoods differ at most by
rounding.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance

from wedlm.cluster import join_ray, plain_errors, share_of
from wedlm.engine.sampling_params import SamplingParams
from wedlm.evaluate.answer_log import Answer
from wedlm.evaluate.caching_lm import CachingLM, GenerationSettings
from wedlm.evaluate.provenance import ModelProvenance, model_provenance
from wedlm.model import load_tokenizer

if TYPE_CHECKING:
    from wedlm.evaluate.harness import EngineBackend

# Parts per worker: enough that one that got the long answers does not keep the others waiting for long.
_PARTS_PER_WORKER = 4


class Replica:
    """One model in a separate process. ``options``: of ``LLM``; ``threads``: of torch, on a CPU."""

    def __init__(self, options: Mapping[str, Any], threads: int) -> None:
        self._options, self._threads = dict(options), threads

    @cached_property
    def _backend(self) -> "EngineBackend":
        """The backend, loaded by the first call, since only a call's errors come back unchanged."""
        import torch

        from wedlm.engine.llm import LLM
        from wedlm.evaluate.harness import EngineBackend

        if self._options["device"] == "cpu":
            torch.set_num_threads(self._threads)
        llm = LLM(**self._options)
        return EngineBackend(llm, model_provenance(llm, str(self._options["model"]), self._options.get("adapter")))

    def facts(self) -> tuple[ModelProvenance, int, int, Answer]:
        """Identity, longest sequence, end token, environment."""
        backend = self._backend
        return backend.provenance, backend.max_length, backend.llm.model_config.eos_token_ids[0], backend.environment

    def compute(
        self, kind: str, number: int, arguments: Sequence[Any], params: SamplingParams, chat: bool
    ) -> tuple[int, list[Answer]]:
        """Entries of requests in their order, with ``number`` returned unchanged. ``kind``: "answer" or "score"."""
        lm = self._backend.lm(GenerationSettings(params, chat))
        requests = [Instance("", {}, one, 0, metadata=("", index, 1)) for index, one in enumerate(arguments)]
        entries = {request.doc_id: entry for request, entry in getattr(lm, kind)(requests)}
        return number, [entries[index] for index in range(len(requests))]


class RayBackend:
    """``num_workers`` replicas, one GPU each if there are GPUs. ValueError if Ray's cluster has too few devices."""

    def __init__(self, options: Mapping[str, Any], num_workers: int, threads: int | None = None) -> None:
        share = share_of(options["device"], threads, "--workers")
        share.check(num_workers, "--workers")
        ray = join_ray()
        actor: Any = ray.remote(Replica).options(**share.needs)
        options = {**options, "device": share.device}
        self._replicas = [actor.remote(options, share.num_cpus) for _ in range(num_workers)]
        with plain_errors():
            facts = ray.get([replica.facts.remote() for replica in self._replicas])
        if len({one[0].hash for one in facts}) > 1:
            raise ValueError("the workers found different files of the model; expected the same on all machines")
        provenance, self.max_length, self._eos_token_id, environment = facts[0]
        self.provenance = replace(provenance, device=f"{num_workers} x {provenance.device}")
        devices = dict.fromkeys(one[3]["device_name"] for one in facts)
        self.environment = {**environment, "device_name": f"{num_workers} x {' and '.join(devices)}"}
        self._tokenizer = load_tokenizer(options["model"])

    def lm(self, generation: GenerationSettings) -> "RayLM":
        return RayLM(self._replicas, self._tokenizer, self._eos_token_id, self.max_length, generation)


class RayLM(CachingLM):
    """Spreads requests over replicas; entries arrive when their part is done."""

    def __init__(self, replicas: Sequence[Any], *rest: Any) -> None:
        super().__init__(*rest)
        self._replicas = replicas

    def answer(self, requests: Sequence[Instance]) -> Iterator[tuple[Instance, Answer]]:
        return self._spread("answer", requests)

    def score(self, requests: Sequence[Instance]) -> Iterator[tuple[Instance, Answer]]:
        return self._spread("score", requests)

    def _spread(self, kind: str, requests: Sequence[Instance]) -> Iterator[tuple[Instance, Answer]]:
        from ray.util import ActorPool

        parts = cut(requests, _PARTS_PER_WORKER * len(self._replicas))

        def send(replica: Any, number: int) -> Any:
            arguments = [request.args for request in parts[number]]
            return replica.compute.remote(kind, number, arguments, self.generation.params, self.generation.chat)

        with plain_errors():
            for number, entries in ActorPool(list(self._replicas)).map_unordered(send, list(range(len(parts)))):
                yield from zip(parts[number], entries, strict=True)


def cut(requests: Sequence[Instance], num_parts: int) -> list[list[Instance]]:
    """Split requests into at most ``num_parts`` parts of about equal numbers of questions; all requests of a question
    stay together."""
    questions: dict[tuple[str, Any], list[Instance]] = {}
    for request in requests:
        questions.setdefault((request.task_name or "", request.doc_id), []).append(request)
    groups = list(questions.values())
    size = -(-len(groups) // num_parts) if groups else 1
    return [[one for group in groups[i : i + size] for one in group] for i in range(0, len(groups), size)]
