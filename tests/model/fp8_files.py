# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints in FP8, in each layout, and beside each what it stands for in float32."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.model.tiny import hf_config, our_model
from wedlm.model import ModelConfig, save_model
from wedlm.model.formats.fp8_checkpoint import BLOCK
from wedlm.model.inference.quantization import FP8, quantize

WEIGHTS = "model.safetensors"
# More than one block each way, the last of them cut; multiples of 16, as FP8 products need.
SHAPE = {"hidden_size": 144, "intermediate_size": 272, "num_hidden_layers": 2}
BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
TENSORS = {"quant_method": "fp8", "activation_scheme": "static"}
_GROUP = {"targets": ["Linear"], "weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": _GROUP},
    "ignore": ["lm_head"],
}
LAYOUTS: dict[str, dict[str, Any]] = {"blocks": BLOCKS, "one": TENSORS, "outputs": COMPRESSED}


def rounded(weight: Tensor, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """(values, scale as the layout stores it, what they stand for) of a weight."""
    if layout == "one":
        values, scale = quantize(weight.reshape(1, -1))
        return values.view(weight.shape), scale.reshape(()), values.view(weight.shape).float() * scale
    if layout == "outputs":
        values, scale = quantize(weight)
        scale = scale.bfloat16()[:, None]
        return values, scale, values.float() * scale.float()
    outputs, inputs = weight.shape
    values, exact = torch.empty(weight.shape, dtype=FP8), torch.empty_like(weight)
    scales = torch.empty(-(-outputs // BLOCK), -(-inputs // BLOCK), dtype=torch.bfloat16)
    for r in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            place = slice(r * BLOCK, (r + 1) * BLOCK), slice(c * BLOCK, (c + 1) * BLOCK)
            part = weight[place]
            scales[r, c] = part.abs().max() / 400
            values[place] = (part / scales[r, c].float()).to(FP8)
            exact[place] = values[place].float() * scales[r, c].float()
    return values, scales, exact


def save_fp8(directory: Path, layout: str, kind: str = "wedlm-qwen3") -> Path:
    """A checkpoint in FP8, and beside it, in ``twin``, what it stands for in float32."""
    model = our_model(kind, **SHAPE)
    config = ModelConfig.from_hf(hf_config(kind, **SHAPE))
    save_model(model, config, directory)
    tensors = load_file(directory / WEIGHTS)
    stored, exact = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if ".layers." in name and name.endswith("_proj.weight"):
            stored[name], scale, exact[name] = rounded(tensor, layout)
            stored[f"{name}_scale" + ("_inv" if layout == "blocks" else "")] = scale
            if layout == "one":
                stored[name.replace("weight", "input_scale")] = torch.ones(())
    save_file(stored, directory / WEIGHTS)
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, "quantization_config": LAYOUTS[layout]}))
    save_model(model, config, directory / "twin")
    save_file(exact, directory / "twin" / WEIGHTS)
    return directory
