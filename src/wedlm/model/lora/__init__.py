# SPDX-License-Identifier: Apache-2.0
"""Low-rank deltas of weights: peft's LoRA, a LoRA for masked rows alone, packed deltas."""
