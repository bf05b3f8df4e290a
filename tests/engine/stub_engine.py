# SPDX-License-Identifier: Apache-2.0
"""An engine around the integer stub model, and checks of everything that it keeps."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from tests.engine.native_model import NativeModel
from tests.slow_lookup import SlowLookup
from tests.stub import StubModel
from wedlm.algorithm import reference
from wedlm.attention.base import KVCache
from wedlm.attention.sdpa import PagedSdpa
from wedlm.engine.engine import Engine
from wedlm.engine.execution.eager_step import EagerStep
from wedlm.engine.execution.native_step import NativeStep
from wedlm.engine.execution.runner import Runner
from wedlm.engine.execution.windows import Windows
from wedlm.engine.factory import Blueprint
from wedlm.engine.options import EngineConfig, EngineOptions, SchedulingPolicy
from wedlm.engine.pages import PagePool
from wedlm.engine.plan import StepPlan
from wedlm.engine.request import Request
from wedlm.native import NativeAttend

CPU = torch.device("cpu")


class _Lagging:
    """Steps are launched, and read one step late, as a GPU's are."""

    runs_ahead = True

    def takes(self, plan: StepPlan) -> bool:
        needs_host = any(one.is_window and one.request.needs_host for one in plan.scheduled)
        return not needs_host and super().takes(plan)  # type: ignore[misc]


class LaggingStep(_Lagging, EagerStep):
    """The plain step, late."""


class LaggingNativeStep(_Lagging, NativeStep):
    """The native step, late."""


def stub_engine(
    model: StubModel | NativeModel,
    *,
    lagging: bool = False,
    page_size: int = 4,
    num_pages: int = 64,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 64,
    max_model_len: int = 200,
    eos_token_ids: tuple[int, ...] = (),
    has_masked_rows: bool = True,
    chunk_step_ratio: float = 1.8,
    scheduling_policy: SchedulingPolicy = "fcfs",
    clock: Callable[[], float] = time.perf_counter,
) -> Engine:
    """Float32 on the CPU."""
    config = EngineConfig(
        vocab_size=model.vocab_size,
        mask_token_id=model.mask_token_id,
        eos_token_ids=eos_token_ids,
        max_model_len=max_model_len,
        options=EngineOptions(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            chunk_step_ratio=chunk_step_ratio,
            scheduling_policy=scheduling_policy,
        ),
        has_masked_rows=has_masked_rows,
        block_length=model.block_length if model.block_length > 1 else None,
        model_decoding="block" if model.block_length > 1 else "auto",
    )
    if not lagging:
        return build(model.runs, config, page_size, num_pages, model.heads, clock=clock, cache_dtype=model.cache_dtype)
    num_layers, *heads = model.heads
    cache = KVCache(num_layers, num_pages, page_size, *heads, model.cache_dtype, CPU)
    windows = Windows(max_num_seqs, CPU)
    mask = model.mask_token_id
    if isinstance(model, NativeModel):
        eager = EagerStep(model.runs, NativeAttend, cache, windows, mask)
        ways = [one(model.runs, cache, windows, mask, max_model_len) for one in (LaggingNativeStep, NativeStep)]
        runner = Runner(windows, eager, ways)
    else:
        block = model.block_length
        eager = EagerStep(model.runs, PagedSdpa, cache, windows, mask, block)
        runner = Runner(windows, eager, [LaggingStep(model.runs, PagedSdpa, cache, windows, mask, block)])
    pool = PagePool(num_pages, page_size, block_length=model.block_length)
    return Engine(config, runner, pool, tokenizer=None, clock=clock)


def build(
    model: Any,
    config: EngineConfig,
    page_size: int,
    num_pages: int,
    heads: tuple[int, int, int],
    clock: Callable[[], float] = time.perf_counter,
    cache_dtype: torch.dtype = torch.float32,
) -> Engine:
    """An engine on the CPU in float32, without a tokenizer. ``heads``: layers, key heads and head dimension."""
    shape = SimpleNamespace(**dict(zip(("num_layers", "num_kv_heads", "head_dim"), heads, strict=True)))
    blueprint = Blueprint(model, None, shape, cache_dtype, CPU, config, num_pages, page_size, tokenizer=None)
    return blueprint.build(clock=clock)


def check_engine(engine: Engine, model: NativeModel | None = None) -> None:
    """Pages, queues and slots agree, and every key that counts as valid is the key of its token. ``model``: None is
    the one that runs, a stub."""
    engine.pool.check_integrity()
    scheduler, windows = engine.scheduler, engine.runner.windows
    running, waiting = scheduler.running, list(scheduler.waiting)
    assert sorted(r.request_id for r in [*running, *waiting]) == sorted(engine.requests)
    assert [r.order for r in waiting] == sorted(r.order for r in waiting)
    assert set(engine.pool._tables) == {r.request_id for r in running}
    assert set(windows.slots) <= {r.request_id for r in running}
    assert sorted([*windows.free_slots, *windows.slots.values()]) == list(range(windows.num_slots))
    for request in running:
        _check_keys(engine, request, engine.runner.eager.model if model is None else model)  # type: ignore[arg-type]


def _check_keys(engine: Engine, request: Request, model: StubModel | NativeModel) -> None:
    page_size = engine.pool.page_size
    table = engine.pool.table(request.request_id)
    slots = [table[i // page_size] * page_size + i % page_size for i in range(request.progress.num_cached)]
    cached = request.progress.num_cached
    positions = request.decode.positions(0, cached)
    model.check_cache(engine.runner.cache, slots, request.output.tokens[:cached], positions)


def preempt_last(engine: Engine) -> bool:
    """Preempt the last running request in the line; False, and nothing happens, if none runs or a step is under way."""
    if not engine.scheduler.running or engine._pending is not None:
        return False
    victim = max(engine.scheduler.running, key=lambda request: request.order)
    engine.scheduler.preempt(victim)
    engine._save_windows([victim])
    return True


def known_of(request: Request) -> tuple[list[int], tuple[int, ...]]:
    """Its tokens before and after what it decodes."""
    suffix = tuple(request.params.suffix_token_ids or ())
    return request.prompt_token_ids[: len(request.prompt_token_ids) - len(suffix)], suffix


def check_outcome(model: StubModel | NativeModel, request: Request, lagging: bool = False) -> None:
    """The finished request equals the reference, in text, in the forward of each token and in rows.

    ``lagging``: the engine's, which looks drafts up in a text that lacks the latest step's tokens."""
    decode = request.decode
    propose = SlowLookup(ends=decode.stop_token_ids).propose if decode.max_lookup else None
    prefix, suffix = known_of(request)
    expected = reference.decode(model.rows_model, prefix, request.max_tokens, decode, propose, suffix)
    assert request.output_token_ids == expected.tokens, request
    ended = expected.tokens[-1] in request.decode.stop_token_ids
    assert request.finish_reason == ("stop" if ended else "length")
    if decode.decoding == "auto" or (lagging and decode.max_lookup):  # how many steps it takes depends on the load
        return
    assert request.output.token_steps == expected.steps, request
    assert (request.counters.num_forwards, request.counters.num_rows) == (len(expected.rows), sum(expected.rows)), (
        request
    )
