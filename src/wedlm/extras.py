# SPDX-License-Identifier: Apache-2.0
"""How a user installs what is missing into the environment that is running."""

import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def pip_install(*packages: str) -> str:
    """The command that installs these packages."""
    return shlex.join([sys.executable, "-m", "pip", "install", *packages])


def install_extras(*extras: str) -> str:
    """The command that installs these extras of wedlm. ``wedlm`` is not on a package index, so pip takes the installed
    package, or else its folder."""
    try:
        version("wedlm")
    except PackageNotFoundError:
        return pip_install("-e", f"{Path(__file__).parents[2]}[{','.join(extras)}]")
    return pip_install(f"wedlm[{','.join(extras)}]")
