# SPDX-License-Identifier: Apache-2.0
"""Random histories in which adapters are loaded and unloaded while requests run: whatever was unloaded meanwhile, each
text and each key in the cache is that of the adapter which the request was given."""

import random
from copy import copy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.histories import add_up, random_params, random_prompt
from tests.engine.native_model import CONFIG, NativeModel, needs_native
from tests.engine.stub_engine import check_outcome, preempt_last, stub_engine
from wedlm.engine.adapters import Adapters
from wedlm.engine.engine import Engine
from wedlm.engine.request import Request
from wedlm.model import Transformer
from wedlm.model.lora.row_factors import RowFactors
from wedlm.native import NativeTransformer
from wedlm.native.weights import NativeAdapters

pytestmark = needs_native
NUM_FACTORS, MAX_ADAPTERS = 6, 3


def random_factors(seed: int) -> RowFactors:
    """For all rows, for masked ones, or for both, by ``seed``; of different ranks."""
    rng = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = Transformer(CONFIG)
    parts: list[dict[str, tuple[Tensor, Tensor]]] = [{}, {}]
    for part in parts:
        for name, weight in model.named_parameters():
            if name.endswith("proj.weight"):
                a, b = (
                    torch.randn(2 + seed, weight.shape[1], generator=rng),
                    torch.randn(len(weight), 2 + seed, generator=rng),
                )
                part[name] = 0.3 * a, 0.3 * b
    start = torch.randn(CONFIG.hidden_size, generator=rng)
    return (RowFactors(parts[0]), RowFactors({}, parts[1], start), RowFactors(*parts, start))[seed % 3]


@cache
def models() -> tuple[NativeModel, list[NativeModel], list[RowFactors]]:
    """(what engines run, the oracles, the factors): the oracle of number i is the same model with factors i - 1, and
    that of number 0 the bare one. An oracle's model has all of them, from the start to the end."""
    factors = [random_factors(seed) for seed in range(NUM_FACTORS)]
    oracle = NativeModel()
    for slot, one in enumerate(factors, start=1):
        NativeAdapters(oracle.runs).put(slot, one)
    views = [copy(oracle) for _ in range(NUM_FACTORS + 1)]
    for slot, view in enumerate(views):
        view.runs = _With(oracle.runs, slot)  # type: ignore[assignment]
    return NativeModel(), views, factors


class _With:
    """A model whose rows all have one adapter."""

    def __init__(self, model: NativeTransformer, slot: int) -> None:
        self._model, self._slot = model, slot

    def __call__(self, tokens: Tensor, positions: Tensor, attend: Any, rows: Any = None, masked: Any = None) -> Tensor:
        return self._model(tokens, positions, attend, rows, masked, torch.full_like(tokens, self._slot))


