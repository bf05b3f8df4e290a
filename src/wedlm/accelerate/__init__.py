# SPDX-License-Identifier: Apache-2.0
"""``wedlm accelerate``: from an AR checkpoint to an adapter of masked rows, in stages that go on where they were cut.

``run.py`` has the stages in their order: START HERE.
"""
