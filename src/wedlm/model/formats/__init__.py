# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, tokenizers and chat templates as files hold them."""
