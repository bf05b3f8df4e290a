# SPDX-License-Identifier: Apache-2.0
"""A stand-in for scheduler and runner (v2) of vLLM 0.24.0 on a CPU: the same calls to the plug-in, in the same order,
with tensors of the same shapes, and the same arithmetic of what is computed, scheduled, accepted and refused.

It imitates ``Scheduler.schedule`` and ``update_from_output``, ``AsyncScheduler``, ``GPUModelRunner.execute_model``
and ``sample_tokens``, ``prepare_inputs``, ``post_update``. The model is ``tests.stub.StubModel``, and a request's keys
lie in blocks.
"""

import importlib
import random
import sys
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.stub import StubModel


class DefaultModelState:
    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self.max_model_len = vllm_config.model_config.max_model_len
        self.max_num_reqs = vllm_config.scheduler_config.max_num_seqs

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        pass

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        return {}


@dataclass
class SamplerOutput:
    sampled_token_ids: Tensor
    logprobs_tensors: Any
    num_nans: Any
    num_sampled: Tensor
    num_rejected: Tensor


def model_state_module() -> ModuleType:
    """``wedlm_vllm.model_state``, imported over stand-ins for the three names that it takes from vLLM, of which
    nothing stays: another test may import the real one."""
    worker = "vllm.v1.worker.gpu"
    values = {
        f"{worker}.model_states.default": {"DefaultModelState": DefaultModelState},
        f"{worker}.sample.output": {"SamplerOutput": SamplerOutput},
        f"{worker}.buffer_utils": {
            "async_copy_to_gpu": lambda x, out=None, device=None: torch.from_numpy(x.copy()),
        },
    }
    real = _vllm_modules()
    for name in real:
        del sys.modules[name]
    for name in values:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    for name, content in values.items():
        vars(sys.modules[name]).update(content)
    try:
        return importlib.import_module("wedlm_vllm.model_state")
    finally:
        for name in _vllm_modules():
            del sys.modules[name]
        sys.modules.update(real)


def _vllm_modules() -> dict[str, ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] == "vllm"}


class Values:
    """vLLM's tensors with a copy for the host."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.gpu = torch.zeros(size, dtype=dtype)
        self.np = self.gpu.numpy()


class SamplingStates:
    def __init__(self, max_num_reqs: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.temperature, self.top_p = Values(max_num_reqs, torch.float32), Values(max_num_reqs, torch.float32)
        self.top_k, self.seeds = Values(max_num_reqs, torch.int32), Values(max_num_reqs, torch.int64)

    def add_request(self, index: int, params: Any) -> None:
        self.temperature.np[index], self.top_p.np[index] = params.temperature, params.top_p
        self.top_k.np[index] = params.top_k if params.top_k > 0 else self.vocab_size
        self.seeds.np[index] = params.seed

    def apply_staged_writes(self) -> None:
        pass


@dataclass
class Request:
    """vLLM's, as the scheduler counts."""

    name: str
    prompt: list[int]
    params: Any
    tokens: list[int] = field(default_factory=list)  # prompt and output
    num_computed: int = 0
    placeholders: int = 0
    num_spec: int = 0
    is_chunk: bool = False
    status: str = "waiting"
    num_preemptions: int = 0

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt) :]


