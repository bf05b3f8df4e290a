# SPDX-License-Identifier: Apache-2.0
"""Load a model from a Hugging Face directory, the hub or a GGUF file, and save it. No code from a checkpoint runs.

Tensors are streamed one by one into a model built on the meta device, so that peak memory is one copy of the model in
the wanted dtype plus the largest tensor.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from wedlm.model.config import SUPPORTED_DTYPES, ModelConfig, read_token_ids
from wedlm.model.demo import (
    DEMO_BLOCK_SIZE,
    DEMO_DELTAS,
    DEMO_ENTROPY_THRESHOLD,
    DEMO_MASK_TOKEN_ID,
    DEMO_NEXT_TOKEN,
)
from wedlm.model.errors import CheckpointError, reading
from wedlm.model.formats.cut import Cut, CutByName, part_of
from wedlm.model.formats.fp8_checkpoint import FP8, SCALE, is_scale, is_unused, with_scales
from wedlm.model.formats.gguf_file import GGUFFile
from wedlm.model.formats.gguf_model import gguf_shapes, read_gguf_config, read_gguf_tensors
from wedlm.model.formats.int8_rows import SCALE as INT8_SCALE
from wedlm.model.formats.int8_rows import Int8Rows, join_scale
from wedlm.model.formats.json_file import read_json_object
from wedlm.model.formats.resolve import DEMO_BASE_NAME, DEMO_NAME, locate
from wedlm.model.formats.save import save_shared, write_whole
from wedlm.model.inference.layers import is_packed
from wedlm.model.lora.masked_rows import has_masked_lora
from wedlm.model.lora.weight_delta import apply_delta
from wedlm.model.sharding import Shard
from wedlm.model.transformer import Transformer

log = logging.getLogger(__name__)

_LAYER = re.compile(r"model\.layers\.(\d{1,9})\.")
WEIGHTS_FILE = "model.safetensors"
_READABLE_DTYPES = (*SUPPORTED_DTYPES, "float8_e4m3fn")
INDEX_FILE = "model.safetensors.index.json"


class _HasShape(Protocol):
    @property
    def shape(self) -> Sequence[int]: ...


Shaped = TypeVar("Shaped", bound=_HasShape)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: its config, which fits its tensors' shapes, and the tensors, one at a time.

    ``gguf`` or ``files`` (safetensors) hold them; ``deltas`` are added as they are read. ``shapes``: of all tensors, by
    Hugging Face's names, in their order. ``is_int8``: whether matrices are in eight bits with scales (``int8_rows``).
    """

    path: Path
    config: ModelConfig
    shapes: Mapping[str, tuple[int, ...]]
    gguf: GGUFFile | None = None
    files: tuple[Path, ...] = ()
    deltas: tuple[Path, ...] = ()
    is_int8: bool = False

    def tensors(self, keeps_fp8: bool = False, shard: Shard | None = None) -> Iterator[tuple[str, Tensor | Int8Rows]]:
        """(Hugging Face's name, tensor) of each; float32 if they come from blocks. ``keeps_fp8`` is as in
        ``with_scales``. ``shard``: read only that part of each tensor, except where deltas are added, which needs whole
        tensors, one at a time."""
        cut = None if shard is None else self._cut_by(shard)
        if self.gguf is None:
            if self.is_int8:
                return _read_int8(self.files, self.config, self.path, cut)
            return _read_tensors(self.files, self.config, keeps_fp8, self.path, cut)
        if not self.deltas or cut is None:
            tensors = read_gguf_tensors(self.gguf, self.config, cut)
            for delta in self.deltas:
                tensors = apply_delta(tensors, delta, in_place=True)
            return iter(tensors)
        return ((name, part_of(tensor, cut(name))) for name, tensor in self.tensors() if isinstance(tensor, Tensor))

    def _cut_by(self, shard: Shard) -> CutByName:
        """Leaves a tensor that the model does not have whole; it is refused by its name later."""
        return lambda name: shard.cut(name, self.shapes[name]) if name in self.shapes else None


