# SPDX-License-Identifier: Apache-2.0
"""What vLLM's runner (v2) asks of a model that decodes by streaming: its inputs, and which tokens are final.

In one step the runner calls, in this order: ``remove_request`` of requests that ended or were preempted,
``add_request``, ``prepare_attn``, ``prepare_inputs``, the model, and the sampler. vLLM takes the rows of a window for
draft tokens: as many of them as the sampler reports are accepted, so their keys stay, and the others are refused.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.v1.worker.gpu.buffer_utils import async_copy_to_gpu
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from wedlm.algorithm.sample import SamplingBatch
from wedlm_vllm.rule import Slots, StreamingRule, WindowStep, choose_rows
from wedlm_vllm.settings import StreamingSettings


@dataclass(frozen=True)
class _Planned:
    """A step between its inputs and its sampler: the windows' place in the batch and slots [D], on host and device,
    and where each of their rows [T] stands in a grid [D, R]."""

    input_batch: Any
    places: np.ndarray
    slots_np: np.ndarray
    slots: Tensor
    in_grid: Tensor
    step: WindowStep


class StreamingModelState(DefaultModelState):
    """The state of all requests. Attention and everything else are vLLM's own, plain causal."""

    num_new_sampled_tokens_per_step = 0  # all tokens are among the rows that vLLM calls drafts

    def __init__(self, vllm_config: Any, model: nn.Module, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.settings = StreamingSettings.from_hf(vllm_config.model_config.hf_config)
        self.planned: _Planned | None = None
        self._req_states: Any = None  # the runner's, which knows a request's slot
        self._make_rule(self.max_model_len)

    def _make_rule(self, max_positions: int) -> None:
        self.rule = StreamingRule(self.settings, max_positions, self.max_num_reqs, self.device)
        self.slots = Slots(self.rule, self.max_num_reqs)

    def custom_sampler(self, sampler: Any) -> tuple[Any, None]:
        self._req_states = sampler.req_states
        return StreamingSampler(sampler, self), None

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        if self._req_states.max_model_len != self.rule.max_positions:
            # vLLM has measured its memory and shortened the model, which happens before any request.
            self._make_rule(self._req_states.max_model_len)
        self.slots.add(new_req_data.req_id, req_index)

    def remove_request(self, req_id: str) -> None:
        """The runner calls this before it frees the slot, and also for names that it does not know."""
        slot = self._req_states.req_id_to_index.get(req_id)
        if slot is not None:
            self.slots.remove(req_id, slot)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Write the windows' rows over what the runner put there. Slots of keys are chosen by then, so logical
        positions may differ from them. In place, because CUDA graphs read these buffers."""
        self.planned = None
        num_drafts = input_batch.num_draft_tokens_per_req
        places = np.flatnonzero(num_drafts) if num_drafts is not None else np.zeros(0, dtype=np.int64)
        if len(places):
            counts = num_drafts[places].astype(np.int64)
            assert (counts == input_batch.num_scheduled_tokens[places]).all(), "a window beside tokens of a prompt"
            slots_np = input_batch.idx_mapping_np[places].astype(np.int64)
            window = np.repeat(np.arange(len(places)), counts)
            row = np.arange(len(window)) - np.repeat(np.cumsum(counts) - counts, counts)
            in_batch = input_batch.query_start_loc_np[places].astype(np.int64)[window] + row
            slots, num_rows = self._copy(np.stack([slots_np, counts]))
            in_grid, in_batch = self._copy(np.stack([window * self.settings.num_rows + row, in_batch]))
            step = self.rule.plan(self.slots.state.take(slots), num_rows)
            for buffer, rows in ((input_batch.input_ids, step.tokens), (input_batch.positions, step.positions)):
                buffer[in_batch] = rows.flatten()[in_grid].to(buffer.dtype)
            self.planned = _Planned(input_batch, places, slots_np, slots, in_grid, step)
        return super().prepare_inputs(input_batch, req_states)

    def _copy(self, values: np.ndarray) -> Tensor:
        return async_copy_to_gpu(values, device=self.device)


class StreamingSampler:
    """Takes the place of vLLM's sampler. Of a request's parameters it knows temperature, top-k, top-p and the seed;
    ``checks.py`` refuses the others before they come here."""

    penalties_state = SimpleNamespace(output_bin_counts=None)

    def __init__(self, sampler: Any, state: StreamingModelState) -> None:
        self.sampling_states, self.req_states, self.state = sampler.sampling_states, sampler.req_states, state
        self._has_measured = False

    def add_request(self, req_idx: int, prompt_len: int, sampling_params: Any) -> None:
        self.sampling_states.add_request(req_idx, sampling_params)

    def apply_staged_writes(self) -> None:
        self.sampling_states.apply_staged_writes()

    def __call__(self, logits: Tensor, input_batch: Any) -> SamplerOutput:
        """Logits [T, V]: of each row of each window, if the batch has windows; else of each request's last row."""
        state, planned = self.state, self.state.planned
        num_reqs, width = input_batch.num_reqs, state.settings.num_rows
        if not self._has_measured:
            self._measure(logits)
        scheduled = input_batch.num_scheduled_tokens
        after = input_batch.num_computed_prefill_tokens_np + scheduled
        # Of a prompt every row stays. Rows that are neither a prompt's nor a window's are a warm-up's: none stays.
        rejected = np.where(input_batch.is_prefilling_np, 0, scheduled).astype(np.int32)
        ends = np.flatnonzero(input_batch.is_prefilling_np & (after >= input_batch.prefill_len_np))
        if len(ends):
            # In causal streaming the last known token runs again, as the first row of the first window.
            rejected[ends] = int(state.settings.is_causal)
            last = input_batch.query_start_loc_np[ends + 1] - 1
            slots, num_known, last = state._copy(
                np.stack([input_batch.idx_mapping_np[ends], input_batch.prefill_len_np[ends], last]).astype(np.int64)
            )
            state.slots.begin(slots, num_known, input_batch.input_ids[last].long())
        num_rejected = state._copy(rejected)
        num_sampled = torch.zeros_like(num_rejected)
        sampled = num_sampled.new_zeros(num_reqs, width, dtype=torch.long)
        if planned is not None and planned.input_batch is input_batch:
            step, places = planned.step, state._copy(planned.places)
            sampling = self._sampling(planned)
            choice, entropy = choose_rows(logits, sampling, state.settings.mask_token_id)
            grid = step.tokens.shape
            windows, tokens, commit = state.rule.update(
                step,
                choice.new_zeros(grid).flatten().index_copy_(0, planned.in_grid, choice).view(grid),
                entropy.new_full(grid, torch.inf).flatten().index_copy_(0, planned.in_grid, entropy).view(grid),
            )
            state.slots.state.put(planned.slots, windows)
            sampled[places] = tokens[:, :width]
            num_sampled[places] = commit.int()
            num_rejected[places] = (step.num_rows - commit).int()
        state.planned = None
        return SamplerOutput(
            sampled_token_ids=sampled,
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )

    def _measure(self, logits: Tensor) -> None:
        """Take as much memory as a step can. vLLM's measurement calls the sampler once before there are requests, with
        one row of logits for each, and gives what is left to the cache."""
        self._has_measured = True
        count = self.state.max_num_reqs * self.state.settings.num_rows
        ones = torch.ones(count, dtype=torch.long, device=logits.device)
        sampling = SamplingBatch(
            temperature=ones.float(),
            top_k=ones,
            top_p=ones.float() / 2,
            seed=ones,
            position=ones,
            any_sampled=True,
            any_truncated=True,
        )
        choose_rows(logits.new_zeros(count, logits.shape[1]), sampling, self.state.settings.mask_token_id)

    def _sampling(self, planned: _Planned) -> SamplingBatch:
        """The parameters of each row [T]."""
        states, at = self.sampling_states, planned.slots_np
        window = planned.in_grid // self.state.settings.num_rows
        slots = planned.slots[window]
        truncated = (states.top_k.np[at] != states.vocab_size) | (states.top_p.np[at] != 1.0)
        return SamplingBatch(
            temperature=states.temperature.gpu[slots],
            top_k=states.top_k.gpu[slots].long(),
            top_p=states.top_p.gpu[slots],
            seed=states.seeds.gpu[slots],
            position=planned.step.targets.flatten()[planned.in_grid],
            any_sampled=bool((states.temperature.np[at] > 0).any()),
            any_truncated=bool(truncated.any()),
        )
