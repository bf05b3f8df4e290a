# SPDX-License-Identifier: Apache-2.0
"""Continuous batching over a paged cache: requests in, text out."""
