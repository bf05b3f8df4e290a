# SPDX-License-Identifier: Apache-2.0
"""Where int8's loss on the demo model comes from: roundings emulated in float32, one by one; last line JSON.

    python benchmarks/int8_sources.py wikitext2_test.txt.gz --tokens 2048

Weights are rounded by output or in blocks of inputs, inputs in blocks, in all places or in one; "rotated" turns the
residual stream and the values by orthogonal matrices folded into the weights, which changes nothing before rounding.
"""

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from native_quality import compare, contexts
from torch import Tensor, nn

from wedlm.model import Transformer, load_model

PLACES = {
    "embedding": ("embed_tokens",),
    "q, k, v": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate, up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
    "head": ("lm_head",),
}


@dataclass(frozen=True)
class Rounding:
    """Numbers that share a scale, of weights and inputs (0: all of a row; None: not rounded), bits of the inputs, and
    what is left as it is: places by name, and layers."""

    weights: int | None = 0
    inputs: int | None = 32
    input_bits: int = 8
    exact_weights: tuple[str, ...] = ()
    exact_inputs: tuple[str, ...] = ()
    exact_layers: tuple[int, ...] = ()
    rotated: bool = False
    clipped: bool = False


def rounded(x: Tensor, block: int, bits: int = 8, clipped: bool = False) -> Tensor:
    """Each ``block`` of a row of x [R, C] in whole multiples of its scale; ``clipped``: the scale of least squares."""
    size = x.shape[1] if block == 0 else block
    parts = nn.functional.pad(x, (0, -x.shape[1] % size)).unflatten(1, (-1, size))
    most = 2 ** (bits - 1) - 1
    scale = parts.abs().amax(-1, keepdim=True).clamp(min=1e-30) / most

    def by(factor: float) -> Tensor:
        own = scale * factor
        return (parts / own).round().clamp(-most, most) * own

    best = by(1)
    for factor in (0.95, 0.9, 0.85, 0.8, 0.7) if clipped else ():
        other = by(factor)
        better = ((other - parts) ** 2).sum(-1, keepdim=True) < ((best - parts) ** 2).sum(-1, keepdim=True)
        best = torch.where(better, other, best)
    return best.flatten(1)[:, : x.shape[1]]


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[
        0
    ]


@torch.no_grad()
def rotate(model: Transformer) -> None:
    """Turn the residual stream and each head's values, in place; norms' weights go into the matrices that follow."""
    turn, config = orthogonal(model.config.hidden_size, 1), model.config
    own = orthogonal(config.head_dim, 2)

    def set_to(linear: nn.Module, weight: Tensor) -> None:
        linear.weight = nn.Parameter(weight.float())

    head = model.lm_head.weight.double() * model.model.norm.weight.double() @ turn
    set_to(model.model.embed_tokens, model.model.embed_tokens.weight.double() @ turn)
    set_to(model.lm_head, head)
    model.model.norm.weight.fill_(1)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            for reader in readers:
                set_to(reader, reader.weight.double() * norm.weight.double() @ turn)
            norm.weight.fill_(1)
        values = attention.v_proj.weight.double().unflatten(0, (-1, config.head_dim))
        set_to(attention.v_proj, torch.einsum("de,kdc->kec", own, values).flatten(0, 1))
        out = attention.o_proj.weight.double().unflatten(1, (-1, config.head_dim))
        set_to(attention.o_proj, turn.T @ (out @ own).flatten(1))
        set_to(mlp.down_proj, turn.T @ mlp.down_proj.weight.double())


@torch.no_grad()
def emulated(model: Transformer, how: Rounding) -> Transformer:
    model = copy.deepcopy(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())
    if how.rotated:
        rotate(model)
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        place = next((place for place, leaves in PLACES.items() if leaf in leaves), None)
        if place is None or any(f".{layer}." in name for layer in how.exact_layers):
            continue
        if how.weights is not None and place not in how.exact_weights:
            module.weight.copy_(rounded(module.weight, how.weights, clipped=how.clipped))
        if how.inputs is not None and place not in how.exact_inputs and isinstance(module, nn.Linear):
            act = partial(rounded, block=how.inputs, bits=how.input_bits)
            module.register_forward_pre_hook(lambda _, args, act=act: (act(args[0]),))
    return model


def variants(num_layers: int) -> dict[str, Rounding]:
    shipped = Rounding()
    only_weights, only_inputs = Rounding(inputs=None), Rounding(weights=None)
    found = {
        "int8 as it is: weights by output, inputs by 32": shipped,
        "weights by output alone": only_weights,
        "weights by output, least squares, alone": replace(only_weights, clipped=True),
        "weights by 64 alone": replace(only_weights, weights=64),
        "weights by 32 alone": replace(only_weights, weights=32),
        "inputs by 64 alone": replace(only_inputs, inputs=64),
        "inputs by 32 alone": only_inputs,
        "inputs by 16 alone": replace(only_inputs, inputs=16),
        "inputs by 32 alone, 9 bits": replace(only_inputs, input_bits=9),
        "inputs by 32 alone, 10 bits": replace(only_inputs, input_bits=10),
        "weights by 32, inputs by 32": replace(shipped, weights=32),
        "weights by 64, inputs by 32": replace(shipped, weights=64),
        "weights by 32, inputs by 16": replace(shipped, weights=32, inputs=16),
        "weights by 32, inputs by 32 with 10 bits": replace(shipped, weights=32, input_bits=10),
        "rotated": replace(shipped, rotated=True),
        "rotated, weights by 32": replace(shipped, rotated=True, weights=32),
        "head exact": replace(shipped, exact_weights=("head",), exact_inputs=("head",)),
        "first two and last two layers exact": replace(shipped, exact_layers=(0, 1, num_layers - 2, num_layers - 1)),
    }
    for place in PLACES:
        others = tuple(other for other in PLACES if other != place)
        if place != "embedding":
            found[f"inputs by 32 of {place} alone"] = replace(only_inputs, exact_inputs=others)
        found[f"weights by output of {place} alone"] = replace(only_weights, exact_weights=others)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--only", nargs="*", default=[], help="variants by name; all")
    args = parser.parse_args()
    torch.manual_seed(0)
    model, config = load_model("demo", torch.float32)
    texts = list(contexts(args.text, args.tokens))
    chosen = {name: how for name, how in variants(config.num_layers).items() if name in args.only or not args.only}
    models: dict[str, Callable[[], Transformer]] = {name: partial(emulated, model, how) for name, how in chosen.items()}
    print("| rounding | top-1 | KL | perplexity |\n| --- | --- | --- | --- |")
    results = {}
    for name, figures in compare(model, models, texts):
        results[name] = figures
        print(f"| {name} | {figures['top1']:.2%} | {figures['kl']:.5f} | {figures['change']:+.2%} |", flush=True)
    print(json.dumps({"benchmark": "int8_sources", "tokens": args.tokens, "results": results}))


if __name__ == "__main__":
    main()
