# SPDX-License-Identifier: Apache-2.0
"""What a device offers to kernels: processors, tensor descriptors, and programmatic dependent launch, by which a kernel
starts while its predecessor drains, and waits only before it reads."""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl


def supports_pdl(device: torch.device) -> bool:
    """Whether kernels of this device can start before their predecessors have ended (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


class Processors(NamedTuple):
    """How many processors a device has, and the bytes of memory that the threads of one program can share."""

    number: int
    shared_bytes: int


_HOPPER_SHARED = 232_448
_INTERPRETER = Processors(4, _HOPPER_SHARED)


def supports_descriptors(device: torch.device) -> bool:
    """Whether kernels of this device can copy tiles by tensor descriptors, and have the shared memory that makes use of
    them: Hopper and Blackwell in data centres. Triton's interpreter can."""
    return device.type != "cuda" or (supports_pdl(device) and processors(device).shared_bytes >= _HOPPER_SHARED)


def processors(device: torch.device) -> Processors:
    """The processors of a tensor's device. Triton's interpreter counts as a small Hopper."""
    return _processors(device.index or 0) if device.type == "cuda" else _INTERPRETER


@lru_cache
def _processors(index: int) -> Processors:
    properties = triton.runtime.driver.active.utils.get_device_properties(index)
    return Processors(properties["multiprocessor_count"], properties["max_shared_mem"])


def launch_options(pdl: bool) -> dict[str, bool]:
    """Keyword arguments for launching a kernel that begins with ``pdl_wait(PDL)``."""
    return {"launch_pdl": True} if pdl else {}


@triton.jit
def pdl_wait(PDL: tl.constexpr, READIES: tl.constexpr = True):
    """Wait for what earlier kernels wrote, and let the next one get ready. Only read weights before this. Without
    ``READIES`` the next kernel starts when this one ends."""
    if PDL:
        if READIES:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
