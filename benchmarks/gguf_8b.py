# SPDX-License-Identifier: Apache-2.0
"""A Q4_K file of an 8B shape on a CPU: memory beside the file's size, and the time of a step; last line JSON.

    python benchmarks/gguf_8b.py FOLDER --output benchmarks/results/gguf_8b.json

Writes FOLDER/qwen3-8b-q4_k.gguf (about 4.8 GB of random blocks) if it is not there. What runs is a process of its own,
whose peak memory is that of loading and decoding together, less what imports take. Random weights refuse every draft,
so ``auto`` chooses AR or drafts from the text; the times of verified steps show what further rows cost. With
``--llamacpp``, llama.cpp's wheel runs the same file, before and after us.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

from wedlm import LLM, SamplingParams
from wedlm.bench.llamacpp import Serving, serving
from wedlm.bench.shapes import SHAPES, shape_config
from wedlm.machine import cpu_name, memory_bytes
from wedlm.model import ModelConfig, Transformer
from wedlm.model.formats.gguf_model import gguf_name
from wedlm.model.formats.gguf_write import add_gguf_config, tensor_type
from wedlm.native import NativeTransformer

CACHE_BYTES = 2**28
# Where in a block the float16 scales lie, and what they are so that weights have a standard deviation near 0.02.
SCALES = {"Q4_K": ((0, 8e-5), (2, 6e-4)), "Q6_K": ((208, 1.6e-5),)}


def write_file(path: Path, config: ModelConfig) -> None:
    """Random blocks, one piece of them again and again."""
    with torch.device("meta"):
        shapes = {gguf_name(name): tuple(one.shape) for name, one in Transformer(config).named_parameters()}
    writer = GGUFWriter(path, config.model_type)
    add_gguf_config(writer, config)
    tokens = [f"t{i}" for i in range(config.vocab_size)]
    tokens[:3] = ["a", "b", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    kinds = {name: tensor_type("q4_k", name, shape, config) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        elements, size = GGML_QUANT_SIZES[kinds[name]]
        row = shape[-1] // elements * size
        count = int(np.prod(shape[:-1], dtype=np.int64)) * row
        writer.add_tensor_info(name, [*shape[:-1], row], np.dtype(np.uint8), count, kinds[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    pieces = {kind: random_blocks(kind) for kind in set(kinds.values()) if kind != GGMLQuantizationType.F32}
    for name, shape in shapes.items():
        if kinds[name] == GGMLQuantizationType.F32:
            writer.write_tensor_data(np.ones(shape, dtype=np.float32).view(np.uint8))
            continue
        elements, size = GGML_QUANT_SIZES[kinds[name]]
        blocks = int(np.prod(shape, dtype=np.int64)) // elements
        writer.write_tensor_data(np.resize(pieces[kinds[name]], (blocks, size)))
    writer.close()


def random_blocks(kind: GGMLQuantizationType, count: int = 100_003) -> np.ndarray:
    blocks = np.random.default_rng(0).integers(0, 256, (count, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    for at, value in SCALES[kind.name]:
        blocks[:, at : at + 2] = np.frombuffer(np.float16(value).tobytes(), dtype=np.uint8)
    return blocks


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(path: Path, num_tokens: int) -> dict[str, object]:
    before, start = peak_bytes(), time.perf_counter()
    mask = SHAPES["qwen3-8b"]["vocab_size"] - 1
    llm = LLM(path, device="cpu", max_model_len=1024, kv_cache_bytes=CACHE_BYTES, mask_token_id=mask)
    assert isinstance(llm.model, NativeTransformer)
    loaded, seconds = peak_bytes() - before, time.perf_counter() - start
    prompt, figures = list(range(100, 132)), {}
    for name, decoding, rows in (
        ("AR", "autoregressive", 1), ("verified, 8 rows", "verified", 8), ("verified, 16 rows", "verified", 16),
        ("auto", "auto", 16),
    ):  # fmt: skip
        params = SamplingParams(
            max_tokens=num_tokens, temperature=0.0, ignore_eos=True, decoding=decoding, wedlm_window_size=rows,
            wedlm_draft_entropy=100.0,
        )  # fmt: skip
        llm.generate(prompt, params, progress=False)  # the prompt is cached and rows are timed
        stats = llm.generate(prompt, params, progress=False)[0].stats
        assert stats is not None
        figures[name] = {
            "tokens_per_second": stats.tokens_per_second,
            "tokens_per_forward": stats.tokens_per_forward,
            "ms_per_forward": 1000 * num_tokens / stats.tokens_per_second / stats.num_forwards,
        }
    return {
        "loading_s": seconds,
        "peak_bytes_of_loading": loaded,
        "peak_bytes": peak_bytes() - before,
        "weight_bytes": llm.model.num_bytes,
        "engine": llm.describe(),
        "decoding": figures,
    }


def llamacpp_step_ms(path: Path, threads: int, num_tokens: int) -> float:
    with serving(Serving(str(path), threads, context=512)) as (server,):
        server.complete(list(range(100, 132)), 2, ignore_eos=True)
        return server.complete(list(range(100, 132)), num_tokens, ignore_eos=True)["step_ms"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--llamacpp", action="store_true", help="run llama.cpp on the file, too")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    path = args.folder / "qwen3-8b-q4_k.gguf"
    if args.measure:
        print(json.dumps(measure(path, args.tokens)))
        return
    if not path.is_file():
        write_file(path, shape_config("qwen3-8b"))
    threads = torch.get_num_threads()
    theirs = [llamacpp_step_ms(path, threads, args.tokens)] if args.llamacpp else []
    command = [sys.executable, __file__, str(args.folder), "--tokens", str(args.tokens), "--measure"]
    ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found, size = json.loads(ran.stdout.splitlines()[-1]), path.stat().st_size
    record = {
        "benchmark": "gguf_8b",
        "cpu": cpu_name(),
        "memory_bytes": memory_bytes(),
        "file_bytes": size,
        "cache_bytes": CACHE_BYTES,
        **found,
        "memory_to_file": (found["peak_bytes"] - CACHE_BYTES) / size,
    }
    if args.llamacpp:
        record["llamacpp_step_ms"] = [*theirs, llamacpp_step_ms(path, threads, args.tokens)]
    if args.output is not None:
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