def open_checkpoint(path_or_id: str | Path) -> Checkpoint:
    """Find the checkpoint as ``load_model`` does, without reading a tensor. Raises as ``load_model`` does."""
    path = locate(path_or_id)
    if path.is_file():
        checkpoint = checkpoint_of_gguf(GGUFFile(path))
    else:
        checkpoint = checkpoint_of_files(path, read_config(path), _weight_files(path))
    config = checkpoint.config
    if path_or_id in (DEMO_NAME, DEMO_BASE_NAME):
        config = dataclasses.replace(config, mask_token_id=DEMO_MASK_TOKEN_ID)
    if path_or_id == DEMO_NAME:
        config = dataclasses.replace(
            config,
            block_size=DEMO_BLOCK_SIZE,
            next_token=DEMO_NEXT_TOKEN,
            entropy_threshold=DEMO_ENTROPY_THRESHOLD,
        )
    return dataclasses.replace(checkpoint, config=config, deltas=DEMO_DELTAS if path_or_id == DEMO_NAME else ())


def checkpoint_of_gguf(file: GGUFFile) -> Checkpoint:
    """A checkpoint in a GGUF file. Raises CheckpointError."""
    config, shapes = read_gguf_config(file), gguf_shapes(file)
    file.check_places()
    _check_sizes(config, shapes, file.path)
    return Checkpoint(file.path, config, shapes, file)


def checkpoint_of_files(path: Path, config: ModelConfig, files: Iterable[Path]) -> Checkpoint:
    """A checkpoint in safetensors files. Raises CheckpointError."""
    files = tuple(files)
    shapes, is_int8 = _shapes(files)
    _check_sizes(config, shapes, path)
    if config.tie_word_embeddings and _has_other_head(files):
        config = dataclasses.replace(config, tie_word_embeddings=False)
    shapes = {name: shape for name, shape in shapes.items() if not (is_scale(name) or _is_redundant(name, config))}
    return Checkpoint(path, config, shapes, files=files, is_int8=is_int8)


def load_model(
    path_or_id: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    keeps_fp8: bool = False,
) -> tuple[Transformer, ModelConfig]:
    """Load the model, in evaluation mode, and its config.

    ``path_or_id``: a Hugging Face directory, a ``.gguf`` file, a hub id, "demo" or "demo-base". ``dtype`` None takes
    the one that the config records. Weights in FP8 are widened to it, with a warning. ``keeps_fp8`` keeps those of
    layers where each output has one scale, for ``pack_for_inference`` only. The config's end tokens are those of
    ``generation_config.json`` and its own. If the config ties the output projection to the embedding and the files
    contain a different one, that one is kept. Raises CheckpointError, or DemoModelError if the demo model cannot be
    fetched.
    """
    checkpoint = open_checkpoint(path_or_id)
    return load_torch(checkpoint, dtype, device, keeps_fp8=keeps_fp8), checkpoint.config


def load_torch(
    checkpoint: Checkpoint,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    *,
    keeps_fp8: bool = False,
    shard: Shard | None = None,
) -> Transformer:
    """``load_model`` for an opened checkpoint; with a ``shard`` it loads one rank's part."""
    config = checkpoint.config if shard is None else shard.config
    dtype = getattr(torch, config.dtype) if dtype is None else dtype
    if str(dtype).removeprefix("torch.") not in SUPPORTED_DTYPES:
        raise CheckpointError(f"dtype is {dtype}; expected one of {', '.join(SUPPORTED_DTYPES)}")
    with torch.device("meta"):
        model = Transformer(config)
    _fill(model, checkpoint.tensors(keeps_fp8, shard), dtype, torch.device(device), checkpoint.path)
    return model.eval()


def read_config(directory: Path) -> ModelConfig:
    """Read ``config.json`` of a checkpoint directory; the end tokens of ``generation_config.json`` come
    before its own."""
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
    """The config with additional end tokens, such as a tokenizer's, after its own; those without an embedding are left
    out."""
    more = [token_id for token_id in more if token_id < config.vocab_size and token_id != config.mask_token_id]
    return dataclasses.replace(config, eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *more))))


