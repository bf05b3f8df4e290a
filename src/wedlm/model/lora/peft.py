# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters (arXiv 2106.09685) in peft's format: merged into the weights, or as factors that are chosen by row.

Adapters of masked rows (``masked_rows.py``) cannot be merged and stay apart from the weights. They have a separate type
and separate names, so that programs that only know LoRA refuse them. An adapter that has both is a LoRA with an adapter
of masked rows, trained on top of it, in its folder MASKED_FOLDER.

Only tensors and a JSON file are read, and peft is not needed. Everything is checked before the first weight changes.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from wedlm.model.config import ModelConfig, check_integer, read_flag, read_integer, read_number
from wedlm.model.errors import CheckpointError, reading
from wedlm.model.formats.checkpoint import read_config
from wedlm.model.formats.json_file import read_json_object
from wedlm.model.formats.resolve import locate_adapter
from wedlm.model.inference.layers import is_packed
from wedlm.model.lora.masked_rows import MASK_EMBEDDING, MASKED_TYPE, MaskedParts, attach_masked_lora, has_masked_lora
from wedlm.model.lora.packed_adapter import unpack
from wedlm.model.lora.row_factors import RowFactors
from wedlm.model.sharding import Shard
from wedlm.model.transformer import Transformer

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MASKED_FOLDER = "masked_rows"
_PREFIX = "base_model.model."
_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
# Keys of the config that do not change what a merged weight is: where training put the matrices (the tensors' names
# say it again), how it went, and notes for other programs. Any other key must be absent or empty.
# fmt: off
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "trainable_token_indices",
    "use_rslora",
}
# fmt: on
_MAX_EXPRESSIONS, _MAX_PATTERN, _MAX_NAME, _MAX_TENSORS = 8, 128, 128, 2**13
_PLAIN = re.compile(r"[\w.-]+")
# A character, an escaped one, a class or a dot, each perhaps repeated; anchors; and a group of alternatives of names.
_ATOMS = re.compile(r"[\^$]|\((?:\?:)?[\w.|\\]*\)|(?:\\[dws.]|\[[\w-]+\]|[\w.-])(?:[*+?]|\{\d{1,2}\})?")
# Other initialisations (pissa, olora, corda, ...) also change the base weights, which the adapter then lacks.
_PLAIN_INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True, slots=True)
class LowRank:
    """The delta ``scale · b @ a`` of a weight: ``a`` is [r, in], ``b`` [out, r]."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class Rows:
    """New values [n, C] for the rows ``ids`` of a weight."""

    ids: tuple[int, ...]
    values: Tensor


@dataclass(frozen=True, slots=True)
class Adapter:
    """Changes by parameter name, applied in this order: whole tensors, single rows, low-rank sums.

    ``masked_rows``: the sums are only for masked rows, and the only whole tensor is MASK_EMBEDDING.
    """

    whole: dict[str, Tensor]
    rows: dict[str, Rows]
    low_rank: dict[str, LowRank]
    masked_rows: bool = False


def apply_adapter(model: Transformer, directory: str | Path, shard: Shard | None = None) -> None:
    """Merge the adapter in ``directory`` into ``model``, in place: sums are in float32, stored in the model's dtype. An
    adapter of masked rows is attached instead, in the model's dtype. ``shard``: the part of a whole model that
    ``model`` is; it gets the same part of the adapter, which belongs to the whole.

    Raises CheckpointError, with the model unchanged, for an adapter that cannot be read, is of an unsupported kind or
    does not fit; ValueError for a packed model.
    """
    if is_packed(model):
        raise ValueError("the model is packed for inference; expected one to which the adapter is applied before that")
    if has_masked_lora(model):
        raise ValueError("the model has an adapter of masked rows, which cannot be merged; expected one without")
    adapter, masked = _read_both(directory)
    whole = model if shard is None else _shape_of(shard.whole)
    for one in (adapter, masked):
        if one is not None:
            _check_fit(one, whole, Path(directory))
    if shard is not None:
        adapter, masked = (None if one is None else _shard_of(one, shard, whole) for one in (adapter, masked))
    if adapter is not None:
        _merge(model, adapter)
    if masked is not None:
        attach_masked_lora(model, *_masked_parts(masked))


def _merge(model: Transformer, adapter: Adapter) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in adapter.whole.items():
            if name in parameters:  # a tied output projection has no parameter of its own
                parameters[name].copy_(tensor)
        for name, rows in adapter.rows.items():
            index = torch.tensor(rows.ids, device=parameters[name].device)
            parameters[name].index_copy_(0, index, rows.values.to(parameters[name]))
        for name, delta in adapter.low_rank.items():
            _add(parameters[name], delta)


def _shard_of(adapter: Adapter, shard: Shard, whole: Transformer) -> Adapter:
    """The part of an adapter of the ``whole`` model, on the meta device, that belongs to one rank."""
    rows: dict[str, Rows] = {}
    for name, one in adapter.rows.items():
        here = shard.cut(name, tuple(whole.get_parameter(name).shape)).rows.indices(whole.get_parameter(name).shape[0])
        own = [i for i, token in enumerate(one.ids) if here[0] <= token < here[1]]
        if own:
            rows[name] = Rows(tuple(one.ids[i] - here[0] for i in own), one.values[own])
    return dataclasses.replace(
        adapter,
        whole={name: shard.cut(name, tuple(tensor.shape)).of(tensor) for name, tensor in adapter.whole.items()},
        rows=rows,
        low_rank={
            name: LowRank(*shard.low_rank(name, one.a, one.b), one.scale) for name, one in adapter.low_rank.items()
        },
    )


def read_masked_adapter(directory: str | Path, config: ModelConfig) -> MaskedParts | None:
    """Read the adapter in ``directory`` in the form that ``attach_masked_lora`` takes; None unless it is one of masked
    rows alone.

    Raises CheckpointError for an adapter that cannot be read, or does not fit a model of ``config``.
    """
    adapter, masked = _read_both(directory)
    if adapter is not None or masked is None:
        return None
    _check_fit(masked, _shape_of(config), Path(directory))
    return _masked_parts(masked)


def read_row_factors(directory: str | Path, config: ModelConfig, max_rank: int) -> RowFactors:
    """Read the adapter in ``directory`` as factors that are chosen by row, on the CPU.

    Raises CheckpointError for an adapter that cannot be read, does not fit a model of ``config``, changes more than
    linear layers, or has a rank above ``max_rank`` (the largest rank of each kind, added up). Files that would hold
    more than that are not read.
    """
    directory, model = locate_adapter(directory), _shape_of(config)
    matrices = [weight.shape for name, weight in model.named_parameters() if _is_layers_matrix(name, weight)]
    most = 2**20 + 4 * max_rank * sum(map(sum, matrices)) + 4 * config.hidden_size
    folders = (directory, directory / MASKED_FOLDER)
    size = sum(path.stat().st_size for one in folders if (path := one / WEIGHTS_FILE).is_file())
    if size > most:
        raise CheckpointError(
            f"{directory} has {size} bytes of weights; expected at most {most}, an adapter of rank {max_rank} "
            "(max_adapter_rank)"
        )
    adapter, masked = _read_both(directory)
    for one in (adapter, masked):
        if one is not None:
            _check_fit(one, model, directory)
    if adapter is not None:
        _check_by_row(adapter, model, directory)
    noted = adapted_config(dataclasses.replace(config, mask_token_id=None, block_size=None), directory)
    factors = RowFactors(
        every={} if adapter is None else _matrices(adapter),
        masked={} if masked is None else _matrices(masked),
        mask_embedding=None if masked is None else masked.whole.get(MASK_EMBEDDING),
        mask_token_id=noted.mask_token_id,
        block_size=noted.block_size,
    )
    if factors.rank > max_rank:
        raise CheckpointError(f"{directory} has rank {factors.rank}; expected at most {max_rank} (max_adapter_rank)")
    return factors


def _shape_of(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


def _is_layers_matrix(name: str, weight: Tensor) -> bool:
    return name.startswith("model.layers.") and weight.dim() == 2


def _check_by_row(adapter: Adapter, model: Transformer, origin: Path) -> None:
    """Raises CheckpointError if the adapter changes anything except the layers' matrices by low-rank sums."""
    whole = [*adapter.whole, *adapter.rows]
    known = {name for name, weight in model.named_parameters() if _is_layers_matrix(name, weight)}
    other = min([*whole, *(adapter.low_rank.keys() - known)], default=None)
    if other is not None:
        raise CheckpointError(
            f"{origin} changes {other}, which cannot differ from row to row; expected a LoRA of the layers' "
            "projections alone, or the adapter merged (adapter=DIR)"
        )


