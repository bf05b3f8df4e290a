# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: one process per rank; rank 0 is the engine's own process.

Rank 0 schedules, holds the windows and chooses the tokens. It tells the others (``messages.py``) which rows to run, and
all ranks compute their part of the one model (``wedlm.model.sharding``), adding up after each half of a layer
(``group.py``). The others know nothing of requests; their program is ``worker.py``. ``processes.py`` starts and watches
them. None of this is imported if one rank runs alone.
"""
