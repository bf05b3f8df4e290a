# SPDX-License-Identifier: Apache-2.0
"""What ways of rounding to e4m3 cost a model's predictions, emulated in float32 on any device; writes --out.

    python benchmarks/fp8_quality.py wikitext2_test.txt.gz --tokens 4096 --out fp8_quality.json

Perplexity, agreement of the most probable token and KL against float32, in windows of ``--context`` tokens.
``--cache``: only of keys and values in FP8. A model of 135 M parameters is the worst case: larger ones forgive more.
"""

import argparse
import gzip
import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from native_quality import Model, compare
from torch import Tensor, nn
from torch.nn import functional as F

from wedlm.attention.sdpa import CausalAttend
from wedlm.model import load_model, load_tokenizer
from wedlm.model.inference.quantization import FP8, quantize

BLOCK = 128


def by_row(x: Tensor) -> Tensor:
    """Rounded with a scale for each row."""
    values, scale = quantize(x)
    return values.float() * scale[:, None]


def by_block(x: Tensor) -> Tensor:
    """Rounded with a scale for each row's 128 inputs."""
    padded = F.pad(x, (0, -x.shape[1] % BLOCK))
    return by_row(padded.reshape(-1, BLOCK)).view(padded.shape)[:, : x.shape[1]]


def by_square(x: Tensor) -> Tensor:
    """Rounded with a scale for each block of 128 x 128, as Qwen3's own FP8 checkpoints have it."""
    out = torch.empty_like(x)
    for r in range(0, x.shape[0], BLOCK):
        for c in range(0, x.shape[1], BLOCK):
            part = x[r : r + BLOCK, c : c + BLOCK]
            out[r : r + BLOCK, c : c + BLOCK] = by_row(part.reshape(1, -1)).view(part.shape)
    return out


def by_tensor(x: Tensor) -> Tensor:
    """Rounded with one scale."""
    return by_row(x.reshape(1, -1)).view(x.shape)


def least_squares(x: Tensor) -> Tensor:
    """As ``by_row``, with the scale of the least squared error out of 33 within an octave (e4m3 has the same steps at
    each octave, so more are none the wiser)."""
    best, lowest = by_row(x), torch.full((len(x), 1), math.inf)
    lowest = (best - x).square().sum(1, keepdim=True)
    largest = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    for exponent in torch.linspace(0, 1, 33).tolist():
        scale = largest / 448 * 2**exponent
        tried = (x / scale).to(FP8).float() * scale
        error = (tried - x).square().sum(1, keepdim=True)
        best, lowest = torch.where(error < lowest, tried, best), torch.minimum(error, lowest)
    return best


def as_is(x: Tensor) -> Tensor:
    return x


class Rounded(nn.Module):
    """A linear layer of rounded weights and rounded inputs."""

    def __init__(self, linear: nn.Module, weights: Callable[[Tensor], Tensor], inputs: Callable[[Tensor], Tensor]):
        super().__init__()
        self.weight = nn.Parameter(weights(linear.get_parameter("weight").detach().float()), requires_grad=False)
        self.bias, self.inputs = linear.bias, inputs

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inputs(x), self.weight, self.bias)


class RoundedCache(CausalAttend):
    """Keys and values as a cache in FP8 holds them: a scale for each head of a token."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().__call__(layer, q, *(by_row(part.flatten(0, 1)).view(part.shape) for part in (k, v)))


Rounding = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
ROWS: Rounding = (by_row, by_row)


def variants(layers: int) -> dict[str, Callable[[str], Rounding | None]]:
    """By name: how each linear layer is rounded (None: not at all)."""

    def but(pattern: str, head: bool = False) -> Callable[[str], Rounding | None]:
        return lambda name: None if re.search(pattern, name) or (name == "lm_head" and not head) else ROWS

    def all_as(*rounding: Callable[[Tensor], Tensor]) -> Callable[[str], Rounding | None]:
        return lambda name: None if name == "lm_head" else (rounding[0], rounding[1])

    last = layers - 1
    return {
        "rows": but("^$"),
        "rows, the head too": but("^$", True),
        "the head alone": lambda name: ROWS if name == "lm_head" else None,
        "rows, weights alone": all_as(by_row, as_is),
        "rows, inputs alone": all_as(as_is, by_row),
        "rows, weights by least squares": all_as(least_squares, by_row),
        "blocks of 128 inputs": all_as(by_block, by_block),
        "weights by squares of 128, inputs by 128": all_as(by_square, by_block),
        "one scale a tensor": all_as(by_tensor, by_row),
        "rows, but down_proj": but("down_proj"),
        "rows, but o_proj": but("o_proj"),
        "rows, but q, k, v": but(r"[qkv]_proj"),
        "rows, but gate and up": but("gate_proj|up_proj"),
        "rows, but the first layer": but(r"layers\.0\."),
        "rows, but the last layer": but(rf"layers\.{last}\."),
        "rows, but the first and last layer": but(rf"layers\.(0|{last})\."),
        "rows, but two first and two last layers": but(rf"layers\.(0|1|{last - 1}|{last})\."),
        "rows, but the first and last layer and down_proj": but(rf"layers\.(0|{last})\.|down_proj"),
        "rows, weights alone, and the head": lambda name: (by_row, as_is),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--cache", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", help="variants whose name contains this")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    data = args.text.read_bytes()
    text = (gzip.decompress(data) if args.text.suffix == ".gz" else data).decode("utf-8")
    ids = load_tokenizer(args.model).encode(text[: args.tokens * 8], add_special_tokens=False)[: args.tokens]
    texts = [part.to(args.device) for part in torch.tensor(ids).split(args.context)]
    model, config = load_model(args.model, torch.float32, args.device)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found: dict[str, object] = {
        "benchmark": "fp8_quality",
        "model": args.model,
        "tokens": len(ids),
        "context": args.context,
    }

    def made(rounding_of: Callable[[str], Rounding | None]) -> nn.Module:
        for path, linear in linears.items():
            rounding = rounding_of(path)
            model.set_submodule(path, linear if rounding is None else Rounded(linear, *rounding))
        return model

    others: dict[str, Callable[[], Model]] = {"float32": lambda: model}
    if args.cache:
        others["cache"] = lambda: lambda tokens, positions, _: model(tokens, positions, RoundedCache())
    else:
        chosen = variants(config.num_layers).items()
        others |= {name: partial(made, one) for name, one in chosen if args.only is None or args.only in name}
    for name, figures in compare(model, others, texts):
        found[name] = {key: round(figures[key], 6) for key in ("perplexity", "change", "top1", "kl")}
        print(json.dumps({name: found[name]}), flush=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