def save_model(model: Transformer, config: ModelConfig, directory: str | Path) -> None:
    """Write ``config.json`` and ``model.safetensors``, from which this package and transformers load the model.

    Raises ValueError for a packed model, whose tensors no longer have a checkpoint's names, and for one with an adapter
    of masked rows, which a checkpoint cannot hold.
    """
    if has_masked_lora(model):
        raise ValueError(
            "the model has an adapter of masked rows, which cannot be merged; expected the base model alone"
        )
    if is_packed(model):
        raise ValueError("the model is packed for inference; expected one that is saved before pack_for_inference")
    save_tensors(model.state_dict(), config, directory)


def save_tensors(tensors: Mapping[str, Tensor], config: ModelConfig, directory: str | Path) -> None:
    """``save_model`` for a state dict that was gathered elsewhere. The config records the dtype of the tensors.

    Each file appears complete or not at all, and the config last, so a directory with a config has its weights.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    if config.tie_word_embeddings:
        kept.pop("lm_head.weight", None)
    stored = str(kept["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    values = dataclasses.replace(config, dtype=stored).to_hf()
    save_shared(kept, directory / WEIGHTS_FILE, {"format": "pt"})
    with write_whole(directory / "config.json") as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _fill(
    model: Transformer,
    tensors: Iterable[tuple[str, Tensor | Int8Rows]],
    dtype: torch.dtype,
    device: torch.device,
    origin: Path,
) -> None:
    """Replace the model's meta parameters by ``tensors``; every name and shape must match."""
    for name, tensor in checked_tensors(tensors, model, origin):
        owner, _, leaf = name.rpartition(".")
        if leaf == SCALE:
            assert isinstance(tensor, Tensor), "of weights that stay in FP8"
            model.get_submodule(owner).register_buffer(SCALE, tensor.to(device))
            continue
        wide = tensor.widened() if isinstance(tensor, Int8Rows) else tensor
        if wide.dtype == FP8:  # its scale came before it
            setattr(model.get_submodule(owner), leaf, nn.Parameter(wide.to(device, copy=True), requires_grad=False))
            continue
        # A copy even if nothing changes: the tensor may be a view of a mapped file that is about to be closed.
        value = wide.to(device=device, dtype=dtype, copy=True)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value))
    model.tie_weights()
    model.to(device)  # what is left: RoPE's frequencies


def checked_tensors(
    tensors: Iterable[tuple[str, Shaped]], model: Transformer, origin: Path
) -> Iterator[tuple[str, Shaped]]:
    """Yield ``tensors`` if they are exactly the parameters of ``model`` (which may be on the meta device) by name and
    shape. Raises CheckpointError."""
    missing = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    expected = dict(missing)
    for name, tensor in tensors:
        if name.removesuffix(SCALE) + "weight" in expected and name.endswith(SCALE):
            yield name, tensor
            continue
        if name not in expected:
            raise CheckpointError(
                f"{origin} holds the tensor {name}, which a {model.config.model_type} model of this "
                "config does not have"
            )
        if list(tensor.shape) != expected[name]:
            raise CheckpointError(
                f"{origin}: tensor {name} has shape {list(tensor.shape)}; expected {expected[name]} by the config"
            )
        if isinstance(tensor, Tensor) and str(tensor.dtype).removeprefix("torch.") not in _READABLE_DTYPES:
            raise CheckpointError(
                f"{origin}: tensor {name} has dtype {tensor.dtype}; expected one of {', '.join(SUPPORTED_DTYPES)}"
            )
        missing.pop(name, None)
        yield name, tensor
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{origin} lacks the tensor {next(iter(missing))}{others}")


def _is_redundant(name: str, config: ModelConfig) -> bool:
    """Whether a tensor follows from the config or from another tensor, or is not used, although checkpoints
    carry it."""
    return (
        is_unused(name)
        or name.endswith(".rotary_emb.inv_freq")
        or (config.tie_word_embeddings and name == "lm_head.weight")
    )


