# SPDX-License-Identifier: Apache-2.0
"""The machine's name, and how much of it this process may use. Does not import torch."""

import os
import platform
import re
import resource
import sys
from pathlib import Path

_BUSY = 0.5  # of the cores


def cpu_name() -> str:
    """The processor's name if Linux gives it, else its architecture."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text(encoding="utf-8")) if info.exists() else []
    return names[0] if names else platform.machine()


def usable_cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """The machine's memory, or that of its control group if that has less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdecimal() else total


def peak_memory_bytes() -> int:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def busy_notice() -> str | None:
    """A sentence for someone about to measure, if other programs are computing; it goes by the last minute's load."""
    load, cores = os.getloadavg()[0], usable_cores()
    if load < _BUSY * cores:
        return None
    return f"This machine is busy (load average {load:.1f}, {cores} cores): times are longer and vary more than usual."
