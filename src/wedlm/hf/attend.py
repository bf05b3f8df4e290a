# SPDX-License-Identifier: Apache-2.0
"""Attention of a padded batch: N sequences of R rows each, without a cache."""

from torch import Tensor
from torch.nn import functional as F


class PaddedCausalAttend:
    """``Attend`` for rows flattened to T = N · R: row i of a sequence sees those of its rows 0..i that are not padding.

    ``real_NR`` (bool, padding on either side) None means that there is no padding. A padded row also sees itself, since
    the softmax over nothing is undefined; no real row sees it.
    """

    def __init__(self, num_sequences: int, real_NR: Tensor | None) -> None:
        self.num_sequences = num_sequences
        self.visible: Tensor | None = None
        if real_NR is not None:
            num_rows = real_NR.shape[1]
            rows = real_NR.new_ones(num_rows, num_rows)
            self.visible = ((rows.tril() & real_NR[:, None]) | rows.tril() & rows.triu())[:, None]

    def __call__(self, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (self.num_sequences, -1)).transpose(1, 2) for x in (q_THD, k_TKD, v_TKD))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.visible, is_causal=self.visible is None, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(0, 1)


def real_rows(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """Which rows [N, R] are not padding; None if all are. Raises ValueError for a mask of another shape."""
    if input_ids.ndim != 2 or not len(input_ids):
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}; expected [batch, rows]")
    if attention_mask is None:
        return None
    if attention_mask.shape != input_ids.shape:
        shapes = (list(attention_mask.shape), list(input_ids.shape))
        raise ValueError(f"attention_mask has shape {shapes[0]}; expected {shapes[1]}, that of input_ids")
    real = attention_mask.bool()
    return None if bool(real.all()) else real