def _read_both(directory: str | Path) -> tuple[Adapter | None, Adapter | None]:
    """(the LoRA, the adapter of masked rows) in a directory that has one or both. Raises CheckpointError."""
    directory = locate_adapter(directory)
    adapter, folder = read_adapter(directory), directory / MASKED_FOLDER
    if not folder.is_dir():
        return (None, adapter) if adapter.masked_rows else (adapter, None)
    masked = read_adapter(folder)
    if adapter.masked_rows or not masked.masked_rows:
        raise CheckpointError(
            f"{directory} has the type {_type_of(adapter)} and its folder {MASKED_FOLDER} {_type_of(masked)}; expected "
            f"LORA and {MASKED_TYPE}"
        )
    return adapter, masked


def _type_of(adapter: Adapter) -> str:
    return MASKED_TYPE if adapter.masked_rows else "LORA"


def _matrices(adapter: Adapter) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (delta.a, delta.scale * delta.b.float()) for name, delta in adapter.low_rank.items()}


def _masked_parts(adapter: Adapter) -> MaskedParts:
    return _matrices(adapter), adapter.whole.get(MASK_EMBEDDING)


def adapted_config(config: ModelConfig, directory: str | Path) -> ModelConfig:
    """The base model's config with the mask token and block size that ``wedlm train`` stores with an adapter.

    An adapter from elsewhere stores none, and the config stays as it is. Raises CheckpointError.
    """
    directory = locate_adapter(directory)
    for folder in (directory, directory / MASKED_FOLDER):
        if (folder / "config.json").is_file():
            config = _with_noted(config, folder)
    return config


