# SPDX-License-Identifier: Apache-2.0
"""Stages 5 and 7: a trained LoRA as a packed delta. ``python pack.py BASE ADAPTER OUT MODEL_DIR [STRENGTH]``

BASE is the model that the LoRA was trained over. OUT is a safetensors file. MODEL_DIR gets the model as users will meet
it, restored from the file, so that every figure is that of what is shipped. STRENGTH (1) multiplies the LoRA's delta,
not the mask's embedding: below 1 the model lies between the base and the tuned one.
"""

import json
import sys
from pathlib import Path

import torch

from wedlm.model import load_model, load_tokenizer
from wedlm.model.formats.checkpoint import save_tensors
from wedlm.model.lora.peft import adapted_config, read_adapter
from wedlm.model.lora.weight_delta import apply_delta, save_delta


def main(model: str, trained: str, out: Path, directory: Path, strength: float) -> None:
    base, config = load_model(model, torch.float32)
    adapter = read_adapter(trained)
    matrices = {name: (one.b.float() * (one.scale * strength), one.a.float()) for name, one in adapter.low_rank.items()}
    rows = {name: (torch.tensor(one.ids), one.values) for name, one in adapter.rows.items()}
    save_delta(matrices, rows, out, "SmolLM2-135M-Instruct adapted to WeDLM; recipes/smollm2_135m")
    before = {name: parameter.detach() for name, parameter in base.named_parameters()}
    restored = dict(apply_delta(before.items(), out))
    lost = total = 0.0
    for name, (b, a) in matrices.items():
        delta = b @ a
        lost += float((restored[name] - before[name] - delta).square().sum())
        total += float(delta.square().sum())
    save_tensors(restored, adapted_config(config, trained), directory)
    load_tokenizer(model).save(directory)
    print(json.dumps({"bytes": out.stat().st_size, "energy_lost": lost / total}))


if __name__ == "__main__":
    main(*sys.argv[1:3], Path(sys.argv[3]), Path(sys.argv[4]), float(sys.argv[5]) if len(sys.argv) > 5 else 1.0)
