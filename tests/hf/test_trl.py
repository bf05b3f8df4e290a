# SPDX-License-Identifier: Apache-2.0
"""TRL's SFTTrainer trains our class by the AR loss, whole and by peft's LoRA, with layers recomputed and without."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from tests.engine.tiny_llm import save_tiny
from wedlm import LLM
from wedlm.hf import WeDLMForCausalLM

pytest.importorskip("trl", reason="TRL is not installed")

CHATS = [
    {"messages": [{"role": "user", "content": f"Hello {i}"}, {"role": "assistant", "content": "abc abc"}]}
    for i in range(16)
]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # of libraries that are others'
def test_sft(tmp_path: Path) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    directory = save_tiny(tmp_path / "model", max_position_embeddings=256)
    tokenizer = AutoTokenizer.from_pretrained(directory, pad_token="<|end|>")
    losses: dict[tuple[bool, bool], list[float]] = {}
    for with_lora in (False, True):
        for recomputes in (False, True):
            out = tmp_path / f"{with_lora}-{recomputes}"
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
                max_length=128,
                bf16=False,
            )
            trainer = SFTTrainer(
                model=WeDLMForCausalLM.from_pretrained(directory),
                args=arguments,
                train_dataset=Dataset.from_list(CHATS),
                processing_class=tokenizer,
                peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if with_lora else None,
            )
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
