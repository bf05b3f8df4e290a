# SPDX-License-Identifier: Apache-2.0
"""``config.json`` in transformers' form."""

from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from wedlm.model.config import ModelConfig


class WeDLMConfig(PreTrainedConfig):
    """Any config that ``wedlm.model`` reads, with the keys of ``config.json`` as attributes.

    ``shape_type`` is the model type of the weights' shape, which is written on saving: "wedlm", or "llama", "qwen2" or
    "qwen3", whose stock classes then load the directory for plain AR use.
    """

    model_type = "wedlm"

    shape_type: str = "wedlm"
    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 16384
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool | None = None
    mask_token_id: int | None = None
    block_size: int | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The input of ``from_dict``. (transformers would warn about every model type except "wedlm".)"""
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return {**values, "model_type": cls.model_type, "shape_type": values.get("model_type")}, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config from the content of a ``config.json``. Raises ValueError for features that the model does not
        support."""
        shape_type = config_dict.get("shape_type", config_dict.get("model_type"))
        if ModelConfig.from_hf({**config_dict, "model_type": shape_type}).sees_by_block:
            raise ValueError(
                f"model_type is {shape_type!r}; expected a causal model, the only kind that this class computes"
            )
        return super().from_dict({**config_dict, "model_type": cls.model_type, "shape_type": shape_type}, **kwargs)

    @classmethod
    def of(cls, config: ModelConfig) -> "WeDLMConfig":
        """The same in transformers' terms."""
        return cls.from_dict(config.to_hf())

    def model_config(self) -> ModelConfig:
        """The config in our form. Raises ValueError for features that the model does not support."""
        return ModelConfig.from_hf(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The content of a ``config.json``. An optional key that is not set is left to its type's default."""
        values = super().to_dict()
        values["model_type"] = values.pop("shape_type", self.shape_type)
        if values["model_type"] != self.model_type:
            values["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[values["model_type"]]]
        return {key: value for key, value in values.items() if value is not None or key not in _OPTIONAL}


_OPTIONAL = ("attention_bias", "mlp_bias", "qk_norm", "head_dim", "num_key_value_heads", "rope_parameters")
