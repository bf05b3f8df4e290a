# SPDX-License-Identifier: Apache-2.0
"""A plug-in of vLLM: checkpoints that ``wedlm_vllm.convert`` wrote decode by streaming (docs/scale.md, "vLLM").

This file imports neither vLLM nor torch, since vLLM imports it in each of its processes before it has chosen a device.
"""

ARCHITECTURES = {
    "llama": "WeDLMLlamaForCausalLM",
    "qwen2": "WeDLMQwen2ForCausalLM",
    "qwen3": "WeDLMQwen3ForCausalLM",
}


def register() -> None:
    """Make vLLM know the models: the entry point. It may be called several times."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.sampling_params import SamplingParams

    from wedlm_vllm.checks import StreamingModelConfig, checked_verify

    for name in ARCHITECTURES.values():
        ModelRegistry.register_model(name, f"wedlm_vllm.models:{name}")
        MODELS_CONFIG_MAP[name] = StreamingModelConfig
    SamplingParams.verify = checked_verify(SamplingParams.verify)