class Runner:
    """One device: slots of requests, their keys, and the calls to the plug-in."""

    def __init__(self, model: StubModel, settings: Any, max_model_len: int, max_num_reqs: int, budget: int) -> None:
        module = model_state_module()
        self.model, self.rows, self.max_model_len, self.max_num_reqs = model, settings.num_rows, max_model_len, budget
        hf_config = SimpleNamespace(**settings.to_hf())
        config = SimpleNamespace(
            model_config=SimpleNamespace(hf_config=hf_config, max_model_len=max_model_len + 7),
            scheduler_config=SimpleNamespace(max_num_seqs=max_num_reqs),
        )
        self.req_states = SimpleNamespace(
            req_id_to_index={},
            max_model_len=max_model_len,
            num_computed=torch.zeros(max_num_reqs, dtype=torch.int32),
        )
        self.free = list(range(max_num_reqs))
        self.max_num_reqs = max_num_reqs
        self.state = module.StreamingModelState(config, model, None, torch.device("cpu"))
        base = SimpleNamespace(
            req_states=self.req_states, sampling_states=SamplingStates(max_num_reqs, model.vocab_size)
        )
        self.sampler, rejection_sampler = self.state.custom_sampler(base)
        assert rejection_sampler is None
        self.input_ids = torch.zeros(budget, dtype=torch.int32)
        self.positions = torch.zeros(budget, dtype=torch.int64)
        self.prefill: dict[int, list[int]] = {}
        # Keys, as what they were computed from: (token, position) by a place in memory, which a request's blocks give.
        self.memory: dict[int, tuple[int, int]] = {}
        self.blocks: dict[int, list[int]] = {}
        self.block_size, self._num_added = max_model_len, 0  # one block for each request, unless a plan has them
        self.computed_np = np.zeros(max_num_reqs, dtype=np.int32)
        self.settings = settings
        self._dummy_runs()

    def _dummy_runs(self) -> None:
        """What happens before the first request: the profile, then the dummy inputs of a capture."""
        n = self.max_num_reqs
        batch = SimpleNamespace(
            num_reqs=n,
            idx_mapping_np=np.arange(n, dtype=np.int32),
            num_draft_tokens_per_req=None,
            num_scheduled_tokens=np.ones(n, dtype=np.int32),
            num_computed_prefill_tokens_np=np.zeros(n, dtype=np.int32),
            prefill_len_np=np.zeros(n, dtype=np.int32),
            is_prefilling_np=np.zeros(n, dtype=bool),
            query_start_loc_np=np.arange(n + 1, dtype=np.int32),
            input_ids=self.input_ids[:n],
            positions=self.positions[:n],
        )
        assert self.state.prepare_inputs(batch, self.req_states) == {}
        out = self.sampler(torch.randn(n, self.model.vocab_size), batch)
        assert out.num_sampled.tolist() == [0] * n
        assert out.num_rejected.tolist() == [1] * n

    def remove(self, name: str) -> None:
        self.state.remove_request(name)
        index = self.req_states.req_id_to_index.pop(name, None)
        if index is not None:
            self.free.append(index)

    def add(self, new: Any) -> None:
        self.remove(new.req_id)
        index = self.free.pop()
        self.req_states.req_id_to_index[new.req_id] = index
        self.prefill[index] = list(new.prefill_token_ids)
        self._num_added += 1
        self.blocks[index] = [self._num_added] if new.block_ids is None else list(new.block_ids[0])
        self.req_states.num_computed[index] = new.num_computed_tokens
        self.computed_np[index] = new.num_computed_tokens
        self.state.add_request(index, new)
        self.sampler.add_request(index, len(new.prompt_token_ids), new.sampling_params)

    def place(self, index: int, slot: int) -> int:
        return self.blocks[index][slot // self.block_size] * self.block_size + slot % self.block_size

    @torch.inference_mode()
    def step(self, plan: Any) -> dict[str, list[int]]:
        """``execute_model`` and ``sample_tokens``."""
        for name in plan.gone:
            self.remove(name)
        for new in plan.new:
            self.add(new)
        self.sampler.apply_staged_writes()
        index_of = self.req_states.req_id_to_index
        for name, computed, blocks in plan.cached:
            self.computed_np[index_of[name]] = computed
            self.blocks[index_of[name]] += blocks
        if not plan.counts:
            return {}
        names = sorted(plan.counts, key=plan.counts.get)
        counts = np.array([plan.counts[name] for name in names], dtype=np.int32)
        slots = np.array([index_of[name] for name in names], dtype=np.int32)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        lengths = np.array([len(self.prefill[s]) for s in slots], dtype=np.int32)
        computed_prefill = np.minimum(self.computed_np[slots], lengths)
        is_prefilling = computed_prefill < lengths
        total, padded = int(starts[-1]), int(starts[-1]) + random.Random(int(starts[-1])).randrange(3)
        padded = min(padded, len(self.input_ids))
        drafts = None
        if plan.drafts:
            drafts = np.array([plan.drafts.get(name, 0) for name in names], dtype=np.int32)
        for s, start, count in zip(slots, starts, counts, strict=False):
            n = int(self.req_states.num_computed[s])
            if n < len(self.prefill[s]):  # also a causal window's, whose last known token counts as not computed
                known = (self.prefill[s] + [9] * count)[n : n + count]
                self.input_ids[start : start + count] = torch.tensor(known, dtype=torch.int32)
            self.positions[start : start + count] = torch.arange(n, n + count)
        batch = SimpleNamespace(
            num_reqs=len(names),
            idx_mapping_np=slots,
            num_draft_tokens_per_req=drafts,
            num_scheduled_tokens=counts,
            num_computed_prefill_tokens_np=computed_prefill,
            prefill_len_np=lengths,
            is_prefilling_np=is_prefilling,
            query_start_loc_np=starts,
            input_ids=self.input_ids[:padded],
            positions=self.positions[:padded],
        )
        key_slots = self.positions[:total].clone()  # prepare_attn takes them before the plug-in writes positions
        assert self.state.prepare_inputs(batch, self.req_states) == {}
        logits = self._forward(batch, key_slots)
        rows = (
            starts[1:] - 1
            if drafts is None
            else np.concatenate([np.arange(end - d, end) for end, d in zip(starts[1:], drafts, strict=True)])
        )
        out = self.sampler(logits[rows.astype(np.int64)], batch)
        assert out.sampled_token_ids.shape == (len(names), self.rows)
        assert out.num_sampled.dtype == out.num_rejected.dtype == torch.int32
        result = {}
        for i, name in enumerate(names):
            sampled, rejected = int(out.num_sampled[i]), int(out.num_rejected[i])
            assert 0 <= sampled <= counts[i]
            assert 0 <= rejected <= counts[i]
            if drafts is not None and drafts[i]:
                assert sampled + rejected == drafts[i]
            self.req_states.num_computed[slots[i]] += int(counts[i]) - rejected
            result[name] = out.sampled_token_ids[i, :sampled].tolist()
        return result

    def _forward(self, batch: Any, key_slots: Tensor) -> Tensor:
        """All keys are written before any is read: a request may share blocks that another one fills in this step."""
        logits = torch.zeros(len(batch.input_ids), self.model.vocab_size)
        ranges = [slice(int(a), int(b)) for a, b in pairwise(batch.query_start_loc_np)]
        for index, rows in zip(batch.idx_mapping_np, ranges, strict=True):
            new = zip(batch.input_ids[rows].tolist(), batch.positions[rows].tolist(), strict=True)
            for slot, (token, position) in zip(key_slots[rows].tolist(), new, strict=True):
                assert max(slot, position) < self.max_model_len
                self.memory[self.place(index, slot)] = (token, position)
        for index, rows in zip(batch.idx_mapping_np, ranges, strict=True):
            first, last = int(key_slots[rows][0]), int(key_slots[rows][-1])
            seen = [self.memory[self.place(index, slot)] for slot in range(last + 1)]
            tokens, positions = (list(part) for part in zip(*seen, strict=True))
            masked = sum(token == self.model.mask_token_id for token in tokens)
            logits[rows] = self.model.rows_model(tokens, positions, masked)[first:]
        return logits


class Engine:
    """The scheduler and its loop. ``is_async``: one step is scheduled before the last one's tokens are known."""

    def __init__(
        self, runner: Runner, max_num_seqs: int, budget: int, is_async: bool, rng: random.Random, unrest: float
    ) -> None:
        self.runner, self.max_num_seqs, self.budget, self.is_async = runner, max_num_seqs, budget, is_async
        self.rng, self.unrest = rng, unrest  # how often a running request is preempted
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.gone: set[str] = set()
        self.num_steps = 0

    def run(self, requests: list[Request], aborted: set[str] = frozenset()) -> None:
        self.waiting.extend(requests)
        in_flight: list[tuple[Any, dict[str, list[int]]]] = []
        while self.waiting or self.running or in_flight:
            self.num_steps += 1
            assert self.num_steps < 20000, "decoding does not end"
            plan = self.schedule()
            in_flight.append((plan, self.runner.step(plan)))
            while len(in_flight) > (1 if self.is_async and plan.counts else 0):
                self.update(*in_flight.pop(0))
            for request in [*self.running]:
                if request.name in aborted and len(request.output) > 3:
                    self._finish(request, "aborted")
        self.runner.step(SimpleNamespace(gone=set(self.gone), new=[], cached=[], counts={}, drafts={}))

    def schedule(self) -> Any:
        rows, left = self.runner.rows, self.budget
        counts: dict[str, int] = {}
        drafts: dict[str, int] = {}
        preempted: set[str] = set()
        for request in [*self.running]:
            total = len(request.tokens) + request.num_spec + request.placeholders
            end = len(request.prompt) + request.params.max_tokens
            if request.placeholders > 0 and request.num_computed + 2 - request.placeholders >= end:
                continue
            if self.rng.random() < self.unrest:
                self._preempt(request)
                preempted.add(request.name)
                continue
            count = min(total - request.num_computed, left, self.runner.max_model_len - request.num_computed)
            if count <= 0:
                continue
            counts[request.name] = count
            left -= count
            num_spec = count + request.num_computed - len(request.tokens) - request.placeholders
            if request.num_spec:
                if num_spec > 0:
                    drafts[request.name] = min(num_spec, request.num_spec)
                request.num_spec = 0
        cached = [(r.name, r.num_computed, []) for r in self.running if r.name in counts]
        new = []
        while not preempted and self.waiting and left > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting.popleft()
            count = min(len(request.tokens), left)
            counts[request.name] = count
            left -= count
            new.append(
                SimpleNamespace(
                    req_id=request.name,
                    prompt_token_ids=request.prompt,
                    prefill_token_ids=list(request.tokens),
                    num_computed_tokens=0,
                    sampling_params=request.params,
                    block_ids=None,
                )
            )
            request.status, request.num_computed = "running", 0
            self.running.append(request)
        gone, self.gone = self.gone | preempted, set()
        for request in self.running:
            if request.name in counts:
                request.num_computed += counts[request.name]
                request.is_chunk = request.num_computed < len(request.tokens) + request.placeholders
                if not request.is_chunk:
                    if self.is_async:
                        request.placeholders += drafts.get(request.name, 0)
                    request.num_spec = rows
        return SimpleNamespace(counts=counts, drafts=drafts, new=new, cached=cached, gone=gone)

    def update(self, plan: Any, sampled: dict[str, list[int]]) -> None:
        by_name = {r.name: r for r in [*self.running, *self.waiting]}
        for name in plan.counts:
            request = by_name.get(name)
            if request is None:
                continue
            tokens = sampled[name]
            if plan.drafts.get(name):
                refused = plan.drafts[name] - len(tokens)
                if request.num_computed > 0:
                    request.num_computed -= refused
                if request.placeholders > 0:
                    request.placeholders -= refused
            else:
                assert not tokens
            for token in tokens:
                request.tokens.append(token)
                if self.is_async:
                    request.placeholders -= 1
                if (
                    token in request.params.stop_token_ids
                    or len(request.output) >= request.params.max_tokens
                    or len(request.tokens) >= self.runner.max_model_len
                ):
                    self._finish(request, "finished")
                    break
            assert request.status == "finished" or request.placeholders >= 0

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.waiting.appendleft(request)
        request.status, request.num_computed, request.num_spec = "preempted", 0, 0
        request.num_preemptions += 1

    def _finish(self, request: Request, status: str) -> None:
        (self.running if request in self.running else self.waiting).remove(request)
        request.status = status
        self.gone.add(request.name)
