# SPDX-License-Identifier: Apache-2.0
"""What steps cost by their rows, on machines where that was measured (docs/log.md)."""

# Seconds by rows: an H200 with the 8B shape, and two CPU cores with the demo model (docs/log.md).
GPU = [(1, 4.2e-3), (16, 4.5e-3), (32, 5.2e-3), (64, 5.9e-3), (128, 7.6e-3), (256, 10e-3), (512, 15e-3), (2048, 50e-3)]
CPU = [(1, 15e-3), (2, 17e-3), (4, 20e-3), (8, 26e-3), (16, 40e-3), (32, 72e-3)]
NATIVE = [(1, 9.2e-3), (2, 9.9e-3), (4, 10.5e-3), (8, 16.6e-3), (16, 27.9e-3), (32, 48.4e-3)]  # a step in the library
