# SPDX-License-Identifier: Apache-2.0
"""Stage 4: the trained model as a change of the demo model. ``python pack.py TRAINED OUT.safetensors MODEL_DIR``

MODEL_DIR gets the model as users will meet it, restored from the file, so that every figure is that of what is shipped.
"""

import json
import sys
from pathlib import Path

import torch

from wedlm.model import load_model, load_tokenizer
from wedlm.model.change import changed, save_change
from wedlm.model.checkpoint import save_tensors


def main(trained: str, out: Path, directory: Path) -> None:
    base, _ = load_model("demo-base", torch.float32)
    tuned, config = load_model(trained, torch.float32)
    after = {name: parameter.detach() for name, parameter in tuned.named_parameters()}
    before = {name: parameter.detach() for name, parameter in base.named_parameters()}
    save_change(before, after, out, "SmolLM2-135M-Instruct adapted to WeDLM; recipes/smollm2_135m")
    restored = dict(changed(before.items(), out))
    lost = sum(float((restored[name] - tensor).square().sum()) for name, tensor in after.items())
    total = sum(float((before[name] - tensor).square().sum()) for name, tensor in after.items())
    save_tensors(restored, config, directory)
    load_tokenizer("demo-base").save(directory)
    print(json.dumps({"bytes": out.stat().st_size, "energy_lost": lost / total}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
