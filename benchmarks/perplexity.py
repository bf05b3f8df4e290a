# SPDX-License-Identifier: Apache-2.0
"""Perplexity of a model's AR head on a text, in windows that do not overlap; prints one JSON object.

python benchmarks/perplexity.py MODEL --data wikitext2_test.txt.gz
"""

import argparse
import gzip
import json
import math
from pathlib import Path

import torch
from torch.nn import functional as F

from wedlm.attention.sdpa import CausalAttend
from wedlm.model import load_model, load_tokenizer, pack_for_inference
from wedlm.model.lora.peft import apply_adapter


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--adapter", help="directory of a LoRA")
    parser.add_argument("--window", type=int, default=2048, help="tokens")
    parser.add_argument("--quantization", help="fp8, on a GPU")
    parser.add_argument("--max-tokens", type=int, default=0, help="only the first N tokens of the text")
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _ = load_model(arguments.model, torch.float32, device)
    if arguments.adapter is not None:
        apply_adapter(model, arguments.adapter)
    if arguments.quantization is not None:
        pack_for_inference(model, arguments.quantization)
    with gzip.open(arguments.data, "rt", encoding="utf-8") as file:
        ids = load_tokenizer(arguments.model).encode(file.read(), add_special_tokens=False)
    tokens = torch.tensor(ids[: arguments.max_tokens or None], device=device)
    loss, count = 0.0, 0
    for part in tokens.split(arguments.window):
        if len(part) > 1:
            logits = model(part, torch.arange(len(part), device=device), CausalAttend())
            loss += float(F.cross_entropy(logits[:-1], part[1:], reduction="sum"))
            count += len(part) - 1
    figures = {"model": Path(arguments.model).name, "tokens": count, "perplexity": math.exp(loss / count)}
    figures |= {"adapter": arguments.adapter, "quantization": arguments.quantization}
    print(json.dumps({**figures, "window": arguments.window, "data": Path(arguments.data).name}))


if __name__ == "__main__":
    main()
