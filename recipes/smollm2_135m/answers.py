# SPDX-License-Identifier: Apache-2.0
"""Stage 2: the teacher answers prompts, the base model continues texts.

``python answers.py TEACHER DATA_DIR PROMPTS_DIR OUT_DIR``
"""

import sys
import time
from pathlib import Path

import torch

from wedlm.model import load_model, load_tokenizer
from wedlm.train.answers import AnswerSettings, write_answers, write_continuations

# Prompts that the teacher answers greedily: what is to be learnt is a function of the prompt.
PROMPTS = {
    "gsm8k": "gsm8k_train.jsonl.gz",
    "math": "math_train.jsonl.gz",
    "mbpp": "mbpp_train.jsonl.gz",
    "dolly": "dolly_subset.jsonl.gz",
    "openstax": "openstax_exercises.jsonl.gz",
    "codegen": "gpteacher_codegen.jsonl.gz",
    "algorithms": "thealgorithms_python.jsonl.gz",
    "puzzles": "python_puzzles.jsonl.gz",
    "assistant": "openassistant_sample.jsonl.gz",
}
# Texts (one paragraph in so many) whose first so many tokens the base model continues at temperature 1: its own
# distribution keeps it where it is. From two tokens on it writes of anything.
TEXTS = {
    "openstax_text": ("openstax_text.jsonl.xz", 9, 24),
    "python_text": ("python_docs_text.jsonl.xz", 4, 24),
    "dolly_text": ("dolly_subset.jsonl.gz", 1, 24),
    "openstax_free": ("openstax_text.jsonl.xz", 5, 2),
    "python_free": ("python_docs_text.jsonl.xz", 16, 2),
    "dolly_free": ("dolly_subset.jsonl.gz", 1, 2),
}


def load(name: str) -> tuple:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, _ = load_model(name, torch.bfloat16 if device == "cuda" else torch.float32, device)
    return model, load_tokenizer(name)


def main(teacher: str, data: Path, prompts: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(teacher)
    settings = AnswerSettings(max_prompt_tokens=384, max_tokens=240, batch_size=2048)
    sources = {name: data / file for name, file in PROMPTS.items()} | {"gsm8k_numbers": prompts / "gsm8k_numbers.jsonl"}
    for name, source in sources.items():
        began = time.perf_counter()
        written, left_out = write_answers(model, tokenizer, source, out / f"{name}.jsonl", settings)
        print(f"{name}: {written} answers, {left_out} left out, {time.perf_counter() - began:.0f} s", flush=True)
    model, tokenizer = load("demo-base")
    settings = AnswerSettings(max_tokens=200, temperature=1.0, batch_size=2048, keep_cut=True)
    for name, (file, every, begun) in TEXTS.items():
        began = time.perf_counter()
        written = write_continuations(model, tokenizer, data / file, out / f"{name}.jsonl", settings, every, begun)
        print(f"{name}: {written} continuations, {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
