# SPDX-License-Identifier: Apache-2.0
"""The paper's algorithm as pure functions on tensors of any device. Imports nothing else of wedlm."""
