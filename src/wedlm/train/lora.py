# SPDX-License-Identifier: Apache-2.0
"""Low-rank adaptation through peft: injected into our model, then merged or saved as an adapter that peft also reads.

A LoRA for masked rows only (``lora_rows``) is our own, because peft has none.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wedlm.model.config import ModelConfig
from wedlm.model.formats.save import save_shared
from wedlm.model.lora.masked_rows import MASK_EMBEDDING, MASKED_TYPE, attach_to_layer
from wedlm.model.lora.peft import CONFIG_FILE, WEIGHTS_FILE, read_adapter
from wedlm.model.transformer import Transformer
from wedlm.train.config import TrainConfig

_NAME = "default"
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def scale_of(config: TrainConfig) -> float:
    """alpha / rank, which scales B A."""
    return (config.lora_alpha or 2 * config.lora_rank) / config.lora_rank


def lora_config(config: TrainConfig) -> Any:
    """peft's configuration of the adapter; alpha is 2 · rank unless given."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=scale_of(config) * config.lora_rank,  # type: ignore[arg-type]  # peft takes any number
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_targets,
        layers_to_transform=config.lora_layers or None,
        bias="none",
        task_type="CAUSAL_LM",
    )


def add_lora(transformer: Transformer, config: TrainConfig) -> None:
    """Freeze the model and give the target layers their matrices A and B, in float32.

    Raises ValueError if a target names no layer.
    """
    from peft import inject_adapter_in_model

    targets = _targets(transformer, config)
    transformer.requires_grad_(False)
    inject_adapter_in_model(lora_config(config), transformer, adapter_name=_NAME)
    for name, parameter in transformer.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()

    if config.lora_init is not None:
        _start_from_adapter(transformer, config, targets)


def _start_from_adapter(transformer: Transformer, config: TrainConfig, targets: list[str]) -> None:
    """Start from the adapter in ``lora_init``, including its mask embedding. Raises ValueError if it has
    another shape."""
    adapter = read_adapter(str(config.lora_init))
    parameters = dict(transformer.named_parameters())
    missing = [module for module in targets if f"{module}.weight" not in adapter.low_rank]
    if missing:
        raise ValueError(
            f"lora_init is {config.lora_init!r}, which has no LoRA of {missing[0]}; expected an adapter of "
            f"lora_targets {', '.join(config.lora_targets)}"
        )
    with torch.no_grad():
        for name, rows in adapter.rows.items():
            parameters[name][list(rows.ids)] = rows.values.to(parameters[name].dtype)
        for name, delta in adapter.low_rank.items():
            module = name.removesuffix(".weight")
            b, a = (parameters.get(f"{module}.lora_{part}.{_NAME}.weight") for part in "BA")
            if b is None or a is None or (b.shape, a.shape) != (delta.b.shape, delta.a.shape):
                raise ValueError(
                    f"lora_init is {config.lora_init!r}, whose matrices of {module} are {list(delta.b.shape)} and "
                    f"{list(delta.a.shape)}; expected an adapter of rank {config.lora_rank} of these lora_targets"
                )
            b.copy_(delta.b * (delta.scale / scale_of(config)))
            a.copy_(delta.a)


@contextmanager
def without_lora(transformer: Transformer) -> Iterator[None]:
    """Inside the block, the model computes as before training."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in transformer.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _targets(model: nn.Module, config: TrainConfig) -> list[str]:
    """The names of the linear layers that get a LoRA. Raises ValueError if a target or a layer's number names none."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    modules = {name.rpartition(".")[2] for name in names}
    for target in config.lora_targets:
        if target not in modules:
            raise ValueError(f"lora_targets has {target!r}; expected some of {', '.join(sorted(modules))}")
    targets = [name for name in names if name.rpartition(".")[2] in config.lora_targets]
    if not config.lora_layers:
        return targets
    numbers = {name: int(match[1]) for name in targets if (match := _LAYER.search(name))}
    for layer in config.lora_layers:
        if layer not in numbers.values():
            raise ValueError(f"lora_layers has {layer}; expected numbers from 0 to {max(numbers.values())}")
    return [name for name, number in numbers.items() if number in config.lora_layers]


