# SPDX-License-Identifier: Apache-2.0
"""Causal diffusion language models: several tokens a forward under the plain causal mask."""

from wedlm.engine.llm import LLM, GenerationOutput, StreamPiece
from wedlm.engine.sampling_params import SamplingParams

__all__ = ["LLM", "GenerationOutput", "SamplingParams", "StreamPiece"]
