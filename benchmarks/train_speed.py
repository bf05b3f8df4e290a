# SPDX-License-Identifier: Apache-2.0
"""Training throughput on random weights and random text: clean tokens a second, memory, share of the peak.

    python benchmarks/train_speed.py --shape smollm2-135m --batch 24
    python benchmarks/train_speed.py --shape qwen3-8b --batch 2 --lora-rank 16

A step is forward, backward, clipping and AdamW over one micro-batch of packed documents. Operations are counted as
6 x weights x rows (4 for frozen weights, which have no gradient) plus attention over the pairs that see each other,
forward and twice that backward. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch

from wedlm.algorithm.dual_stream import PADDING
from wedlm.attention.dual_stream import choose_training_backend
from wedlm.model.config import ModelConfig
from wedlm.model.transformer import Transformer
from wedlm.train.batch import TrainBatch, collate, noised_rows
from wedlm.train.config import TrainConfig
from wedlm.train.data import PackedSequence
from wedlm.train.lora import add_lora
from wedlm.train.optimizer import make_optimizer
from wedlm.train.step import TrainingModel, prepare_layers

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        **{"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536},
        **{"num_layers": 30, "num_heads": 9, "num_kv_heads": 3, "head_dim": 64, "tie_word_embeddings": True},
    },
    "qwen3-8b": {
        **{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288},
        **{"num_layers": 36, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "qk_norm": True},
    },
    "tiny": {
        **{"model_type": "llama", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 128},
        **{"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    },
}
COMMON = {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_position_embeddings": 8192}
MASK = 16


def packed_sequence(length: int, document_length: int, vocab_size: int, rng: np.random.Generator) -> PackedSequence:
    """Documents of exponentially distributed lengths around ``document_length``, all tokens trainable."""
    documents, positions = np.empty(length, dtype=np.int64), np.empty(length, dtype=np.int64)
    at = number = 0
    while at < length:
        size = min(length - at, 1 + int(rng.exponential(document_length)))
        documents[at : at + size], positions[at : at + size] = number, np.arange(size)
        at, number = at + size, number + 1
    tokens = rng.integers(MASK + 1, vocab_size, length)
    return PackedSequence(tokens, positions, documents, np.ones(length, dtype=bool))


def operations(config: ModelConfig, batch: TrainBatch, lora: bool) -> float:
    """Floating point operations of a step (forward 2, input gradient 2, weight gradient 2 a weight and row)."""
    head = config.vocab_size * config.hidden_size
    attention = config.hidden_size * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    layers = config.num_layers * (attention + 3 * config.hidden_size * config.intermediate_size)
    rows, per_weight = int((batch.document != PADDING).sum()), 4 if lora else 6
    start, end, own = batch.ranges.double()
    row = torch.arange(batch.tokens.shape[1])
    pairs = float(((end - start) + (row - own + 1)).sum())
    attended = 3 * 4 * pairs * config.num_heads * config.head_dim * config.num_layers
    return per_weight * (layers * rows + head * int((batch.weight + batch.is_ar > 0).sum())) + attended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=24, help="sequences")
    parser.add_argument("--length", type=int, default=2048, help="clean tokens a sequence")
    parser.add_argument("--document-length", type=int, default=300, help="mean, tokens")
    parser.add_argument("--suffix-noise", type=float, default=0.5)
    parser.add_argument("--objective", choices=("wedlm", "autoregressive"), default="wedlm")
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="of the device in bfloat16, for utilisation")
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train = TrainConfig(
        model_path=arguments.shape, train_data="random", max_seq_length=arguments.length, objective=arguments.objective,
        suffix_noise=arguments.suffix_noise, block_size=16, lora_rank=arguments.lora_rank,
    )  # fmt: skip
    config = ModelConfig(**SHAPES[arguments.shape], **COMMON)
    rng = np.random.default_rng(0)
    rows = [
        packed_sequence(arguments.length, arguments.document_length, config.vocab_size, rng)
        for _ in range(arguments.batch)
    ]
    batch = collate([noised_rows(row, index, train, MASK) for index, row in enumerate(rows)])
    lora = arguments.lora_rank > 0
    torch.set_default_dtype(torch.bfloat16 if lora else torch.float32)
    with device:
        transformer = Transformer(config)
    torch.set_default_dtype(torch.float32)
    if lora:
        add_lora(transformer, train)
    prepare_layers(transformer, device.type == "cuda", arguments.activation_checkpointing)
    model = TrainingModel(transformer, choose_training_backend("auto", device), MASK, lora).to(device)
    optimizer = make_optimizer(model, train, device)

    def step() -> float:
        on_device = batch.to(device, batch.totals(), 1.0)
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(on_device).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for the device

    began = time.perf_counter()
    step()
    first = time.perf_counter() - began
    step()
    seconds = []
    for _ in range(arguments.steps):
        began = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    done = operations(config, batch, lora)
    report = {
        **vars(arguments),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "clean_tokens": batch.num_clean_tokens,
        "step_ms": round(median * 1e3, 1),
        "step_ms_range": [round(min(seconds) * 1e3, 1), round(max(seconds) * 1e3, 1)],
        "clean_tokens_per_second": round(batch.num_clean_tokens / median),
        "tflops": round(done / median / 1e12, 1),
        "utilisation": round(done / median / 1e12 / arguments.peak_tflops, 3),
        "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if device.type == "cuda" else None,
        "first_step_s": round(first, 1),
        "loss": round(loss, 3),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
