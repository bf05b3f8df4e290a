# SPDX-License-Identifier: Apache-2.0
"""Replicas of a model, with Ray, on one machine or a cluster; each answers a part of the questions.

A replica is the ordinary engine on requests that are split at questions. Texts are therefore those of one worker (in
float32, where the engine's text does not depend on what else is in the batch), and likelihoods differ at most by
rounding.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lm_eval.api.instance import Instance

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
    """``num_workers`` replicas, one GPU each if there are GPUs. Raises ValueError if Ray's cluster has too few devices.

    Ray joins the cluster that RAY_ADDRESS or ``ray start`` names, and otherwise starts one on this machine. The nodes
    of a cluster need this package and the checkpoint under the same name.
    """

    def __init__(self, options: Mapping[str, Any], num_workers: int, threads: int | None = None) -> None:
        import ray

        if not ray.is_initialized():
            ray.init(log_to_driver=False, configure_logging=False, include_dashboard=False)
        given = ray.cluster_resources()
        on_gpu = options["device"] != "cpu" and (options["device"] != "auto" or given.get("GPU", 0) > 0)
        if on_gpu and options["device"] not in ("auto", "cuda"):
            raise ValueError(f"--device is {options['device']}; expected auto, cuda or cpu with --workers")
        threads = threads or 1
        needs = {"num_gpus": 1, "num_cpus": 0} if on_gpu else {"num_gpus": 0, "num_cpus": threads}
        name, each = ("GPU", 1) if on_gpu else ("CPU", threads)
        if num_workers * each > given.get(name, 0):
            raise ValueError(
                f"--workers is {num_workers}, and each takes {each} {name}; expected at most the "
                f"{given.get(name, 0):g} {name}s that Ray has"
            )
        actor: Any = ray.remote(Replica).options(**needs)
        options = {**options, "device": "cuda" if on_gpu else "cpu"}
        self._replicas = [actor.remote(options, threads) for _ in range(num_workers)]
        with _plain_errors():
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

        with _plain_errors():
            for number, entries in ActorPool(list(self._replicas)).map_unordered(send, list(range(len(parts)))):
                yield from zip(parts[number], entries, strict=True)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise a replica's error as it was raised there."""
    from ray.exceptions import RayTaskError

    try:
        yield
    except RayTaskError as error:
        raise error.cause from None


def cut(requests: Sequence[Instance], num_parts: int) -> list[list[Instance]]:
    """Split requests into at most ``num_parts`` parts of about equal numbers of questions; all requests of a question
    stay together."""
    questions: dict[tuple[str, Any], list[Instance]] = {}
    for request in requests:
        questions.setdefault((request.task_name or "", request.doc_id), []).append(request)
    groups = list(questions.values())
    size = -(-len(groups) // num_parts) if groups else 1
    return [[one for group in groups[i : i + size] for one in group] for i in range(0, len(groups), size)]
