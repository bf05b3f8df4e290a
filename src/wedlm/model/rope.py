# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding (arXiv 2104.09864) and its stretched variants: linear, llama3, YaRN (arXiv 2309.00071).

The arithmetic follows transformers operation by operation, so that checkpoints give the same logits in both.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from wedlm.model.config import ModelConfig, RopeScaling


class RotaryEmbedding(nn.Module):
    """cos and sin of logical positions, computed once per step and shared by all layers.

    The frequencies stay float32 whatever type the model is moved to: rounded to bfloat16 they would be off by whole
    turns at long positions. They are computed, never loaded, and therefore on the CPU even when the model is built on
    meta.
    """

    inv_freq: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inv_freq, self.attention_factor = inverse_frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos_TD, sin_TD) of ``dtype`` for int64 positions [T], as ``rotate`` takes them; D is the head dimension.

        cos holds each angle twice; sin likewise, the first half negated.
        """
        half_TE = positions_T[:, None].float() * self.inv_freq
        cos_TE, sin_TE = half_TE.cos() * self.attention_factor, half_TE.sin() * self.attention_factor
        cos_TD, sin_TD = torch.cat((cos_TE, cos_TE), dim=-1), torch.cat((-sin_TE, sin_TE), dim=-1)
        return cos_TD.to(dtype), sin_TD.to(dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        exact = self.inv_freq
        super()._apply(fn, recurse)
        self.inv_freq = exact.to(self.inv_freq.device)
        return self


def rotate(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Queries or keys turned by the angles of their rows; the pairs are (d, d + D/2), Hugging Face's layout."""
    partner_THD = x_THD.roll(x_THD.shape[-1] // 2, dims=-1)
    return torch.addcmul(x_THD * cos_TD[:, None], partner_THD, sin_TD[:, None]).to(x_THD.dtype)


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """(radians per position, float32 [head_dim / 2]; the factor that multiplies cos and sin)."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    period = config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0 / period, 1.0
    if scaling.rope_type == "linear":
        return 1.0 / period / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(1.0 / period, scaling), 1.0
    return _yarn(period, config.rope_theta, config.head_dim, scaling), _yarn_attention_factor(scaling)


def _llama3(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Keep short wavelengths, divide long ones by the factor, blend in between."""
    original = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / inv_freq
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = (original / wavelength - low) / (high - low)
    blended = (1 - blend) * inv_freq / scaling.factor + blend * inv_freq
    stretched = torch.where(wavelength > original / low, inv_freq / scaling.factor, blended)
    return torch.where(wavelength < original / high, inv_freq, stretched)


def _yarn(period: Tensor, theta: float, head_dim: int, scaling: RopeScaling) -> Tensor:
    """Keep the dimensions that turn often within the original length, interpolate those that turn rarely."""

    def dimension_turning(num_turns: float) -> float:
        original = scaling.original_max_position_embeddings
        return head_dim * math.log(original / (num_turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_turning(scaling.beta_fast), dimension_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = (high - low) or 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (scaling.factor * period) * (1 - keep) + 1.0 / period * keep


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    def mscale(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)
