# SPDX-License-Identifier: Apache-2.0
"""Keys of the original WeDLM fine-tuning configuration that do not exist here. They are translated, accepted if they
cannot change a result, or refused with the reason and an alternative."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

FLAGS = ("rebuild_cache",)  # which its command line takes without a value
_MAX_EPS = 1e-7  # changes a row's weight by less than one part in 100,000
_SPEED = (
    "offload_nvme nvme_path pin_memory overlap_comm contiguous_gradients reduce_bucket_size "
    "stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_max_live_parameters "
    "stage3_max_reuse_distance"
)
# How DeepSpeed moves what it shares out, which decides time and memory.
_TUNING = {f"deepspeed_{name}" for name in _SPEED.split()}


def translated(given: Mapping[str, Any]) -> dict[str, Any]:
    """These keys and values in the form of ``TrainConfig``. Raises ValueError naming a key that asks for something
    missing here."""
    values = {name: value for name, value in given.items() if name not in _TUNING}
    for name, take in _TAKEN.items():
        if name in values:
            take(values, name)
    return values


def _flag_without_effect(values: dict[str, Any], name: str) -> None:
    if not isinstance(values[name], bool):
        raise ValueError(f"{name} is {values[name]!r}; expected true or false, of which neither changes a run")
    del values[name]


def _epsilon(values: dict[str, Any], name: str) -> None:
    value = values.pop(name)
    try:
        within = not isinstance(value, bool) and 0 <= float(value) <= _MAX_EPS
    except (TypeError, ValueError):
        within = False
    if not within:
        raise ValueError(
            f"{name} is {value!r}; expected 0 to {_MAX_EPS:g}, which has no effect: ratios are above 0 without it"
        )


def _end_tokens(values: dict[str, Any], name: str) -> None:
    """In the original, 0 and 1 both add nothing to the end that the template writes."""
    if values[name] == 0 and not isinstance(values[name], bool):
        values[name] = 1


def _zero(values: dict[str, Any], name: str) -> None:
    """``use_deepspeed`` switches on a stage, which is 2 by default."""
    asked = values.pop(name)
    if not isinstance(asked, bool):
        raise ValueError(f"{name} is {asked!r}; expected true or false")
    values["deepspeed_zero_stage"] = values.get("deepspeed_zero_stage", 2) if asked else 0
    if values["deepspeed_zero_stage"] == 3:
        raise ValueError(
            "deepspeed_zero_stage is 3; expected 1 or 2: accelerate's FSDP with fsdp_version 2 shards weights, too"
        )


def _offload(values: dict[str, Any], name: str) -> None:
    asked = values.pop(name)
    if not isinstance(asked, bool):
        raise ValueError(f"{name} is {asked!r}; expected true or false")
    if asked:
        what = "moments" if name.endswith("optimizer") else "weights"
        warnings.warn(
            f"{name} is true: {what} stay on the GPUs here, which changes memory and no result; lora_rank or more GPUs "
            "need less",
            stacklevel=4,
        )


def _scheduler(values: dict[str, Any], name: str) -> None:
    if values[name] == "constant_with_warmup":
        values[name] = "constant"


def _empty_is_none(values: dict[str, Any], name: str) -> None:
    values[name] = values[name] or None


def _secret(values: dict[str, Any], name: str) -> None:
    """The message must not repeat a secret."""
    if values.pop(name):
        raise ValueError(
            f"{name} is set; expected none: set the environment variable WANDB_API_KEY, since secrets are never read "
            "from or written to a file"
        )


def _deepspeed_file(values: dict[str, Any], name: str) -> None:
    if values.pop(name):
        raise ValueError(
            f"{name} is set; expected deepspeed_zero_stage, or accelerate's own configuration: accelerate launch "
            "--config_file …"
        )


_TAKEN: dict[str, Callable[[dict[str, Any], str], None]] = {
    "trust_remote_code": _flag_without_effect,  # no code of a checkpoint is ever run
    "rebuild_cache": _flag_without_effect,  # the cache is keyed by the content of the data
    "mask_eps": _epsilon,
    "num_learnable_im_end": _end_tokens,
    "use_deepspeed": _zero,
    "deepspeed_offload_optimizer": _offload,
    "deepspeed_offload_param": _offload,
    "deepspeed_config_file": _deepspeed_file,
    "lr_scheduler_type": _scheduler,
    "wandb_host": _empty_is_none,
    "wandb_key": _secret,
}
