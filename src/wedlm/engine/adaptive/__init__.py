# SPDX-License-Identifier: Apache-2.0
"""Budgets that follow measured costs, for drafts and for prompt chunks. ``Controller`` owns them all."""
