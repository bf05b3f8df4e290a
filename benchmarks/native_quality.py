# SPDX-License-Identifier: Apache-2.0
"""What few bits cost the demo model, on text: top-1 agreement, KL and perplexity against float32; last line JSON.

    python benchmarks/native_quality.py wikitext2_test.txt.gz --tokens 8192

The text is cut into contexts of 512 tokens; every position counts. In int8 the cache is float32, then int8, which is
also measured beside float32 weights. ``--types`` (GGUF types of `wedlm quantize`) and ``--gguf FILES`` are measured
against their own dequantised weights, the former against the checkpoint, too.
"""

import argparse
import gzip
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from wedlm.attention.base import ExtendBatch, KVCache
from wedlm.attention.sdpa import CausalAttend
from wedlm.model import load_model, load_tokenizer
from wedlm.model.formats.gguf_file import GGUFFile
from wedlm.model.quantize_checkpoint import quantize_checkpoint
from wedlm.native import NativeAttend, NativeTransformer
from wedlm.native.weights import native_from_gguf, native_from_torch

CONTEXT = 512
Model = Callable[[Tensor, Tensor, CausalAttend], Tensor]


def contexts(path: Path, num_tokens: int) -> Iterator[Tensor]:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    ids = load_tokenizer("demo").encode(text[: num_tokens * 8])[:num_tokens]
    yield from torch.tensor(ids).split(CONTEXT)


def _logprobs(model: Model, tokens: Tensor) -> Tensor:
    positions = torch.arange(len(tokens), device=tokens.device)
    return model(tokens, positions, CausalAttend()).float().log_softmax(-1)


def _loss(logprobs: Tensor, tokens: Tensor) -> float:
    return -logprobs[:-1].gather(1, tokens[1:, None]).sum().item()


@torch.inference_mode()
def compare(
    reference: Model, others: Mapping[str, Callable[[], Model]], texts: Sequence[Tensor]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Of each other model, made when it is its turn: means over all positions; perplexities of the next token."""
    expected = [_logprobs(reference, tokens) for tokens in texts]  # 100 MB a context
    predicted = sum(len(tokens) - 1 for tokens in texts)
    before = sum(_loss(exact, tokens) for exact, tokens in zip(expected, texts, strict=True)) / predicted
    for name, make in others.items():
        model, agree, kl, loss = make(), 0.0, 0.0, 0.0
        for exact, tokens in zip(expected, texts, strict=True):
            found = _logprobs(model, tokens)
            agree += (exact.argmax(-1) == found.argmax(-1)).sum().item()
            kl += (exact.exp() * (exact - found)).sum().item()
            loss += _loss(found, tokens)
        count, after = sum(map(len, texts)), loss / predicted
        perplexities = [float(torch.tensor(mean).exp()) for mean in (before, after)]
        yield (
            name,
            {
                "top1": agree / count,
                "kl": kl / count,
                "perplexity_float32": perplexities[0],
                "perplexity": perplexities[1],
                "change": perplexities[1] / perplexities[0] - 1,
            },
        )


def in_cache(native: NativeTransformer, dtype: torch.dtype) -> Model:
    """``native`` with keys and values of one sequence in ``dtype``."""
    shape = native.config
    sizes = shape.num_layers, 1, CONTEXT, shape.num_kv_heads, shape.head_dim
    cache = KVCache(*sizes, dtype, torch.device("cpu"))

    def run(tokens: Tensor, positions: Tensor, _: CausalAttend) -> Tensor:
        return native(tokens, positions, NativeAttend(cache, ExtendBatch([0], [len(tokens)], [[0]])))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--types", nargs="*", default=[])
    parser.add_argument("--gguf", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    texts = list(contexts(args.text, args.tokens))
    results: dict[str, dict[str, float]] = {}
    print("| weights | top-1 | KL | perplexity, wide | perplexity | change |\n| --- | --- | --- | --- | --- | --- |")

    def measure(reference: Model, others: Mapping[str, Callable[[], Model]]) -> None:
        for name, one in compare(reference, others, texts):
            results[name] = one
            perplexities = f"{one['perplexity_float32']:.3f} | {one['perplexity']:.3f} | {one['change']:+.2%}"
            print(f"| {name} | {one['top1']:.2%} | {one['kl']:.5f} | {perplexities} |", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        written = [Path(folder) / f"{kind}.gguf" for kind in args.types]
        for path in written:
            quantize_checkpoint("demo", path, type=path.stem)
        model, _ = load_model("demo", torch.float32)
        native = native_from_torch(model, "int8")
        caches = {"int8": torch.float32, "int8, cache in int8": torch.int8}
        others: dict[str, Callable[[], Model]] = {name: partial(in_cache, native, one) for name, one in caches.items()}
        others["float32, cache in int8"] = lambda: in_cache(native_from_torch(model, None), torch.int8)
        for path in written:
            others[f"{path.stem}, against the checkpoint"] = partial(native_from_gguf, GGUFFile(path))
        measure(model, others)
        measure(in_cache(native, torch.float32), {"cache in int8, against int8": others["int8, cache in int8"]})
        for path in (*written, *args.gguf):
            exact, _ = load_model(path, torch.float32)
            measure(exact, {path.stem: partial(native_from_gguf, GGUFFile(path))})
    print(json.dumps({"benchmark": "native_quality", "tokens": args.tokens, "context": CONTEXT, "results": results}))


if __name__ == "__main__":
    main()
