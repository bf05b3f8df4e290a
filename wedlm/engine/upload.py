# SPDX-License-Identifier: Apache-2.0
"""Numbers from the host to the device without waiting for it: it may still have steps to do."""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of the host's tensor on the device."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def put_row(row: int, values: list[tuple[Tensor, Tensor]]) -> None:
    """Write each second tensor, on the host, to ``row`` of the first, all in one copy."""
    sources = [value for _, value in values]
    # Integers and booleans as they are, floats as the bits of a double.
    bits = [(v.double().view(torch.long) if v.is_floating_point() else v.long()).view(-1) for v in sources]
    sent = upload(torch.cat(bits), values[0][0].device).split([len(part) for part in bits])
    for (target, value), own in zip(values, sent, strict=True):
        target[row] = (own.view(torch.double) if value.is_floating_point() else own).view(value.shape)
