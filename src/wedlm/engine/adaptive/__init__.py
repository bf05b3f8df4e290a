# SPDX-License-Identifier: Apache-2.0
"""Budgets that follow measured costs: drafts of a window, rows of prompt chunks."""
