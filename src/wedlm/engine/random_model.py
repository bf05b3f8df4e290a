# SPDX-License-Identifier: Apache-2.0
"""A model of random weights, for measurements: what a step costs does not depend on their values."""

import torch

from wedlm.engine.factory import prepare_model
from wedlm.model import ModelConfig, Transformer
from wedlm.model.inference.layers import Quantization
from wedlm.model.rope import inverse_frequencies
from wedlm.native import NativeTransformer


def random_model(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    quantize_head: bool = False,
) -> Transformer | NativeTransformer:
    """Make random weights on the device, in the form that an engine runs; they are always the same."""
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02, generator=generator) if parameter.ndim > 1 else parameter.fill_(1.0)
    model.model.rotary.inv_freq = inverse_frequencies(config)[0].to(device)
    return prepare_model(model, quantization, quantize_head)
