# SPDX-License-Identifier: Apache-2.0
"""Groups of options that several commands share, and how a command takes a group. Does not import torch.

A group is a frozen dataclass whose fields are annotated with ``option``; a command names it as the type of one
parameter. Defaults come from ``SamplingParams``. The engine's options, with their help, come from ``EngineOptions``.
"""

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape

from wedlm.cli.terminal import plain_errors
from wedlm.engine.options import EngineOptions as EngineOptions  # the group that is declared elsewhere
from wedlm.engine.sampling_params import SamplingParams as Home

if TYPE_CHECKING:
    from wedlm import SamplingParams

PROMPT, HOW, DRAW, MODEL = "Prompt and output", "Decoding", "Sampling and length", "Model and machine"
DEFAULTS = Home()
_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def option_of(field: str) -> str:
    """The command line's name for a field of ``SamplingParams`` or of the engine's options."""
    return field.removeprefix("wedlm_").removesuffix("_factor")


FIELDS = {option_of(field.name): field.name for field in dataclasses.fields(Home)}


def option(help: str, panel: str | None, *names: str) -> Any:
    """An option in a panel of the help. Brackets in its help text are not markup."""
    return typer.Option(*names, help=escape(help), rich_help_panel=panel)


Decoding = Annotated[str | None, option("auto, verified, streaming, block, autoregressive. [the model's]", HOW)]
MaxTokens = Annotated[int, option("Largest number of tokens of the answer.", DRAW)]


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    """What a decoding mode does with its window."""

    window_size: Annotated[
        int | None, option("Positions of a window or block; most rows a forward in auto (GPU: 64), verified. [16]", HOW)
    ] = DEFAULTS.wedlm_window_size
    entropy_threshold: Annotated[
        str, option("Streaming, block: fill below this entropy (nats); none: one per forward; auto: the model's.", HOW)
    ] = "auto"
    pos_penalty: Annotated[float, option("Streaming, block: entropy added per position of distance.", HOW)] = (
        DEFAULTS.wedlm_pos_penalty_factor
    )
    next_token: Annotated[
        str | None,
        option("Streaming: the next token is decided by its masked row, or causal: as in AR. [the model's]", HOW),
    ] = DEFAULTS.wedlm_next_token
    remasking_strategy: Annotated[
        str | None, option("Block: entropy, low_confidence_static or low_confidence_dynamic. [the model's]", HOW)
    ] = DEFAULTS.remasking_strategy
    confidence_threshold: Annotated[
        float, option("Block, low_confidence_dynamic: fill above this probability.", HOW)
    ] = DEFAULTS.confidence_threshold
    denoising_steps: Annotated[
        int | None, option("Block, low_confidence_...: most forwards per block; default: one per position.", HOW)
    ] = DEFAULTS.denoising_steps
    draft_entropy: Annotated[float, option("Verified: draft up to the first row this uncertain (nats).", HOW)] = (
        DEFAULTS.wedlm_draft_entropy
    )
    lookup_drafts: Annotated[
        int | None, option("Auto, verified: most drafts per forward from the text so far; 0: none.", HOW)
    ] = DEFAULTS.wedlm_lookup_drafts


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are drawn, and how many."""

    temperature: Annotated[float, option("0 takes the most probable token.", DRAW)] = DEFAULTS.temperature
    top_p: Annotated[float, option("Sample from the smallest set with this probability.", DRAW)] = DEFAULTS.top_p
    top_k: Annotated[int, option("Sample from the k most probable tokens; 0: from all.", DRAW)] = DEFAULTS.top_k
    seed: Annotated[int | None, option("Same seed, same text.", DRAW)] = DEFAULTS.seed
    max_tokens: MaxTokens = DEFAULTS.max_tokens


# What every command that loads a model has of the engine's options.
USUAL = (
    "adapter", "dtype", "quantization", "device", "tensor_parallel_size", "max_model_len", "mask_token_id",
    "block_length",
)  # fmt: skip
Threads = Annotated[int | None, option("CPU threads; default: torch's choice.", MODEL)]
KvCacheGb = Annotated[float | None, option("Key/value cache; default: what the engine takes.", MODEL)]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how much of the machine."""

    model: Annotated[str, option("Checkpoint directory, .gguf file, hub id, 'demo' or 'demo-base'.", MODEL)] = "demo"
    threads: Threads = None


