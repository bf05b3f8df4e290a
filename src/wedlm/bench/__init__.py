# SPDX-License-Identifier: Apache-2.0
"""``wedlm bench`` measures what steps cost and what requests get, with all modes in one engine."""
