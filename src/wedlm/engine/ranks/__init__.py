# SPDX-License-Identifier: Apache-2.0
"""Tensor parallelism: one process a rank, of which the first is the engine's own.

Rank 0 schedules, holds the windows and chooses the tokens; it tells the others (``messages.py``) which rows to run, and
all of them compute their part of the one model (``wedlm.model.sharding``), adding up after each half of a layer
(``group.py``). The others know nothing of requests: their program is ``worker.py``. ``processes.py`` starts and watches
them. Nothing of this is imported where one rank runs alone.
"""
