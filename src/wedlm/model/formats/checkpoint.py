# SPDX-License-Identifier: Apache-2.0
"""Loading a model from a Hugging Face directory, the hub or a GGUF file, and saving it. No code of a checkpoint runs.

Tensors are streamed one by one into a model built on the meta device, so that the peak of memory is one copy of the
model in the wanted dtype plus the largest tensor.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wedlm.model.config import SUPPORTED_DTYPES, ModelConfig, read_token_ids
from wedlm.model.demo import DEMO_BLOCK_SIZE, DEMO_DELTAS, DEMO_MASK_TOKEN_ID
from wedlm.model.errors import CheckpointError, reading
from wedlm.model.formats.gguf_file import GGUFFile
from wedlm.model.formats.gguf_model import gguf_shapes, read_gguf_config, read_gguf_tensors
from wedlm.model.formats.json_file import read_json_object
from wedlm.model.formats.resolve import DEMO_BASE_NAME, DEMO_NAME, locate
from wedlm.model.formats.save import save_shared, write_whole
from wedlm.model.inference.layers import is_packed
from wedlm.model.lora.masked_rows import has_masked_lora
from wedlm.model.lora.weight_delta import apply_delta
from wedlm.model.transformer import Transformer

_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def load_model(
    path_or_id: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[Transformer, ModelConfig]:
    """The model, in evaluation mode, and its config.

    ``path_or_id``: a Hugging Face directory, a ``.gguf`` file, a hub id, "demo" or "demo-base". ``dtype`` None means
    the one the config records. The config's end tokens are those of ``generation_config.json`` and its own. Where it
    ties the output projection to the embedding and the files have another, theirs is kept. Raises CheckpointError, or
    DemoModelError if the demo model cannot be fetched.
    """
    path = locate(path_or_id)
    file = GGUFFile(path) if path.is_file() else None
    config = read_config(path) if file is None else read_gguf_config(file)
    if path_or_id in (DEMO_NAME, DEMO_BASE_NAME):
        config = dataclasses.replace(config, mask_token_id=DEMO_MASK_TOKEN_ID)
    if path_or_id == DEMO_NAME:
        config = dataclasses.replace(config, block_size=DEMO_BLOCK_SIZE)
    dtype = getattr(torch, config.dtype) if dtype is None else dtype
    if str(dtype).removeprefix("torch.") not in SUPPORTED_DTYPES:
        raise CheckpointError(f"dtype is {dtype}; expected one of {', '.join(SUPPORTED_DTYPES)}")
    files = _weight_files(path) if file is None else []
    if file is not None:
        file.check_places()
    _check_sizes(config, _shapes(files) if file is None else gguf_shapes(file), path)
    if config.tie_word_embeddings and _has_other_head(files):
        config = dataclasses.replace(config, tie_word_embeddings=False)
    with torch.device("meta"):
        model = Transformer(config)
    tensors = _read_files(files, config) if file is None else read_gguf_tensors(file, config)
    if path_or_id == DEMO_NAME:
        for delta in DEMO_DELTAS:
            tensors = apply_delta(tensors, delta)
    _fill(model, tensors, dtype, torch.device(device), path)
    return model.eval(), config


def read_config(directory: Path) -> ModelConfig:
    """``config.json`` of a checkpoint directory; the end tokens of ``generation_config.json`` come before its own."""
    values = _read_json(directory / "config.json", directory)
    with reading(directory):
        config = ModelConfig.from_hf(values)
        generation_file = directory / "generation_config.json"
        if generation_file.is_file():
            generation = _read_json(generation_file, directory)
            eos = read_token_ids("generation_config.json eos_token_id", generation.get("eos_token_id"))
            config = dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys((*eos, *config.eos_token_ids))))
    return config


def with_end_tokens(config: ModelConfig, more: Iterable[int]) -> ModelConfig:
    """The config with further end tokens behind its own, such as a tokenizer's; those without an embedding left out."""
    more = [token_id for token_id in more if token_id < config.vocab_size and token_id != config.mask_token_id]
    return dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *more))))