def _with_noted(config: ModelConfig, directory: Path) -> ModelConfig:
    noted = read_config(directory)
    if (noted.model_type, noted.hidden_size, noted.num_layers) != (
        config.model_type,
        config.hidden_size,
        config.num_layers,
    ):
        raise CheckpointError(
            f"{directory} adapts a {noted.model_type} model of {noted.num_layers} layers, {noted.hidden_size} wide; "
            f"this one is {config.model_type}, {config.num_layers} layers, {config.hidden_size} wide"
        )
    return dataclasses.replace(config, mask_token_id=noted.mask_token_id, block_size=noted.block_size)


def _add(parameter: nn.Parameter, delta: LowRank) -> None:
    a, b = (matrix.to(parameter.device, torch.float32) for matrix in (delta.a, delta.b))
    parameter.copy_(parameter.float().addmm_(b, a, alpha=delta.scale))


def read_adapter(directory: str | Path) -> Adapter:
    """Read the adapter that peft saved in ``directory`` (or "demo-masked"), on the CPU; keys may come with or without
    peft's prefix.

    It understands LoRA matrices (also of embeddings, with patterns of rank and alpha, and rank-stabilised), trained
    token rows, and modules or biases saved whole. Raises CheckpointError for anything else.
    """
    directory = locate_adapter(directory)
    with reading(directory):
        config = _read_config(directory)
        return _sort_out(_read_tensors(directory), config)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"there is no {CONFIG_FILE}; expected the directory of an adapter in peft's format")
    config = read_json_object(path)
    if config.get("peft_type") not in ("LORA", MASKED_TYPE):
        raise ValueError(f"peft_type is {config.get('peft_type')!r}; expected 'LORA' or {MASKED_TYPE!r}")
    for key in sorted(set(config) - _HARMLESS):
        # peft writes {} or false for what is off; a configuration of a variant that is on is never empty.
        if config[key]:
            raise ValueError(
                f"{key} is {config[key]!r}, a variant of LoRA that is not supported; expected it to be off"
            )
    if config.get("init_lora_weights") not in _PLAIN_INITIALISATIONS:
        raise ValueError(
            f"init_lora_weights is {config['init_lora_weights']!r}, which also changes the base weights; expected an "
            "adapter that peft converted to plain LoRA (save_pretrained's path_initial_model_for_weight_conversion)"
        )
    return config


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        pickles = sorted(file.name for file in directory.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
        found = f"only a pickle ({pickles[0]}), which can run code when read" if pickles else "no weights"
        raise ValueError(f"the directory holds {found}; expected {WEIGHTS_FILE}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{WEIGHTS_FILE} is a corrupt or truncated safetensors file: {error}") from error
    return {name.removeprefix(_PREFIX): tensor for name, tensor in unpack(tensors).items()}


# The ends of a name that say what its tensor is; what comes before them is the module's name.
_KINDS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding A",
    ".lora_embedding_B": "embedding B",
    ".token_adapter.trainable_tokens_delta": "rows",
}
_MASKED_KINDS = {".masked_lora_A.weight": "A", ".masked_lora_B.weight": "B"}


