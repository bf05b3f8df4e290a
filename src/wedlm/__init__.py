# SPDX-License-Identifier: Apache-2.0
"""Causal diffusion language models: several tokens a forward under the plain causal mask."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wedlm.engine.llm import LLM
    from wedlm.engine.outputs import GenerationOutput, StreamPiece
    from wedlm.engine.sampling_params import SamplingParams

__version__ = "0.1.0"  # the one place: pyproject.toml reads it
__all__ = ["LLM", "GenerationOutput", "SamplingParams", "StreamPiece"]

_HOMES = {"SamplingParams": "wedlm.engine.sampling_params"}


def __getattr__(name: str) -> Any:
    """Import torch only when something needs it: `wedlm --help` must answer at once."""
    if name not in __all__:
        raise AttributeError(f"module 'wedlm' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "wedlm.engine.llm")), name)
