# SPDX-License-Identifier: Apache-2.0
"""An adapter in four bits: each matrix of its file is stored by ``weight_delta.quantise``, under the matrix's name and
the part's. ``read_adapter`` reads it like any other."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from wedlm.model.formats.save import save_shared
from wedlm.model.lora.weight_delta import quantise, restore

_PARTS = {"codes": torch.uint8, "row": torch.float16, "column": torch.float16, "levels": torch.float32}
_LEVELS = 16
_A, _B = "lora_A.weight", "lora_B.weight"


def pack_adapter(directory: Path, target: Path, weights_file: str, rank: int | None = None) -> tuple[int, float]:
    """Write the adapter in ``directory`` to ``target`` in four bits, with its other files.

    ``rank``: write it in at most this rank (``lower_rank``); you have to change its config accordingly. Returns the
    bytes of its weights, and the share of the matrices' energy that rounding loses.
    """
    packed: dict[str, Tensor] = {}
    lost = total = 0.0
    tensors: Mapping[str, Tensor] = unpack(load_file(directory / weights_file))
    for name, tensor in (tensors if rank is None else lower_rank(tensors, rank)).items():
        if tensor.ndim != 2:
            packed[name] = tensor.half()
            continue
        parts = quantise(tensor)
        packed |= {f"{name}:{part}": value.contiguous() for part, value in parts.items()}
        lost += float((restore(parts) - tensor.float()).square().sum())
        total += float(tensor.float().square().sum())
    target.mkdir(parents=True, exist_ok=True)
    for path in directory.iterdir():
        if path.is_file() and path.name != weights_file:
            shutil.copyfile(path, target / path.name)
    save_shared(packed, target / weights_file, {"format": "pt"})
    return (target / weights_file).stat().st_size, lost / max(total, 1e-30)


def lower_rank(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """The tensors of an adapter's file with each pair A [r, I], B [O, r] replaced by the pair of at most ``rank`` whose
    product is nearest to B A, with its singular values divided evenly between both."""
    found = dict(tensors)
    for name, a in tensors.items():
        if name.endswith(_A):
            other = name.removesuffix(_A) + _B
            # B A = Q_b (R_b R_a') Q_a', so that the decomposition is of r x r numbers.
            (q_b, r_b), (q_a, r_a) = (torch.linalg.qr(one.float()) for one in (tensors[other], a.T))
            u, s, v = torch.linalg.svd(r_b @ r_a.T)
            root = s[:rank].sqrt()
            found[other], found[name] = q_b @ u[:, :rank] * root, root[:, None] * (v[:rank] @ q_a.T)
    return found


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter's file, with packed matrices restored. Raises ValueError naming a matrix whose parts do
    not fit."""
    found: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        matrix, colon, part = name.rpartition(":")
        if colon and part in _PARTS:
            packed.setdefault(matrix, {})[part] = tensor
        else:
            found[name] = tensor
    for name, parts in packed.items():
        _check(name, parts)
        found[name] = restore(parts)
    return found


def _check(name: str, parts: Mapping[str, Tensor]) -> None:
    kinds = {part: tensor.dtype for part, tensor in parts.items()}
    shapes = {part: list(tensor.shape) for part, tensor in parts.items()}
    rows, half = shapes.get("codes", [0, 0]) if len(shapes.get("codes", [])) == 2 else (0, 0)
    expected = {"codes": [rows, half], "row": [rows], "column": [2 * half], "levels": [_LEVELS]}
    if kinds != _PARTS or shapes != expected:
        raise ValueError(
            f"the packed matrix {name[:128]} has parts {json.dumps(shapes)[:200]}; expected codes (uint8) [O, I / 2], "
            f"row (float16) [O], column (float16) [I] and levels (float32) [{_LEVELS}]"
        )
