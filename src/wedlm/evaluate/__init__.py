# SPDX-License-Identifier: Apache-2.0
"""Benchmarks through lm-evaluation-harness (the extra ``eval``): tasks, scoring, sweeps, results."""
