# SPDX-License-Identifier: Apache-2.0
"""The paper's algorithm: pure functions on tensors of any device. Imports nothing else of wedlm."""
