# SPDX-License-Identifier: Apache-2.0
"""An engine around the integer stub model, and checks of everything that it keeps."""

from dataclasses import dataclass

import torch

from tests.stub import NUM_FEATURES, StubModel
from wedlm.algorithm import reference
from wedlm.attention.base import KVCache
from wedlm.engine.engine import Engine, EngineConfig
from wedlm.engine.pages import PagePool
from wedlm.engine.request import Request, StepPlan
from wedlm.engine.runner import Runner

CPU = torch.device("cpu")


class LaggingRunner(Runner):
    """Steps are launched, and read one step late, as a GPU's are."""

    def can_launch(self, plan: StepPlan) -> bool:
        return not any(work.decodes and work.request.needs_host for work in plan.work)

    def launch(self, plan: StepPlan) -> "Landed":
        return Landed(self.run(plan))


@dataclass
class Landed:
    results: list

    def read(self) -> list:
        return self.results


def stub_engine(
    model: StubModel,
    *,
    lagging: bool = False,
    page_size: int = 4,
    num_pages: int = 64,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 64,
    max_model_len: int = 200,
    eos_token_ids: tuple[int, ...] = (),
    chunk_step_ratio: float = 1.8,
) -> Engine:
    """Float32 on the CPU, one layer, one key head."""
    cache = KVCache(1, num_pages, page_size, 1, NUM_FEATURES, torch.float32, CPU)
    config = EngineConfig(
        vocab_size=model.vocab_size,
        mask_token_id=model.mask_token_id,
        eos_token_ids=eos_token_ids,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        chunk_step_ratio=chunk_step_ratio,
    )
    runner = (LaggingRunner if lagging else Runner)(model, cache, model.mask_token_id, max_num_seqs)
    return Engine(config, runner, PagePool(num_pages, page_size), tokenizer=None)


def check_engine(engine: Engine) -> None:
    """Pages, queues and slots agree, and every key that counts as valid is the key of its token."""
    engine.pool.check_integrity()
    scheduler, runner = engine.scheduler, engine.runner
    running, waiting = scheduler.running, list(scheduler.waiting)
    assert sorted(r.request_id for r in [*running, *waiting]) == sorted(engine.requests)
    assert [r.arrival for r in waiting] == sorted(r.arrival for r in waiting)
    assert set(engine.pool._tables) == {r.request_id for r in running}
    assert set(runner._slots) <= {r.request_id for r in running}
    assert sorted([*runner._free_slots, *runner._slots.values()]) == list(range(len(runner.state.width)))
    for request in running:
        _check_keys(engine, request)


def _check_keys(engine: Engine, request: Request) -> None:
    page_size = engine.pool.page_size
    table = engine.pool.table(request.request_id)
    slots = [table[i // page_size] * page_size + i % page_size for i in range(request.num_cached)]
    expected = engine.runner.model.values(  # type: ignore[attr-defined]
        torch.tensor(request.tokens[: request.num_cached], dtype=torch.long), torch.arange(request.num_cached)
    )
    assert torch.equal(engine.runner.cache.values[0, slots], expected), request.request_id


def check_outcome(model: StubModel, request: Request) -> None:
    """The finished request equals the reference, in text, in the forward of each token and in rows."""
    expected = reference.decode(model.rows_model, request.prompt_token_ids, request.max_tokens, request.decode)
    assert request.output_token_ids == expected.tokens, request
    ended = expected.tokens[-1] in request.decode.stop_token_ids
    assert request.finish_reason == ("stop" if ended else "length")
    if request.decode.decoding == "auto":  # how many steps it takes depends on the load
        return
    assert request.token_steps == expected.steps, request
    assert (request.num_forwards, request.num_rows) == (len(expected.rows), sum(expected.rows)), request
