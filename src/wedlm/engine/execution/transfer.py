# SPDX-License-Identifier: Apache-2.0
"""Send numbers from the host to the device without waiting for it, since it may still have steps to do."""

import torch
from torch import Tensor


def to_device_async(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of the host's tensor on the device."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def scatter_rows(rows: list[int], values: list[tuple[Tensor, Tensor]]) -> None:
    """Write each second tensor [n, ...], on the host, to the n ``rows`` of the first, all in one copy."""
    columns = [torch.tensor(rows), *(value for _, value in values)]
    # Integers and booleans as they are, floats as the bits of a double.
    bits = [(v.double().view(torch.long) if v.is_floating_point() else v.long()).view(len(rows), -1) for v in columns]
    sent = to_device_async(torch.cat(bits, dim=1), values[0][0].device)
    index, *parts = sent.split([part.shape[1] for part in bits], dim=1)
    for (target, value), own in zip(values, parts, strict=True):
        own = own.contiguous().view(torch.double) if value.is_floating_point() else own
        target[index[:, 0]] = own.reshape(value.shape).to(target.dtype)
