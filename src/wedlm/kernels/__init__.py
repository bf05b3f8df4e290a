# SPDX-License-Identifier: Apache-2.0
"""Triton kernels. Each has a slow twin in ``wedlm.model``, ``wedlm.attention`` or ``wedlm.algorithm`` that the tests
compare it with, on the CPU through Triton's interpreter (TRITON_INTERPRET=1)."""