@dataclass(frozen=True)
class Only:
    """Stands in ``Annotated`` next to a dataclass of options: the command has only these fields, and the others keep
    their defaults."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Turn ``function`` into what typer reads: a parameter whose type is a group becomes one option for each field.

    It also gets --debug; without this flag an error that the user can fix is one sentence.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Any, dict[str, str]]] = {}
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        group = get_args(hints[name])[0] if get_origin(hints[name]) is Annotated else hints[name]
        if dataclasses.is_dataclass(group):
            options = _parameters_of(group, *getattr(hints[name], "__metadata__", ()))
            groups[name] = group, {one.name: field for field, one in options.items()}
            parameters += options.values()
        else:
            parameters.append(parameter.replace(kind=_KEYWORD, annotation=hints[name]))
    parameters.append(_DEBUG)

    @functools.wraps(function)
    def call(debug: bool, **values: Any) -> None:
        with plain_errors(debug):
            for name, (group, fields) in groups.items():
                values[name] = group(**{field: values.pop(one) for one, field in fields.items()})
            function(**values)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


_DEBUG = inspect.Parameter(
    "debug",
    _KEYWORD,
    default=False,
    annotation=Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")],
)


def _parameters_of(group: Any, only: Only | None = None) -> dict[str, inspect.Parameter]:
    """A keyword parameter for each field of a dataclass, or only for those of ``only``.

    The option is in the field's type, or is made from the field's ``help``.
    """
    hints = get_type_hints(group, include_extras=True)
    parameters = {}
    for field in dataclasses.fields(group):
        if only is None or field.name in only.names:
            hint = hints[field.name]
            if get_origin(hint) is not Annotated:
                hint = Annotated[_read_by_us(hint), option(field.metadata["help"], MODEL)]
            name = option_of(field.name)
            default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
            parameters[field.name] = inspect.Parameter(name, _KEYWORD, default=default, annotation=hint)
    return parameters


def _read_by_us(hint: Any) -> Any:
    """The type with str for each Literal, so that the group refuses other values in its own words."""
    if get_origin(hint) is Literal:
        return str
    if get_origin(hint) in (Union, UnionType):
        return functools.reduce(operator.or_, map(_read_by_us, get_args(hint)))
    return hint


def values_of(*groups: Any) -> dict[str, Any]:
    """The options of several groups by name."""
    return {field.name: getattr(group, field.name) for group in groups for field in dataclasses.fields(group)}


def changed(group: Any) -> dict[str, Any]:
    """The options of a group that differ from their default, by name."""
    return {
        field.name: value
        for field in dataclasses.fields(group)
        if (value := getattr(group, field.name)) != field.default
    }


def fields_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Values for the fields of ``SamplingParams`` that are among these options. Raises ValueError."""
    values = {FIELDS[name]: value for name, value in options.items() if name in FIELDS}
    return values | {"wedlm_entropy_threshold": parse_threshold(options["entropy_threshold"])}


def sampling_params(options: Mapping[str, Any]) -> "SamplingParams":
    """``SamplingParams`` from the options that it knows. Raises ValueError."""
    return Home(**fields_of(options))


def parse_threshold(text: str) -> float | Literal["auto"] | None:
    """A number of nats, "none" or "auto"."""
    if text.lower() == "auto":
        return "auto"
    try:
        return None if text.lower() == "none" else float(text)
    except ValueError:
        raise ValueError(f"entropy_threshold is {text!r}; expected a number >= 0, none or auto") from None
