# SPDX-License-Identifier: Apache-2.0
"""The settings of a training run. Keys are those of the original WeDLM fine-tuning configuration where it has one."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from wedlm.train.original_config import FLAGS, translated

# Keys of earlier versions and their present names.
RENAMED = {"anchor_text": "distill_text", "anchor_model": "teacher_model", "certainty_weight": "entropy_weight"}


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )


class Source(_Strict):
    """One file of training data. ``repeat`` 2 shows it twice an epoch; 0.5 shows half of it, and the other half in the
    next epoch."""

    path: str
    repeat: float = Field(default=1.0, gt=0)


class TrainConfig(_Strict):
    """All settings of a run; ``wedlm train --help`` prints the line under each."""

    model_path: str
    """Where training starts: a Hugging Face directory, a hub id, a .gguf file or demo-base."""
    output_dir: str = "outputs"
    """Checkpoints, metrics.jsonl, TensorBoard files, and the result in final/."""
    train_data: list[Source] = Field(min_length=1)
    """Files of JSON lines (also .gz, .xz): a path, or several, each as a path or as {path: ..., repeat: ...}."""
    validation_data: list[Source] = []
    """Files that are only measured on, with all of their documents."""
    validation_documents: int | float = Field(default=0, ge=0)
    """Or the number of documents of train_data, or their share (below 1), to hold out and measure on."""
    eval_steps: int = Field(default=0, ge=0)
    """Steps between two measurements, of which one is at the end; 0 never measures."""
    skip_bad: bool = False
    """Count malformed lines and continue, instead of stopping at the first."""
    cache_dir: str | None = None
    """Where tokens are kept; none is tokens/ in the cache of this package."""

    objective: Literal["wedlm", "autoregressive"] = "wedlm"
    """wedlm: trains masked and AR loss; autoregressive: only the AR loss, and keeps the model's config."""
    max_seq_length: int = Field(default=2048, ge=2)
    """Tokens of one packed sequence; longer documents are cut."""
    block_size: int = Field(default=32, ge=1)
    """Positions of a noise block; windows of streaming decoding should not be wider."""
    mask_token_id: int | None = Field(default=None, ge=0)
    """Token id that stands for masked positions; none takes the model's or chooses one."""
    mask_per_block: bool = True
    """Each block draws its own ratio; false draws one for a whole document."""
    suffix_noise: float = Field(default=0.0, ge=0, le=1)
    """Share of documents with suffix noise, which verified decoding meets, instead of the paper's random noise."""
    infill_share: float = Field(default=0.0, ge=0, le=1)
    """Share of documents with a gap: they show what comes after it from the start, as when a gap is filled."""
    infill_length: int = Field(default=32, ge=1)
    """Most tokens of such a gap, which at most as many end tokens follow."""
    loss_weighting_scheme: Literal["weighted", "uniform"] = "weighted"
    """Masked rows weigh 1/ratio of their block, or 1."""
    num_learnable_im_end: int = Field(default=8, ge=1)
    """End tokens after a document or reply."""
    trainable_messages: Literal["replies", "last"] = "replies"
    """Which messages are learnt: replies: each reply with its end; last: only the last message, as in the original."""
    entropy_weight: float = Field(default=0.0, ge=0)
    """Weight of the entropy penalty on correctly predicted masked tokens, relative to the masked loss."""
    enable_ar_loss: bool = True
    """false trains only the masked loss."""
    ar_loss_weight: float = Field(default=1.0, ge=0)
    """a in (masked + a AR) / (1 + a)."""
    attention_backend: Literal["auto", "dense", "flex", "magi"] = "auto"
    """auto: flex on CUDA, dense elsewhere."""

    train_embeddings: bool = True
    """false freezes embeddings and output projection, except the mask token's embedding."""
    lora_rank: int = Field(default=0, ge=0)
    """Above 0 trains only a LoRA of this rank and the mask token's embedding."""
    lora_alpha: float | None = Field(default=None, gt=0)
    """The LoRA's delta is scaled by alpha / rank; none is twice the rank."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the LoRA's matrices."""
    lora_rows: Literal["all", "masked"] = "all"
    """masked: the LoRA only acts on masked rows; AR output stays exactly the base's, and nothing can be merged."""
    lora_init: str | None = None
    """Directory of an adapter of the same rank and targets; training starts from its matrices."""
    distill_text: bool = False
    """Plain text's AR targets are the distributions of teacher_model instead of its tokens."""
    teacher_model: str | None = None
    """A model of the same vocabulary; none is the base without its LoRA of all rows."""
    distill_masked: float = Field(default=0.0, ge=0, le=1)
    """Share of the model's own AR distribution in a masked row's target; the token has the rest."""
    lora_targets: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    """Kinds of layers that get a LoRA."""
    lora_layers: list[int] = []
    """Numbers of the decoder layers that get a LoRA, counted from 0; empty: all layers."""
    merge_lora: bool = True
    """The result is a whole model; false leaves an adapter."""

    num_train_epochs: float = Field(default=3, gt=0)
    """Length of the run in epochs, unless max_steps sets it."""
    max_steps: int = Field(default=0, ge=0)
    """Length of the run in optimiser steps; 0 follows num_train_epochs."""
    per_device_train_batch_size: int = Field(default=1, ge=1)
    """Packed sequences of a forward on each device."""
    gradient_accumulation_steps: int = Field(default=8, ge=1)
    """Forwards per optimiser step on each device."""
    learning_rate: float = Field(default=3e-6, gt=0)
    """Peak rate of AdamW."""
    min_learning_rate: float = Field(default=0.0, ge=0)
    """Rate at the end of a cosine or linear schedule."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate changes after the warm-up."""
    warmup_ratio: float = Field(default=0.1, ge=0, le=1)
    """Share of the steps over which the rate rises from 0."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Weight decay of matrices; vectors do not decay."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's mean of gradients."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of AdamW's mean of squared gradients."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Longer gradients are scaled to this norm."""
    seed: int = Field(default=42, ge=0, lt=2**31)
    """Decides data order, noise, dropout and the initial values of a LoRA."""

    bf16: bool = True
    """Compute in bfloat16; trained weights and moments stay float32. false computes in float32."""
    compile: bool | None = None
    """torch.compile each layer; none: on CUDA."""
    deepspeed_zero_stage: Literal[0, 1, 2] = 0
    """On several GPUs DeepSpeed divides moments (1), and gradients (2); 0 follows accelerate's configuration."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: takes less memory and about a third more time."""

    logging_steps: int = Field(default=10, ge=1)
    """Steps between two records of figures."""
    save_steps: int = Field(default=500, ge=1)
    """Steps between two checkpoints."""
    save_total_limit: int = Field(default=3, ge=1)
    """Checkpoints kept."""
    save_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of the result's weights."""
    resume: bool = True
    """Continue from the latest checkpoint under output_dir; false refuses a directory that has one."""
    tensorboard: bool = True
    """Write TensorBoard files."""
    use_wandb: bool = False
    """Report to Weights & Biases; the environment variable WANDB_API_KEY has the key."""
    wandb_project: str | None = None
    """Project of Weights & Biases."""
    wandb_team: str | None = None
    """Entity of Weights & Biases."""
    wandb_group: str | None = None
    """Group of runs of Weights & Biases."""
    wandb_host: str | None = None
    """Address of Weights & Biases, if it is not the public one."""

    @field_validator("*", mode="before")
    @classmethod
    def _a_flag_is_not_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true for a number, which pydantic would read as 1."""
        if isinstance(value, bool) and "bool" not in str(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("expected a value that is not true or false")
        return value

    @field_validator("train_data", "validation_data", mode="before")
    @classmethod
    def _one_path_is_a_source(cls, value: Any) -> Any:
        """Read "data.jsonl" and ["a.jsonl", {"path": "b.jsonl", "repeat": 2}]: a path may stand for a source."""
        values = value if isinstance(value, list) else [value]
        return [{"path": one} if isinstance(one, str) else one for one in values]

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.objective == "autoregressive" and not self.enable_ar_loss:
            raise ValueError("enable_ar_loss is false with objective autoregressive; expected a loss to train on")
        if self.teacher_model is not None and not (self.distill_text and self.effective_ar_weight):
            raise ValueError("teacher_model is set; expected distill_text true and an AR loss")
        if self.distill_masked and (self.distill_text or self.objective != "wedlm"):
            raise ValueError(
                f"distill_masked is {self.distill_masked}; expected objective wedlm and distill_text false with it"
            )
        if self.infill_share and self.objective != "wedlm":
            raise ValueError(f"infill_share is {self.infill_share}; expected objective wedlm with it")
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

    @model_validator(mode="after")
    def _needs_a_lora(self) -> Self:
        """Check settings that need a LoRA on all rows."""
        for name, on in (
            ("distill_text is set without teacher_model", self.distill_text and self.teacher_model is None),
            ("lora_init is set", self.lora_init is not None),
        ):
            if on and (not self.lora_rank or self.lora_rows == "masked"):
                raise ValueError(f"{name}; expected a lora_rank above 0 and lora_rows all")
        return self

    @model_validator(mode="after")
    def _masked_rows_alone(self) -> Self:
        """Check the settings of a LoRA for masked rows, instead of silently changing them."""
        if self.lora_rows == "all":
            return self
        if not self.lora_rank or self.objective != "wedlm":
            raise ValueError("lora_rows is masked; expected objective wedlm and a lora_rank above 0")
        if self.effective_ar_weight:
            raise ValueError(
                "lora_rows is masked, so that the AR loss has no gradient; expected enable_ar_loss false, the masked "
                "loss alone"
            )
        if self.merge_lora:
            raise ValueError(
                "merge_lora is true with lora_rows masked, and such a LoRA cannot be merged; expected merge_lora false"
            )
        return self

    @property
    def effective_ar_weight(self) -> float:
        return self.ar_loss_weight if self.enable_ar_loss else 0.0

    @property
    def num_rows(self) -> int:
        """Training rows of one sequence: the clean stream, and as many for the prediction stream."""
        return self.max_seq_length * (1 if self.objective == "autoregressive" else 2)


def load_config(path: str | Path | None, overrides: dict[str, Any]) -> TrainConfig:
    """The YAML file's keys, overridden by ``overrides``. Raises ValueError with one sentence per fault, which names key
    and expectation."""
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
    values = translated(values)
    for key in values:
        if key in RENAMED:
            raise ValueError(f"{key} has a new name; expected {RENAMED[key]}")
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError("; ".join(_sentence(fault) for fault in error.errors())) from None


def _sentence(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        names = list((Source if "." in key else TrainConfig).model_fields)
        near = get_close_matches(str(fault["loc"][-1]), names) or (names if "." in key else [])
        return f"{key} is not a setting; expected {' or '.join(near) or 'one that wedlm train --help lists'}"
    if fault["type"] == "missing":
        return f"{key} is missing; expected a value"
    message = fault["msg"].removeprefix("Value error, ")
    return message if not key else f"{key} is {fault['input']!r}; {message[0].lower()}{message[1:]}"


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """Read ``["--learning_rate", "1e-4", "--bf16=false"]`` as keys and values; values are read as YAML."""
    overrides: dict[str, Any] = {}
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("--"):
            raise ValueError(f"the argument {argument!r} stands alone; expected --key value")
        key, separator, text = argument[2:].partition("=")
        if not separator and key in FLAGS:
            text = "true"
        elif not separator:
            following = next(rest, None)
            if following is None:
                raise ValueError(f"--{key} has no value; expected --{key} value")
            text = following
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--{key} is {text!r}; expected a value that YAML reads") from error
        overrides[key.replace("-", "_")] = value
    return overrides
