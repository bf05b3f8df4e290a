# SPDX-License-Identifier: Apache-2.0
"""``wedlm accelerate`` makes an adapter of masked rows from an AR checkpoint, in stages that continue where they
stopped.

``run.py`` has the stages in their order: START HERE.
"""
