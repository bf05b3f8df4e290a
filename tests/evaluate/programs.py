# SPDX-License-Identifier: Apache-2.0
"""Running programs that were written by hand, which need no sandbox."""


def runs(program: str) -> bool:
    """Whether it ends without an exception."""
    try:
        exec(compile(program, "program", "exec"), {"__name__": "program"})
    except Exception:
        return False
    return True