class History:
    """One engine, and what a careful observer knows of it. ``asked``: by request, the number of its oracle."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.model, self.oracles, self.factors = models()
        self.lagging, self.page_size = rng.random() < 0.5, rng.choice([1, 2, 4, 16])
        self.adapters = Adapters(NativeAdapters(self.model.runs), MAX_ADAPTERS, 64)
        self.engine = self._new_engine()
        self.stems = [[rng.randrange(self.model.vocab_size) for _ in range(30)] for _ in range(2)]
        self.asked: dict[str, int] = {}
        self.named: dict[str, int] = {}
        self.counts = dict.fromkeys(
            ("finished", "reused", "preempted", "loaded", "full", "unloaded in use", "faults"), 0
        )

    def _new_engine(self) -> Engine:
        engine = stub_engine(
            self.model,
            lagging=self.lagging,
            page_size=self.page_size,
            num_pages=-(-90 // self.page_size) + self.rng.randint(0, 60 // self.page_size),
            max_num_seqs=self.rng.randint(1, 5),
            max_num_batched_tokens=self.rng.choice([18, 24, 64]),
        )
        engine.adapters = self.adapters
        self.adapters.sweep(())  # as a new engine does with those of a broken one
        return engine

    def run(self) -> dict[str, int]:
        ways = (self.add, self.load, self.unload, self.abort, self.preempt, self.step, self.fail)
        for _ in range(self.rng.randint(10, 45)):
            self.rng.choices(ways, (30, 12, 10, 4, 5, 38, 1))[0]()
            self.check()
        while self.engine.has_work:
            self.step()
            self.check()
        assert self.engine.pool.num_available == self.engine.pool.num_pages
        for name in list(self.named):
            self.adapters.unload(name, ())
        self.adapters.check_integrity(())
        return self.counts

    def add(self) -> None:
        name = self.rng.choice([None, *self.named])
        request_id = f"r{len(self.asked)}"
        prompt = random_prompt(self.rng, self.stems, self.model)
        self.engine.add(request_id, prompt, random_params(self.rng), adapter=name)
        self.asked[request_id] = 0 if name is None else self.named[name]

    def load(self) -> None:
        name, number = self.rng.choice("abc"), self.rng.randint(1, NUM_FACTORS)
        kept = len(self.named) + len(self._unloaded())
        if name in self.named or kept == MAX_ADAPTERS:
            with pytest.raises(ValueError, match=r"is called|adapters are loaded"):
                self.engine.load_adapter(name, self.factors[number - 1])
            self.counts["full"] += kept == MAX_ADAPTERS
            return
        self.engine.load_adapter(name, self.factors[number - 1])
        self.named[name] = number
        self.counts["loaded"] += 1

    def _unloaded(self) -> set:
        return {one for one in self.engine.adapters_in_use() if one.name not in self.named or self._is_old(one)}

    def _is_old(self, one: Any) -> bool:
        return self.adapters.get(one.name) is not one

    def unload(self) -> None:
        if self.named:
            name = self.rng.choice(list(self.named))
            self.counts["unloaded in use"] += self.adapters.get(name) in self.engine.adapters_in_use()
            self.engine.unload_adapter(name)
            del self.named[name]

    def abort(self) -> None:
        if self.engine.requests:
            self.engine.abort(self.rng.choice(list(self.engine.requests)))

    def preempt(self) -> None:
        preempt_last(self.engine)

    def fail(self) -> None:
        """The engine is lost with its requests; another one takes its place beside the same adapters."""
        if self.rng.random() < 0.5:
            self.engine = self._new_engine()
            self.counts["faults"] += 1

    def step(self) -> None:
        for request in self.engine.step():
            if request.finish_reason is not None:
                check_outcome(self.oracle_of(request), request, self.lagging)
                self.counts["finished"] += 1
                self.counts["reused"] += request.progress.num_reused
                self.counts["preempted"] += request.progress.num_preemptions

    def oracle_of(self, request: Request) -> NativeModel:
        return self.oracles[self.asked[request.request_id]]

    def check(self) -> None:
        engine = self.engine
        engine.pool.check_integrity()
        self.adapters.check_integrity(engine.adapters_in_use())
        assert self.adapters.names == list(self.named)
        for request in engine.scheduler.running:
            table, size, cached = engine.pool.table(request.request_id), self.page_size, request.progress.num_cached
            slots = [table[i // size] * size + i % size for i in range(cached)]
            tokens, positions = request.output.tokens[:cached], request.decode.positions(0, cached)
            self.oracle_of(request).check_cache(engine.runner.cache, slots, tokens, positions)


def run_histories(seeds: range) -> dict[str, int]:
    rare = {"full"} if len(seeds) <= 50 else set()  # a load finds no room once in a dozen of them
    return add_up((History(seed).run() for seed in seeds), rare)


def test_histories():
    run_histories(range(8))


@pytest.mark.long
@pytest.mark.parametrize("hundred", range(10))
def test_a_thousand_histories(hundred, record_property):
    for name, value in run_histories(range(100 * hundred, 100 * (hundred + 1))).items():
        record_property(name, value)
