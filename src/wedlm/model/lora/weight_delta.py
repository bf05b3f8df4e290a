# SPDX-License-Identifier: Apache-2.0
"""Stores a fine-tuned model as a 4-bit low-rank delta over a public base model.

The delta of a weight is B A, the product of a LoRA's matrices. Each matrix [O, I] is stored as codes (two to a byte), a
scale a row, a scale a column and its sixteen levels: value = level[code] · row · column. Embedding rows are stored
whole.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wedlm.model.errors import CheckpointError, reading
from wedlm.model.formats.save import save_shared

# The format and the names of a delta's two matrices in it: B, then A.
_FORMAT = "wedlm-change-2"
_B, _A = "up", "down"
_LEVELS = 16
_SHIFTS = torch.tensor([0, 4], dtype=torch.uint8)
_ROUNDS = 12


def quantise(matrix: Tensor) -> dict[str, Tensor]:
    """``codes`` uint8 [O, I / 2], ``row`` float16 [O], ``column`` float16 [I] and ``levels`` float32 [16] of a matrix.

    Scales and levels are fitted in turns, each by least squares given the others. I must be even.
    """
    if matrix.ndim != 2 or matrix.shape[1] % len(_SHIFTS):
        raise ValueError(f"the matrix has shape {list(matrix.shape)}; expected [O, I] with I even")
    matrix = matrix.float()
    tiny = torch.finfo(torch.float32).tiny
    row = matrix.pow(2).mean(dim=1).sqrt().clamp(min=tiny)
    column = (matrix / row[:, None]).pow(2).mean(dim=0).sqrt().clamp(min=tiny)
    # Where the search for a matrix's own levels starts: evenly over what a normal distribution covers.
    levels = torch.linspace(-2.4, 2.4, _LEVELS, device=matrix.device)
    codes = torch.zeros_like(matrix, dtype=torch.long)
    for _ in range(_ROUNDS):
        scale = row[:, None] * column
        codes = torch.bucketize(matrix / scale, (levels[1:] + levels[:-1]) / 2)
        sums = torch.zeros(2, _LEVELS, device=matrix.device)
        sums[0].index_add_(0, codes.flatten(), (matrix * scale).flatten())
        sums[1].index_add_(0, codes.flatten(), scale.square().flatten())
        levels = torch.where(sums[1] > 0, sums[0] / sums[1].clamp(min=tiny), levels).sort().values
        part = levels[codes] * column
        row = ((matrix * part).sum(dim=1) / part.square().sum(dim=1).clamp(min=tiny)).clamp(min=tiny)
        part = levels[codes] * row[:, None]
        column = ((matrix * part).sum(dim=0) / part.square().sum(dim=0).clamp(min=tiny)).clamp(min=tiny)
    # float16 holds the scales only near 1, so their size goes into the levels.
    sizes = row.mean(), column.mean()
    pairs = codes.to(torch.uint8).unflatten(1, (-1, len(_SHIFTS)))
    return {
        "codes": (pairs << _SHIFTS.to(matrix.device)).sum(dim=2, dtype=torch.uint8),
        "row": (row / sizes[0]).half(),
        "column": (column / sizes[1]).half(),
        "levels": levels * sizes[0] * sizes[1],
    }


def restore(stored: Mapping[str, Tensor]) -> Tensor:
    """The matrix [O, I], float32, that ``quantise`` stored."""
    codes = (stored["codes"][..., None] >> _SHIFTS.to(stored["codes"].device)) & (_LEVELS - 1)
    values = stored["levels"][codes.flatten(1).long()]
    return values * stored["row"].float()[:, None] * stored["column"].float()


def save_delta(
    matrices: Mapping[str, tuple[Tensor, Tensor]], rows: Mapping[str, tuple[Tensor, Tensor]], path: Path, note: str
) -> None:
    """Write a model's delta, by parameter name: ``matrices`` (B [O, r], A [r, I]), whose product is added, and ``rows``
    (ids [n], values [n, C]), which replace rows of an embedding. ``note`` describes the file to its readers."""
    tensors: dict[str, Tensor] = {}
    for name, pair in matrices.items():
        for which, matrix in zip((_B, _A), pair, strict=True):
            tensors.update({f"{name}:{which}.{part}": value for part, value in quantise(matrix).items()})
    for name, (ids, values) in rows.items():
        tensors[f"{name}:ids"], tensors[f"{name}:rows"] = ids, values.float()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_shared(tensors, path, {"format": _FORMAT, "note": note})


def apply_delta(
    tensors: Iterable[tuple[str, Tensor]], path: Path, in_place: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The (name, tensor) pairs of a base model with the delta in ``path`` added, in float32 where it applies.

    ``in_place``: rows of a float32 embedding are replaced in the given tensor, which saves a copy of the largest one.

    Raises CheckpointError if the file is damaged or made for another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") != _FORMAT:
                raise CheckpointError(f"{path} is not a delta file; expected the format {_FORMAT}")
            stored: dict[str, dict[str, Tensor]] = {}
            for key in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                name, _, part = key.partition(":")
                stored.setdefault(name, {})[part] = file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is a corrupt or truncated safetensors file: {error}") from error
    for name, tensor in tensors:
        if name in stored:
            with reading(path):
                tensor = _add(tensor, stored.pop(name), in_place)
        yield name, tensor
    if stored:
        raise CheckpointError(f"{path} changes {min(stored)}, which this model does not have")


def _add(tensor: Tensor, parts: Mapping[str, Tensor], in_place: bool) -> Tensor:
    if "ids" in parts:
        tensor = tensor.float() if in_place else tensor.float().clone()
        return tensor.index_copy_(0, parts["ids"], parts["rows"])
    b, a = (
        restore({key.removeprefix(f"{which}."): part for key, part in parts.items() if key.startswith(which)})
        for which in (_B, _A)
    )
    return tensor.float() + (b @ a).to(tensor.device)