def _sort_out(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Adapter:
    """Sort tensors by what they do. A name without an adapter's ending is a whole tensor."""
    whole: dict[str, Tensor] = {}
    rows: dict[str, Rows] = {}
    pairs: dict[str, dict[str, Tensor]] = {}
    masked_rows = config["peft_type"] == MASKED_TYPE
    kinds = _MASKED_KINDS if masked_rows else _KINDS
    if len(tensors) > _MAX_TENSORS:
        raise ValueError(f"{WEIGHTS_FILE} has {len(tensors)} tensors; expected at most {_MAX_TENSORS}")
    for name, tensor in tensors.items():
        if len(name) > _MAX_NAME:
            raise ValueError(f"a tensor's name is {name[:80]!r}...; expected at most {_MAX_NAME} characters")
        end = next((end for end in kinds if name.endswith(end)), "")
        module, kind = name.removesuffix(end), kinds.get(end)
        if not tensor.is_floating_point():
            raise ValueError(f"tensor {name} has dtype {tensor.dtype}; expected floating point numbers")
        if kind is None:
            whole[name.replace(".base_layer.", ".")] = tensor
        elif kind == "rows":
            rows[f"{module}.weight"] = Rows(_token_ids(module, len(tensor), config), tensor)
        else:
            pairs.setdefault(module, {})[kind] = tensor
    if masked_rows and whole.keys() - {MASK_EMBEDDING}:
        raise ValueError(f"tensor {min(whole.keys() - {MASK_EMBEDDING})} is not part of an adapter of masked rows")
    low_rank = {f"{module}.weight": _low_rank(module, pair, config) for module, pair in pairs.items()}
    return Adapter(whole, rows, low_rank, masked_rows)


def _low_rank(module: str, pair: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowRank:
    if set(pair) == {"A", "B"}:
        a, b = pair["A"], pair["B"]
    elif set(pair) == {"embedding A", "embedding B"}:
        a, b = pair["embedding B"].T, pair["embedding A"].T  # a lookup's weight is the transpose of a projection's
    else:
        raise ValueError(f"{module} has the LoRA matrices {sorted(pair)}; expected both A and B")
    rank = _by_pattern(config, "rank_pattern", module, read_integer(config, "r", 8))
    if a.ndim != 2 or b.ndim != 2 or not len(a) == b.shape[1] == rank:
        raise ValueError(
            f"the LoRA matrices of {module} have shapes {list(a.shape)} and {list(b.shape)}; expected rank {rank}"
        )
    alpha = _by_pattern(config, "alpha_pattern", module, read_number(config, "lora_alpha", 8))
    return LowRank(a, b, alpha / (math.sqrt(rank) if read_flag(config, "use_rslora", False) else rank))


def _by_pattern(config: Mapping[str, Any], key: str, module: str, default: float) -> float:
    """The value of the first pattern that the end of the module's name matches, as in peft."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{key} is {str(patterns)[:80]}; expected an object of patterns")
    expressions = [pattern for pattern in patterns if not _PLAIN.fullmatch(pattern)]
    if len(expressions) > _MAX_EXPRESSIONS:
        raise ValueError(f"{key} has {len(expressions)} regular expressions; expected at most {_MAX_EXPRESSIONS}")
    parts = module.split(".")
    matches = {".".join(parts[start:]) for start in range(len(parts))} & patterns.keys()
    matches |= {one for one in expressions if re.match(rf"(.*\.)?({_checked_pattern(key, one)})$", module)}
    first = next((pattern for pattern in patterns if pattern in matches), None) if matches else None
    return default if first is None else read_number(patterns, first, default)


def _checked_pattern(key: str, pattern: str) -> str:
    """Raises ValueError for a pattern that could be matched in too many ways to try them all.

    What is left: one repetition of a single character (``.*``, ``\\d+``), and alternatives within one group.
    """
    atoms = _ATOMS.findall(pattern)
    repeats = sum(atom[-1] in "*+?}" and len(atom) > 1 and not atom.startswith("(") for atom in atoms)
    if len(pattern) > _MAX_PATTERN or "".join(atoms) != pattern or repeats > 1 or pattern.count("(") > 1:
        raise ValueError(
            f"{key} has the pattern {pattern[:80]!r}; expected a module's name of at most {_MAX_PATTERN} characters, "
            "with one repetition (.*) and one group of alternatives at most"
        )
    return pattern


def _token_ids(module: str, count: int, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The ids of the trained token rows of a module; a list means the input embedding's."""
    listed = config.get("trainable_token_indices") or {}
    by_module = listed if isinstance(listed, dict) else {"embed_tokens": listed}
    ids = next((ids for name, ids in by_module.items() if f".{module}".endswith(f".{name}")), None)
    if not isinstance(ids, list) or len(ids) != count:
        raise ValueError(
            f"trainable_token_indices is {listed!r}; expected a list of {count} token ids for {module}, one for "
            "each trained row"
        )
    for token_id in ids:
        check_integer("trainable_token_indices", token_id, minimum=0)
    return tuple(ids)


def _check_fit(adapter: Adapter, model: Transformer, origin: Path) -> None:
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if adapter.masked_rows:
        shapes = {name: shape for name, shape in shapes.items() if name.startswith("model.layers.") and len(shape) == 2}
        shapes[MASK_EMBEDDING] = (model.config.hidden_size,)
    elif model.config.tie_word_embeddings:
        shapes[_OUTPUT] = shapes[_EMBEDDING]
        _check_tied(adapter, origin)
    changes: list[tuple[str, tuple[int, ...]]] = [(name, tuple(tensor.shape)) for name, tensor in adapter.whole.items()]
    changes += [(name, (len(delta.b), delta.a.shape[1])) for name, delta in adapter.low_rank.items()]
    for name, rows in adapter.rows.items():
        changes.append((name, (*shapes.get(name, ())[:1], *rows.values.shape[1:])))
        if name in shapes and max(rows.ids) >= shapes[name][0]:
            raise CheckpointError(
                f"{origin}: trainable_token_indices contains {max(rows.ids)}; expected ids below {shapes[name][0]}"
            )
    for name, shape in changes:
        if name not in shapes:
            raise CheckpointError(f"{origin} changes {name}, which this model does not have")
        if shape != shapes[name]:
            raise CheckpointError(
                f"{origin}: the change of {name} has shape {list(shape)}; expected {list(shapes[name])}, the model's"
            )


def _check_tied(adapter: Adapter, origin: Path) -> None:
    """Refuse an adapter that makes output projection and embedding differ in a model where they are one."""
    both = [adapter.whole[name] for name in (_EMBEDDING, _OUTPUT) if name in adapter.whole]
    apart = len(both) == 1 or (len(both) == 2 and not torch.equal(*both))
    if apart or {_EMBEDDING, _OUTPUT} & set(adapter.low_rank) or _OUTPUT in adapter.rows:
        raise CheckpointError(
            f"{origin} changes one of {_EMBEDDING} and {_OUTPUT}, which are one tensor in this model; expected "
            "trainable_token_indices of embed_tokens, or no change of either"
        )
