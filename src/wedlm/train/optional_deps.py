# SPDX-License-Identifier: Apache-2.0
"""Packages that training needs and inference does not."""

from importlib.util import find_spec

from wedlm.extras import install_extras, pip_install

# What `import wedlm.train…` itself needs; others are needed by some settings.
ALWAYS = ("accelerate", "pydantic", "yaml")
_OUTSIDE = ("wandb", "deepspeed")  # not part of the extra


def is_missing(package: str) -> bool:
    return find_spec(package) is None


def require(package: str, purpose: str = "training") -> None:
    """Raises ValueError saying how to install ``package`` if it is missing; ``purpose`` says what needs it."""
    if is_missing(package):
        command = pip_install(package) if package in _OUTSIDE else install_extras("train")
        raise ValueError(f"{purpose} needs the package {package}, which is not installed: {command}")
