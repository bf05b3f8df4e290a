# SPDX-License-Identifier: Apache-2.0
"""Budgets for drafts and for prompt chunks that follow measured costs. ``Controller`` owns them all."""
