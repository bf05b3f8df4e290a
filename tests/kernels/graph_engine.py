# SPDX-License-Identifier: Apache-2.0
"""An engine of a small model on captured steps, or on the plain runner, and what becomes of its requests."""

import torch

from tests.model.masked_adapters import random_lora
from tests.model.tiny import our_model
from wedlm.engine.adapters import Adapters
from wedlm.engine.engine import Engine
from wedlm.engine.execution import graphs as graphs_module
from wedlm.engine.factory import Blueprint
from wedlm.engine.options import EngineConfig, EngineOptions
from wedlm.engine.sampling_params import SamplingParams
from wedlm.model.inference.adapter_bank import AdapterBank
from wedlm.model.inference.layers import pack_for_inference
from wedlm.model.lora.masked_rows import attach_masked_lora
from wedlm.model.lora.row_factors import RowFactors

PAGES, PAGE_SIZE, LENGTH, MASK = 40, 4, 60, 90


def factors() -> list[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    return [random_lora(our_model("wedlm-qwen3", num_hidden_layers=2), rank) for rank in (2, 3, 5)]


def engine(
    device, graphs: bool, max_num_seqs: int = 4, masked_lora: bool = False, length: int = LENGTH, most_rows: int = 64,
    by_name: bool = False, num_pages: int = PAGES,
) -> Engine:  # fmt: skip
    """``by_name``: with the adapters "lora", "masked" and "both"."""
    model = our_model("wedlm-qwen3", num_hidden_layers=2)
    if masked_lora:
        attach_masked_lora(model, random_lora(model), torch.linspace(-1, 1, model.config.hidden_size))
    loras, start = factors(), torch.linspace(1, -1, model.config.hidden_size)
    model = pack_for_inference(model.to(device))
    shape, options = model.config, EngineOptions(max_num_seqs=max_num_seqs, max_num_batched_tokens=most_rows)
    config = EngineConfig(shape.vocab_size, MASK, (5,), length, options)
    packed = model if graphs else None
    adapters = Adapters(AdapterBank(model, 3), 3, 16)
    blueprint = Blueprint(
        model, packed, shape, torch.float32, device, config, num_pages, PAGE_SIZE, None, adapters=adapters
    )
    one = blueprint.build()
    if by_name:
        one.load_adapter("lora", RowFactors(loras[0]))
        one.load_adapter("masked", RowFactors({}, loras[1], start))
        one.load_adapter("both", RowFactors(loras[1], loras[2]))
    return one


def outcomes(one: Engine, requests: list[tuple[list[int], SamplingParams]]) -> tuple[list, list]:
    """All requests, arriving two steps apart, with the engine's adapters in turn."""
    done, names = [], [*one.adapters.names, None]
    for index, request in enumerate(requests):
        done.append(one.add(str(index), *request, adapter=names[index % len(names)]))
        one.step()
        one.step()
        one.pool.check_integrity()
    while one.has_work:
        one.step()
        one.pool.check_integrity()
    assert one._pending is None
    assert one.pool.num_available == one.pool.num_pages
    assert len(one.runner.windows.free_slots) == one.config.options.max_num_seqs
    return [(r.output_token_ids, r.output.token_steps, r.counters.num_rows, r.finish_reason) for r in done], [
        r.output.logprobs for r in done if r.params.logprobs is not None
    ]


def few_rows_beside_chunks(device, monkeypatch) -> None:
    """Interpreted kernels take their time for padding."""
    if device.type == "cpu":
        for name, value in (("_FEWEST_CHUNK_ROWS", 1), ("_FEWEST_BESIDE", 1), ("_CHUNK_SIZES", [1, 2, 4, 16, 64, 128])):
            monkeypatch.setattr(graphs_module, name, value)
