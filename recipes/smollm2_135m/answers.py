# SPDX-License-Identifier: Apache-2.0
"""Stage 2: the teacher answers the prompts of the training files. ``python answers.py TEACHER DATA_DIR OUT_DIR``"""

import sys
import time
from pathlib import Path

import torch

from wedlm.model import load_model, load_tokenizer
from wedlm.train.answers import AnswerSettings, write_answers

# (file of prompts, name of the answers, temperature, answers a prompt)
JOBS = [
    ("gsm8k_train.jsonl.gz", "gsm8k_greedy", 0.0, 1),
    ("gsm8k_train.jsonl.gz", "gsm8k_sampled", 0.5, 2),
    ("math_train.jsonl.gz", "math", 0.0, 1),
    ("dolly_subset.jsonl.gz", "dolly", 0.0, 1),
    ("openstax_exercises.jsonl.gz", "openstax", 0.0, 1),
    ("gpteacher_codegen.jsonl.gz", "codegen", 0.0, 1),
]


def main(teacher: str, data: Path, out: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _ = load_model(teacher, torch.bfloat16 if device == "cuda" else torch.float32, device)
    tokenizer = load_tokenizer(teacher)
    out.mkdir(parents=True, exist_ok=True)
    for source, name, temperature, count in JOBS:
        began = time.perf_counter()
        settings = AnswerSettings(
            max_prompt_tokens=384, max_tokens=224, temperature=temperature, num_samples=count, batch_size=2048
        )
        written, left_out = write_answers(model, tokenizer, data / source, out / f"{name}.jsonl", settings)
        print(f"{name}: {written} answers, {left_out} left out, {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
