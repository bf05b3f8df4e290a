# SPDX-License-Identifier: Apache-2.0
"""Programmatic dependent launch: a kernel starts while its predecessor drains, and waits only before it reads."""

import torch
import triton
import triton.language as tl


def supports_pdl(device: torch.device) -> bool:
    """Whether kernels of this device can start before their predecessors have ended (Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def launch_options(pdl: bool) -> dict[str, bool]:
    """Keyword arguments for launching a kernel that begins with ``pdl_wait(PDL)``."""
    return {"launch_pdl": True} if pdl else {}


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Wait for what earlier kernels wrote, and let the next one get ready. Only read weights before this."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
