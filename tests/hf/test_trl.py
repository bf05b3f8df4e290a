# SPDX-License-Identifier: Apache-2.0
"""TRL's SFTTrainer trains our class, whole and by peft's LoRA, with layers recomputed and without: by the AR loss, and
by the masked one, whose losses are those of our trainer."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, TrainerCallback

from tests.engine.tiny_llm import MASK, save_tiny
from tests.hf.masked_batches import (
    BLOCK,
    NumberedCollator,
    noise_without_padding,
    our_loss,
    our_model,
    settings,
    train_batch,
)
from wedlm import LLM
from wedlm.hf import WeDLMForCausalLM, masked_loss, masked_training

CHATS = [
    {"messages": [{"role": "user", "content": f"Hello {i}"}, {"role": "assistant", "content": "abc abc"}]}
    for i in range(16)
]
TEXTS = [{"prompt": f"Say {i}: ", "completion": "abc " * (1 + i % 5)} for i in range(16)]


def sft(
    directory: Path,
    out: Path,
    data: list[dict[str, Any]],
    with_lora: bool,
    recomputes: bool,
    packing: bool = False,
    **more: Any,
) -> Any:
    """An SFTTrainer of a few steps. A LoRA trains the mask token's embedding, too."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(out),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        gradient_checkpointing=recomputes,
        save_strategy="no",
        max_length=80,
        bf16=False,
    )
    targets = ["q_proj", "v_proj"]
    lora = LoraConfig(r=4, target_modules=targets, trainable_token_indices=[MASK], task_type="CAUSAL_LM")
    return SFTTrainer(
        model=WeDLMForCausalLM.from_pretrained(directory, dtype=torch.float32),
        args=arguments,
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(directory, pad_token="<|end|>"),
        peft_config=lora if with_lora else None,
        **more,
    )


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # of libraries that are others'
def test_sft(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path / "model", max_position_embeddings=256)
    losses: dict[tuple[bool, bool], list[float]] = {}
    for with_lora in (False, True):
        for recomputes in (False, True):
            out = tmp_path / f"{with_lora}-{recomputes}"
            trainer = sft(directory, out, CHATS, with_lora, recomputes)
            trainer.train()
            losses[with_lora, recomputes] = [one["loss"] for one in trainer.state.log_history if "loss" in one]
            trainer.save_model(str(out / "saved"))
    assert losses[False, False] == losses[False, True]
    assert losses[True, False] == losses[True, True]
    assert losses[False, False][-1] < losses[False, False][0] / 2
    assert losses[True, False][-1] < losses[True, False][0]
    # What was saved is the trained model, for our engine.
    trained = LLM(tmp_path / "False-False" / "saved", device="cpu", dtype="float32").model
    assert not torch.equal(trained.lm_head.weight, LLM(directory, device="cpu", dtype="float32").model.lm_head.weight)
    LLM(directory, device="cpu", dtype="float32", adapter=str(tmp_path / "True-True" / "saved"))


class Weights(TrainerCallback):
    """The weights before each step, adapters merged."""

    def __init__(self) -> None:
        self.before: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, *_: Any, model: Any, **__: Any) -> None:
        model = copy.deepcopy(model)
        model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
        self.before.append({name: value.clone() for name, value in model.state_dict().items()})


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("with_lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("recomputes", [False, True], ids=["", "recomputed"])
def test_sft_by_the_masked_objective(tmp_path, monkeypatch, record_property, with_lora, recomputes) -> None:
    """At each step the loss is that of our trainer, of the same weights, examples and noise."""
    for module in (train_batch, masked_training):
        monkeypatch.setattr(module, "draw_noise", noise_without_padding)
    directory = save_tiny(tmp_path / "model", max_position_embeddings=256, block_size=BLOCK)
    config = settings(suffix_noise=0.5, ar_loss_weight=0.5)
    collator = NumberedCollator(
        WeDLMForCausalLM.from_pretrained(directory).config, suffix_noise=0.5, ar_loss_weight=0.5, num_learnable_im_end=3
    )
    losses: list[float] = []

    def recorded(*arguments: Any, **named: Any) -> torch.Tensor:
        loss = masked_loss(*arguments, **named)
        losses.append(float(loss))
        return loss

    weights = Weights()
    trainer = sft(
        directory,
        tmp_path / "out",
        TEXTS,
        with_lora,
        recomputes,
        data_collator=collator,
        compute_loss_func=recorded,
        callbacks=[weights],
    )
    trainer.train()
    assert len(losses) == len(weights.before) == 6
    ours, first = our_model(directory), 0
    for loss, state, examples in zip(losses, weights.before, collator.examples, strict=False):
        ours.transformer.load_state_dict(state)
        expected = float(our_loss(ours, examples, first, config).detach())
        first += len(examples)
        assert loss == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    if with_lora:
        LLM(directory, device="cpu", dtype="float32", adapter=str(tmp_path / "saved"))
    else:
        LLM(tmp_path / "saved", device="cpu", dtype="float32")
    record_property("losses", f"{losses[0]:.4f} to {losses[-1]:.4f} in 6 steps, each our trainer's to 1e-5")