def add_masked_lora(transformer: Transformer, config: TrainConfig, mask_embedding: Tensor) -> None:
    """Freeze the model, give the target layers a LoRA for masked rows, and give those rows a first state [C]; in
    float32.

    As in peft, B A starts at zero. Raises ValueError if a target names no layer of the decoder.
    """
    transformer.requires_grad_(False)
    decoder = transformer.model
    for name in _targets(decoder, config):
        size, depth = decoder.get_submodule(name).get_parameter("weight").shape
        a = torch.empty(config.lora_rank, depth)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        attach_to_layer(decoder, name, a, torch.zeros(size, config.lora_rank), scale_of(config), config.lora_dropout)
    decoder.mask_embedding = nn.Parameter(mask_embedding.float())


def merged_tensors(tensors: Mapping[str, Tensor], config: TrainConfig) -> dict[str, Tensor]:
    """A state dict with plain names, with each adapted weight W + (alpha / rank) · B · A, computed in float32."""
    scale = scale_of(config)
    merged = {}
    for name, tensor in tensors.items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        if plain != name and name.endswith(".weight"):
            module = plain.removesuffix(".weight")
            a, b = (tensors[f"{module}.lora_{part}.{_NAME}.weight"].float() for part in "AB")
            tensor = (tensor.float() + scale * (b @ a)).to(tensor.dtype)
        merged[plain] = tensor
    return merged


def save_adapter(
    tensors: Mapping[str, Tensor],
    mask_embedding: Tensor | None,
    config: TrainConfig,
    model_config: ModelConfig,
    directory: Path,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` in peft's layout, and the result's
    ``model_config``.

    A trained mask embedding is stored as peft stores a trained token row. An adapter of masked rows has a type and
    names that peft does not know, so that it is not mistaken for one of all rows.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if config.lora_rows == "masked":
        _save_masked(tensors, config, directory)
    else:
        trained = None if mask_embedding is None else (model_config.mask_token_id, mask_embedding)
        _save_for_peft(tensors, trained, config, directory)
    text = json.dumps(model_config.to_hf(), indent=2)
    (directory / "config.json").write_text(text + "\n", encoding="utf-8")


def _save_masked(tensors: Mapping[str, Tensor], config: TrainConfig, directory: Path) -> None:
    kept = {
        f"base_model.model.{name}": tensor.contiguous()
        for name, tensor in tensors.items()
        if ".masked_lora_" in name or name == MASK_EMBEDDING
    }
    save_shared(kept, directory / WEIGHTS_FILE, {"format": "pt"})
    values = {
        "peft_type": MASKED_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.model_path,
        "r": config.lora_rank,
        "lora_alpha": scale_of(config) * config.lora_rank,
        "lora_dropout": config.lora_dropout,
        "target_modules": config.lora_targets,
        "layers_to_transform": config.lora_layers or None,
        "bias": "none",
        "inference_mode": True,
    }
    (directory / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _save_for_peft(
    tensors: Mapping[str, Tensor], mask: tuple[int | None, Tensor] | None, config: TrainConfig, directory: Path
) -> None:
    """``mask``: the id of the mask token and its trained embedding."""
    kept = {
        "base_model.model." + name.replace(f".{_NAME}.", "."): tensor.contiguous()
        for name, tensor in tensors.items()
        if ".lora_" in name
    }
    peft_config = lora_config(config)
    peft_config.base_model_name_or_path = config.model_path
    if mask is not None:
        token, embedding = mask
        kept["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = embedding[None].clone()
        peft_config.trainable_token_indices = {"embed_tokens": [token]}
    save_shared(kept, directory / WEIGHTS_FILE, {"format": "pt"})
    peft_config.save_pretrained(str(directory))
