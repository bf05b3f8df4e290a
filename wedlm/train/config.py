# SPDX-License-Identifier: Apache-2.0
"""What a training run is told. Keys are those of the original WeDLM fine-tuning configuration wherever it has one."""

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

# Keys of the original that mean nothing here, and what to do instead.
_ELSEWHERE = {
    "trust_remote_code": "no code of a checkpoint is ever run",
    "mask_eps": "round(γ · n) needs no epsilon",
    "use_deepspeed": "give accelerate its own configuration file: accelerate launch --config_file …",
    "deepspeed_zero_stage": "give accelerate its own configuration file: accelerate launch --config_file …",
    "deepspeed_offload_optimizer": "give accelerate its own configuration file: accelerate launch --config_file …",
    "deepspeed_offload_param": "give accelerate its own configuration file: accelerate launch --config_file …",
    "wandb_key": "set the environment variable WANDB_API_KEY: secrets are never read from or written to a file",
    "rebuild_cache": "the cache is keyed by the content of the data and rebuilds itself",
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Source(_Strict):
    """One file of training data; ``repeat`` 2 shows it twice an epoch, 0.5 half of it, another half each epoch."""

    path: str
    repeat: float = Field(default=1.0, gt=0)


class TrainConfig(_Strict):
    """All settings of a run; ``docs/training.md`` lists them with the paper's values."""

    model_path: str
    output_dir: str = "outputs"
    train_data: list[Source] = Field(min_length=1)
    # Every ``eval_steps`` steps the losses on held-out text are measured: on files of their own, or on a number of
    # documents kept out of training.
    validation_data: list[Source] = []
    validation_documents: int = Field(default=0, ge=0)
    eval_steps: int = Field(default=0, ge=0)
    skip_bad: bool = False
    cache_dir: str | None = None

    # The objective (method: paper section 3.3).
    objective: Literal["wedlm", "autoregressive"] = "wedlm"
    max_seq_length: int = Field(default=2048, ge=2)
    block_size: int = Field(default=32, ge=1)
    mask_token_id: int | None = Field(default=None, ge=0)
    mask_per_block: bool = True
    suffix_noise: float = Field(default=0.0, ge=0, le=1)
    loss_weighting_scheme: Literal["weighted", "uniform"] = "weighted"
    num_learnable_im_end: int = Field(default=8, ge=1)
    enable_ar_loss: bool = True
    ar_loss_weight: float = Field(default=1.0, ge=0)
    attention_backend: Literal["auto", "dense", "flex", "magi"] = "auto"

    # What is trained.
    train_embeddings: bool = True
    lora_rank: int = Field(default=0, ge=0)
    lora_alpha: float | None = Field(default=None, gt=0)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    lora_targets: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    merge_lora: bool = True

    # Optimisation.
    num_train_epochs: float = Field(default=3, gt=0)
    max_steps: int = Field(default=0, ge=0)
    per_device_train_batch_size: int = Field(default=1, ge=1)
    gradient_accumulation_steps: int = Field(default=8, ge=1)
    learning_rate: float = Field(default=3e-6, gt=0)
    min_learning_rate: float = Field(default=0.0, ge=0)
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    seed: int = Field(default=42, ge=0)

    # Precision and speed. ``compile`` None compiles on CUDA alone.
    bf16: bool = True
    compile: bool | None = None
    activation_checkpointing: bool = False

    # Records.
    logging_steps: int = Field(default=10, ge=1)
    save_steps: int = Field(default=500, ge=1)
    save_total_limit: int = Field(default=3, ge=1)
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    resume: bool = True
    tensorboard: bool = True
    use_wandb: bool = False
    wandb_project: str | None = None
    wandb_team: str | None = None
    wandb_group: str | None = None
    wandb_host: str | None = None

    @field_validator("train_data", "validation_data", mode="before")
    @classmethod
    def _one_path_is_a_source(cls, value: Any) -> Any:
        """ "data.jsonl", ["a.jsonl", {"path": "b.jsonl", "repeat": 2}]: paths may stand for themselves."""
        values = value if isinstance(value, list) else [value]
        return [{"path": one} if isinstance(one, str) else one for one in values]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.objective == "autoregressive" and not self.enable_ar_loss:
            raise ValueError("enable_ar_loss is false with objective autoregressive; expected a loss to train on")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate is {self.min_learning_rate}; expected at most learning_rate ({self.learning_rate})"
            )
        if self.eval_steps and not (self.validation_documents or self.validation_data):
            raise ValueError(
                f"eval_steps is {self.eval_steps} without anything to measure on; expected validation_data or "
                "validation_documents"
            )
        if self.validation_documents and self.validation_data:
            raise ValueError("validation_documents and validation_data are both given; expected one of them")
        return self

    @property
    def effective_ar_weight(self) -> float:
        return self.ar_loss_weight if self.enable_ar_loss else 0.0

    @property
    def num_rows(self) -> int:
        """Training rows of one sequence: the clean stream, and as many for the prediction stream."""
        return self.max_seq_length * (1 if self.objective == "autoregressive" else 2)


def load_config(path: str | Path | None, overrides: dict[str, Any]) -> TrainConfig:
    """The YAML file's keys, overridden by ``overrides``. ValueError, one sentence a fault, names key and expectation."""
    values: Any = {}
    if path is not None:
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ValueError(f"the configuration {path} cannot be read: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"the configuration {path} is not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise ValueError(f"the configuration {path} holds {type(values).__name__}; expected keys and values")
    values = {**values, **overrides}
    for key in values:
        if key in _ELSEWHERE:
            raise ValueError(f"{key} is no setting here: {_ELSEWHERE[key]}")
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError("; ".join(_sentence(fault) for fault in error.errors())) from None


def _sentence(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        names = ", ".join(sorted((Source if "." in key else TrainConfig).model_fields))
        return f"{key} is no setting; expected one of {names}"
    if fault["type"] == "missing":
        return f"{key} is missing; expected a value"
    message = fault["msg"].removeprefix("Value error, ")
    return message if not key else f"{key} is {fault['input']!r}; {message[0].lower()}{message[1:]}"


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """``["--learning_rate", "1e-4", "--bf16=false"]`` as keys and values, the values read as YAML."""
    overrides: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            raise ValueError(f"the argument {argument!r} stands alone; expected --key value")
        key, separator, text = argument[2:].partition("=")
        if not separator:
            following = next(rest, None)
            if following is None:
                raise ValueError(f"--{key} has no value; expected --{key} value")
            text = following
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--{key} is {text!r}; expected a value that YAML reads") from error
        overrides[key.replace("-", "_")] = _number(value)
    return overrides


def _number(value: Any) -> Any:
    """YAML 1.1 reads 3e-6 as a string; people mean the number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
