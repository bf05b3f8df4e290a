# SPDX-License-Identifier: Apache-2.0
"""Rules on what a request may say: grammars, biases, penalties."""
