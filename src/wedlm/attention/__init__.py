# SPDX-License-Identifier: Apache-2.0
"""Attention backends: what a row sees, and where its keys live."""
