# SPDX-License-Identifier: Apache-2.0
"""vLLM's own models; only what decodes over them is new."""

from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM


class _Streaming:
    @staticmethod
    def get_model_state_cls() -> type:
        from wedlm_vllm.model_state import StreamingModelState

        return StreamingModelState


class WeDLMLlamaForCausalLM(_Streaming, LlamaForCausalLM):
    pass


class WeDLMQwen2ForCausalLM(_Streaming, Qwen2ForCausalLM):
    pass


class WeDLMQwen3ForCausalLM(_Streaming, Qwen3ForCausalLM):
    pass