def save_model(model: Transformer, config: ModelConfig, directory: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors``, from which this package and transformers load the model.

    Raises ValueError for a packed model, whose tensors no longer have a checkpoint's names, and for one with an adapter
    of masked rows, which no checkpoint holds.
    """
    if has_masked_lora(model):
        raise ValueError(
            "the model has an adapter of masked rows, which cannot be merged; expected the base model alone"
        )
    if is_packed(model):
        raise ValueError("the model is packed for inference; expected one that is saved before pack_for_inference")
    save_tensors(model.state_dict(), config, directory)


def save_tensors(tensors: Mapping[str, Tensor], config: ModelConfig, directory: str | Path) -> None:
    """``save_model`` for a state dict gathered elsewhere. The config records the dtype of the tensors.

    Each file appears complete or not at all, and the config last: a directory with a config has its weights.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    if config.tie_word_embeddings:
        kept.pop("lm_head.weight", None)
    stored = str(kept["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    values = dataclasses.replace(config, dtype=stored).to_hf()
    with write_whole(directory / WEIGHTS_FILE) as temporary:
        save_shared(kept, temporary, {"format": "pt"})
    with write_whole(directory / "config.json") as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _fill(
    model: Transformer,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device,
    origin: Path,
) -> None:
    """Replace the model's meta parameters by ``tensors``; every name and shape must match."""
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    loaded: set[str] = set()
    for name, tensor in tensors:
        if name not in expected:
            raise CheckpointError(
                f"{origin} holds the tensor {name}, which a {model.config.model_type} model of this "
                "config does not have"
            )
        if tensor.shape != expected[name]:
            raise CheckpointError(
                f"{origin}: tensor {name} has shape {list(tensor.shape)}; expected {list(expected[name])} by the config"
            )
        if str(tensor.dtype).removeprefix("torch.") not in SUPPORTED_DTYPES:
            raise CheckpointError(
                f"{origin}: tensor {name} has dtype {tensor.dtype}; expected one of {', '.join(SUPPORTED_DTYPES)}"
            )
        owner, _, leaf = name.rpartition(".")
        # A copy even if nothing changes: the tensor may be a view of a mapped file that is about to be closed.
        value = tensor.to(device=device, dtype=dtype, copy=True)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value))
        loaded.add(name)
    missing = [name for name in expected if name not in loaded]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{origin} lacks the tensor {missing[0]}{others}")
    model.tie_weights()
    model.to(device)  # what is left: RoPE's frequencies


def _is_redundant(name: str, config: ModelConfig) -> bool:
    """Tensors that old checkpoints carry although they follow from the config or from another tensor."""
    return name.endswith(".rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")


def _has_other_head(files: Sequence[Path]) -> bool:
    """Whether safetensors files hold an output projection that is not the embedding."""
    found: dict[str, Tensor] = {}
    for path in files:
        with _safetensors(path), safe_open(path, framework="pt") as file:
            for name in {"lm_head.weight", "model.embed_tokens.weight"}.intersection(file.keys()):
                found[name] = file.get_tensor(name)
    return len(found) == 2 and not torch.equal(*found.values())


def _check_sizes(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], origin: Path) -> None:
    """Compare what the config says with the tensors that are there, before anything of the config's sizes is made.

    ``shapes``: of all tensors, by Hugging Face's names. The rest is checked tensor by tensor as they are read.
    """
    layers = {int(match[1]) for match in map(_LAYER.match, shapes) if match is not None}
    if len(layers) != config.num_layers:
        raise CheckpointError(
            f"{origin}: num_hidden_layers is {config.num_layers}; expected {len(layers)}, the layers whose tensors are "
            "there"
        )
    size, heads = config.hidden_size, config.head_dim
    expected = {
        "model.embed_tokens.weight": (config.vocab_size, size),
        "model.layers.0.self_attn.q_proj.weight": (config.num_heads * heads, size),
        "model.layers.0.self_attn.k_proj.weight": (config.num_kv_heads * heads, size),
        "model.layers.0.mlp.gate_proj.weight": (config.intermediate_size, size),
    }
    for name, shape in expected.items():
        if name not in shapes:
            raise CheckpointError(f"{origin} lacks the tensor {name}")
        if shapes[name] != shape:
            raise CheckpointError(
                f"{origin}: tensor {name} has shape {list(shapes[name])}; expected {list(shape)} by the config"
            )


def _shapes(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with _safetensors(path), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


@contextmanager
def _safetensors(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is a corrupt or truncated safetensors file: {error}") from error


def _read_files(files: Iterable[Path], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in safetensors files that is not redundant, one at a time."""
    for path in files:
        with _safetensors(path):
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if not _is_redundant(name, config)]  # noqa: SIM118
            for name in names:
                # Opened anew for each tensor: closing unmaps the pages read, which otherwise count as a second copy.
                with safe_open(path, framework="pt") as file:
                    tensor = file.get_tensor(name)
                    yield name, tensor


def _weight_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    if not (directory / INDEX_FILE).is_file():
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise CheckpointError(
                f"{directory} holds its weights only as pickles ({pickles[0]}), which can run code when read; expected "
                "safetensors"
            )
        raise CheckpointError(f"{directory} holds no weights; expected {WEIGHTS_FILE} or {INDEX_FILE}")
    weight_map = _read_json(directory / INDEX_FILE, directory).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{directory / INDEX_FILE} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        # Only a plain name, so that an index cannot point outside its directory.
        if Path(name).name != name or not (directory / name).is_file():
            raise CheckpointError(f"{directory} lacks the shard {name}, which {INDEX_FILE} names")
    return [directory / name for name in names]


def _read_json(path: Path, directory: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{directory} has no {path.name}; expected a Hugging Face checkpoint directory")
    return read_json_object(path)
