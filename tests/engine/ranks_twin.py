# SPDX-License-Identifier: Apache-2.0
"""One process that adds up as the ranks of tensor parallelism do, and random histories run on either."""

import random
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.engine.stub_engine import preempt_last
from wedlm.algorithm.params import DECODINGS
from wedlm.engine.engine import Engine
from wedlm.engine.factory import Blueprint
from wedlm.engine.llm import LLM
from wedlm.engine.options import EngineOptions
from wedlm.engine.ranks.group import add_up
from wedlm.engine.sampling_params import SamplingParams
from wedlm.model import ModelConfig
from wedlm.model.sharding import Shard


class Columns(nn.Module):
    """A column-sharded product, each rank's by itself. ``owners``: by part (q, k, v) and rank, rows of the weight."""

    def __init__(self, weight: Tensor, owners: list[list[slice]]) -> None:
        super().__init__()
        self.weights = [torch.cat([weight[part[rank]] for part in owners]) for rank in range(len(owners[0]))]
        self.owners, self.size = owners, len(weight)

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:-1], self.size)
        for rank, weight in enumerate(self.weights):
            y = F.linear(x, weight)
            at = 0
            for part in self.owners:
                count = part[rank].stop - part[rank].start
                out[..., part[rank]] = y[..., at : at + count]
                at += count
        return out


class Rows(nn.Module):
    """A row-sharded product: the ranks' parts are added up in their order."""

    def __init__(self, weight: Tensor, size: int) -> None:
        super().__init__()
        self.weights = [part.contiguous() for part in weight.chunk(size, dim=1)]

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.linear(a.contiguous(), w) for a, w in zip(x.chunk(len(self.weights), -1), self.weights, strict=True)]
        return add_up(torch.stack(parts))


def chunk(llm: LLM, config: ModelConfig, size: int) -> None:
    """Let a float32 model of one process compute as ``size`` ranks do, bit for bit."""
    shards = [Shard(config, rank, size) for rank in range(size)]

    def rows(name: str, length: int, first: int) -> list[slice]:
        cuts = [shard.cut(f"{name}.weight", (length, 1)).rows for shard in shards]
        return [slice(first + cut.start, first + cut.stop) for cut in cuts]

    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    inner = config.intermediate_size
    for layer in llm.model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        owners = [rows("q_proj", q, 0), rows("k_proj", kv, q), rows("v_proj", kv, q + kv)]
        attention.qkv_proj = Columns(attention.qkv_proj.weight, owners)
        attention.o_proj = Rows(attention.o_proj.weight, size)
        owners = [rows("gate_proj", inner, 0), rows("up_proj", inner, inner)]
        mlp.gate_up_proj = Columns(mlp.gate_up_proj.weight, owners)
        mlp.down_proj = Rows(mlp.down_proj.weight, size)
    llm.model.lm_head = Columns(llm.model.lm_head.weight, [rows("lm_head", config.vocab_size, 0)])


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        decoding=rng.choice(DECODINGS),
        max_tokens=rng.randint(1, 10),
        min_tokens=rng.choice([0, 0, 1]),
        temperature=rng.choice([0.0, 1.0]),
        top_k=rng.choice([0, 0, 0, 3]),
        top_p=rng.choice([1.0, 1.0, 1.0, 0.8]),
        seed=rng.randrange(2**63),
        stop_token_ids=rng.choice([(), (), (3,), (3, 5)]),
        logprobs=rng.choice([None, None, None, 2]),
        wedlm_window_size=rng.randint(1, 9),
        wedlm_entropy_threshold=rng.choice([None, 0.4, 1.5]),
        wedlm_draft_entropy=rng.choice([0.5, 1.5, 5.0]),
        wedlm_lookup_drafts=rng.choice([None, None, 0, 3]),
        presence_penalty=rng.choice([0.0, 0.0, 0.0, 0.5]),
    )


def engine_of(blueprint: Blueprint, rng: random.Random) -> Engine:
    """An engine with little room. What steps cost is made up, so that auto decoding does the same on all."""
    page_size = rng.choice([1, 4, 16])
    options = EngineOptions(
        **{
            **{name: getattr(blueprint.config.options, name) for name in EngineOptions.__dataclass_fields__},
            "max_num_seqs": rng.randint(1, 5),
            "max_num_batched_tokens": rng.choice([18, 24, 64]),
        }
    )
    pages = -(-96 // page_size) + rng.randint(0, 60 // page_size)
    small = replace(blueprint, num_pages=pages, page_size=page_size, config=replace(blueprint.config, options=options))
    ticks = iter(range(10**9))
    engine = small.build(clock=lambda: next(ticks) * 1e-3)
    engine.runner.measure_costs = lambda costs, _: costs.most_rows or [costs.add(1, 1.0), costs.add(2, 1.1)]
    return engine


def run_history(build: Callable[[random.Random], Engine], seed: int) -> tuple[dict[str, list[int]], dict[str, int]]:
    """(tokens by request, of those that were not aborted; how often each interesting thing happened)."""
    rng = random.Random(seed)
    engine = build(rng)
    vocab = engine.config.vocab_size
    stems = [[rng.randrange(vocab) for _ in range(30)] for _ in range(2)]
    requests, aborted = {}, set()
    for _ in range(rng.randint(4, 11)):
        action = rng.random()
        if action < 0.4:
            stem = rng.choice(stems)
            prompt = stem[: rng.randint(1, 30)] + [rng.randrange(vocab) for _ in range(rng.choice([0, 1, 9]))]
            params, name = random_params(rng), f"r{len(requests)}"
            requests[name] = engine.add(name, prompt, params, streamed=rng.random() < 0.5)
        elif action < 0.45 and engine.requests:
            aborted.add(name := rng.choice(sorted(engine.requests)))
            engine.abort(name)
        elif not (action < 0.5 and preempt_last(engine)):
            engine.step()
    while engine.has_work:
        engine.step()
    engine.pool.check_integrity()
    assert engine.pool.num_available == engine.pool.num_pages
    counts = {
        "requests": len(requests),
        "preempted": sum(one.progress.num_preemptions for one in requests.values()),
        "reused": sum(one.progress.num_reused for one in requests.values()),
        "accepted drafts": sum(one.counters.num_accepted for one in requests.values()),
    }
    return {name: one.output_token_ids for name, one in requests.items() if name not in aborted}, counts
