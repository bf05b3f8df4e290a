# SPDX-License-Identifier: Apache-2.0
"""``wedlm bench``: what steps cost and what requests get, mode beside mode in one engine."""