def _has_other_head(files: Sequence[Path]) -> bool:
    """Whether safetensors files hold an output projection that is not the embedding."""
    found: dict[str, Tensor] = {}
    for path in files:
        with _safetensors(path), safe_open(path, framework="pt") as file:
            for name in {"lm_head.weight", "model.embed_tokens.weight"}.intersection(file.keys()):
                found[name] = file.get_tensor(name)
    if len(found) < 2:
        return False
    head, embedding = found["lm_head.weight"], found["model.embed_tokens.weight"]
    same_kind = head.dtype == embedding.dtype and head.shape == embedding.shape
    return not (same_kind and torch.equal(head.view(torch.uint8), embedding.view(torch.uint8)))


def _check_sizes(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], origin: Path) -> None:
    """Compare the config with the tensors in the file before anything of the config's sizes is made.

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


def _shapes(files: Iterable[Path]) -> tuple[dict[str, tuple[int, ...]], bool]:
    """The shapes of all tensors, and whether weights are int8."""
    shapes: dict[str, tuple[int, ...]] = {}
    is_int8 = False
    for path in files:
        with _safetensors(path), safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is not a mapping
                part = file.get_slice(name)
                shapes[name] = tuple(part.get_shape())
                is_int8 = is_int8 or (part.get_dtype() == "I8" and not is_scale(name))
    return shapes, is_int8


@contextmanager
def _safetensors(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is a corrupt or truncated safetensors file: {error}") from error


def _read_files(
    files: Iterable[Path], config: ModelConfig, wanted: Callable[[str], bool], cut: CutByName | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every wanted tensor in safetensors files that is not redundant, one at a time. Reads only the
    part of each that ``cut`` names."""
    for path in files:
        with _safetensors(path):
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if wanted(name) and not _is_redundant(name, config)]  # noqa: SIM118
            for name in names:
                # Opened again for each tensor: closing unmaps the pages read, which otherwise count as a second copy.
                with safe_open(path, framework="pt") as file:
                    part = None if cut is None else cut(name)
                    yield name, file.get_tensor(name) if part is None else part.of(file.get_slice(name))


def _read_tensors(
    files: Iterable[Path], config: ModelConfig, keeps_fp8: bool, origin: Path, cut: CutByName | None = None
) -> Iterator[tuple[str, Tensor]]:
    """``_read_files``, with tensors in FP8 passed through ``with_scales``."""
    scales = dict(_read_files(files, config, is_scale))
    tensors = _read_files(files, config, lambda name: not is_scale(name), cut)
    if not scales:
        yield from tensors
        return
    blocks = any(scale.ndim == 2 and scale.shape[1] > 1 for scale in scales.values())
    if blocks or not keeps_fp8:
        kind = " by blocks of 128 x 128" if blocks else ""
        log.warning("%s: weights in FP8%s are widened; quantization 'fp8' rounds them again, by output", origin, kind)
    try:
        yield from with_scales(tensors, scales, keeps_fp8, cut)
    except CheckpointError as error:
        raise CheckpointError(f"{origin}: {error}") from error


def _read_int8(
    files: Iterable[Path], config: ModelConfig, origin: Path, cut: CutByName | None = None
) -> Iterator[tuple[str, Tensor | Int8Rows]]:
    """``_read_files``, matrices in int8 with their scales."""
    scales = dict(_read_files(files, config, is_scale))
    if cut is not None:
        scales = {name: _scale_of(scale, cut(name.removesuffix(INT8_SCALE))) for name, scale in scales.items()}
    for name, tensor in _read_files(files, config, lambda name: not is_scale(name), cut):
        is_rows = tensor.dtype == torch.int8 and tensor.ndim == 2
        yield name, join_scale(origin, name, tensor, scales) if is_rows else tensor


def _scale_of(scale: Tensor, cut: Cut | None) -> Tensor:
    """The scales of the matrix rows that are read."""
    return scale if cut is None else scale[cut.rows]


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
