# SPDX-License-Identifier: Apache-2.0
"""What eight bits cost the demo model, on text: top-1 agreement, KL and perplexity against float32; last line JSON.

    python benchmarks/native_quality.py wikitext2_test.txt.gz --tokens 8192

The text is cut into contexts of 512 tokens; every position counts. Also each GGUF file given, against its own
dequantised weights (``--gguf``).
"""

import argparse
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from wedlm.attention.sdpa import CausalAttend
from wedlm.model import load_model, load_tokenizer
from wedlm.model.formats.gguf_file import GGUFFile
from wedlm.native.weights import native_from_gguf, native_from_torch

CONTEXT = 512


def contexts(path: Path, num_tokens: int) -> Iterator[Tensor]:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    ids = load_tokenizer("demo").encode(text[: num_tokens * 8])[:num_tokens]
    yield from torch.tensor(ids).split(CONTEXT)


@torch.inference_mode()
def compare(reference: Callable[..., Tensor], other: Callable[..., Tensor], texts: list[Tensor]) -> dict[str, float]:
    """Means over all positions; perplexities of the next token."""
    agree, kl, losses, count, predicted = 0.0, 0.0, [0.0, 0.0], 0, 0
    for tokens in texts:
        positions = torch.arange(len(tokens))
        logprobs = [model(tokens, positions, CausalAttend()).float().log_softmax(-1) for model in (reference, other)]
        agree += (logprobs[0].argmax(-1) == logprobs[1].argmax(-1)).sum().item()
        kl += (logprobs[0].exp() * (logprobs[0] - logprobs[1])).sum().item()
        for i, values in enumerate(logprobs):
            losses[i] -= values[:-1].gather(1, tokens[1:, None]).sum().item()
        count += len(tokens)
        predicted += len(tokens) - 1
    before, after = (float(torch.tensor(loss / predicted).exp()) for loss in losses)
    return {
        "top1": agree / count,
        "kl": kl / count,
        "perplexity_float32": before,
        "perplexity": after,
        "change": after / before - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--gguf", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    texts = list(contexts(args.text, args.tokens))
    record: dict[str, object] = {"benchmark": "native_quality", "tokens": args.tokens, "context": CONTEXT}
    model, _ = load_model("demo", torch.float32)
    record["demo, int8"] = compare(model, native_from_torch(model, "int8"), texts)
    for path in args.gguf:
        exact, _ = load_model(path, torch.float32)
        record[path.name] = compare(exact, native_from_gguf(GGUFFile(path)), texts)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
