# SPDX-License-Identifier: Apache-2.0
"""``wedlm doctor``: what there is on this machine, and what it means for wedlm."""

from wedlm.cli.options import command


@command
def doctor() -> None:
    """Say what this machine has, and what wedlm chooses by it."""
