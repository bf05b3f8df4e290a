# SPDX-License-Identifier: Apache-2.0
"""A fine-tuned model as a small file: the change of each weight in two bits, over a base that users have already.

What fine-tuning adds to a weight is small and close to normally distributed, so four levels a value lose about a tenth
of its energy. A matrix [O, I] is stored as codes (four to a byte), a scale a row, a scale a column and its four levels:
change = level[code] · row · column. Everything else (norms, single embedding rows) is stored whole.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wedlm.model.errors import CheckpointError

_FORMAT = "wedlm-change-1"
_CODES_PER_BYTE = 4
_SHIFTS = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
_EMBEDDING = "model.embed_tokens.weight"
# Lloyd-Max levels of a standard normal distribution: where the search for a matrix's own levels starts.
_NORMAL_LEVELS = (-1.5104, -0.4528, 0.4528, 1.5104)
_ROUNDS = 8


def quantise_change(change: Tensor) -> dict[str, Tensor]:
    """``codes`` uint8 [O, I / 4], ``row`` float16 [O], ``column`` float16 [I] and ``levels`` float32 [4] of a change.

    Scales and levels are fitted in turns, each by least squares given the others. I must be a multiple of 4.
    """
    if change.ndim != 2 or change.shape[1] % _CODES_PER_BYTE:
        raise ValueError(f"the change has shape {list(change.shape)}; expected [O, I] with I a multiple of 4")
    change = change.float()
    tiny = torch.finfo(torch.float32).tiny
    row = change.pow(2).mean(dim=1).sqrt().clamp(min=tiny)
    column = (change / row[:, None]).pow(2).mean(dim=0).sqrt().clamp(min=tiny)
    levels = torch.tensor(_NORMAL_LEVELS, device=change.device)
    codes = torch.zeros_like(change, dtype=torch.long)
    for _ in range(_ROUNDS):
        scale = row[:, None] * column
        codes = torch.bucketize(change / scale, (levels[1:] + levels[:-1]) / 2)
        weight = scale.square().flatten()
        sums = torch.zeros(2, 4, device=change.device)
        sums[0].index_add_(0, codes.flatten(), (change * scale).flatten())
        sums[1].index_add_(0, codes.flatten(), weight)
        levels = torch.where(sums[1] > 0, sums[0] / sums[1].clamp(min=tiny), levels).sort().values
        part = levels[codes] * column
        row = (change * part).sum(dim=1) / part.square().sum(dim=1).clamp(min=tiny)
        row = row.clamp(min=tiny)
        part = levels[codes] * row[:, None]
        column = ((change * part).sum(dim=0) / part.square().sum(dim=0).clamp(min=tiny)).clamp(min=tiny)
    # float16 holds the scales only near 1, so their size goes into the levels.
    sizes = row.mean(), column.mean()
    packed = (codes.to(torch.uint8).unflatten(1, (-1, 4)) << _SHIFTS.to(change.device)).sum(dim=2, dtype=torch.uint8)
    return {
        "codes": packed,
        "row": (row / sizes[0]).half(),
        "column": (column / sizes[1]).half(),
        "levels": levels * sizes[0] * sizes[1],
    }


def restore_change(stored: Mapping[str, Tensor]) -> Tensor:
    """The change [O, I], float32, that ``quantise_change`` stored."""
    codes = (stored["codes"][..., None] >> _SHIFTS.to(stored["codes"].device)) & 3
    values = stored["levels"][codes.flatten(1).long()]
    return values * stored["row"].float()[:, None] * stored["column"].float()


def save_change(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], path: Path, note: str) -> None:
    """Write what turns ``base`` into (nearly) ``tuned``: parameters by the same names. ``note`` says what it is.

    Of the embedding only rows that differ are stored, whole: those that training changed must be few.
    """
    tensors: dict[str, Tensor] = {}
    for name, before in base.items():
        after = tuned[name].detach().float()
        if torch.equal(after, before.float()):
            continue
        if name == _EMBEDDING:
            ids = (after != before.float()).any(dim=1).nonzero().flatten()
            tensors[f"{name}:ids"], tensors[f"{name}:rows"] = ids, after[ids]
        elif after.ndim == 2:
            stored = quantise_change(after - before.float())
            tensors.update({f"{name}:{part}": value for part, value in stored.items()})
        else:
            tensors[name] = after
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path, metadata={"format": _FORMAT, "note": note})


def changed(tensors: Iterable[tuple[str, Tensor]], path: Path) -> Iterator[tuple[str, Tensor]]:
    """The (name, tensor) pairs of a base model with the change in ``path`` added, in float32 where they are changed.

    Raises CheckpointError if the file is damaged or made for another model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("format") != _FORMAT:
                raise CheckpointError(f"{path} is no file of changes; expected the format {_FORMAT}")
            stored: dict[str, dict[str, Tensor]] = {}
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                name, _, part = key.partition(":")
                stored.setdefault(name, {})[part] = file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is a corrupt or truncated safetensors file: {error}") from error
    for name, tensor in tensors:
        yield name, _changed(tensor, stored.pop(name)) if name in stored else tensor
    if stored:
        raise CheckpointError(f"{path} changes {min(stored)}, which this model does not have")


def _changed(tensor: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    if "codes" in parts:
        return tensor.float() + restore_change(parts).to(tensor.device)
    if "ids" in parts:
        return tensor.float().index_copy(0, parts["ids"], parts["rows"])
    return parts[""]
