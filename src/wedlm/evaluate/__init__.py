# SPDX-License-Identifier: Apache-2.0
"""Benchmarks through lm-evaluation-harness (the extra ``eval``): tasks, scoring, sweeps, results."""

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's own bars; before its first import
