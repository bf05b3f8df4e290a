# SPDX-License-Identifier: Apache-2.0
"""Stage 2: the teacher answers prompts, the base model continues texts.

``python answers.py TEACHER DATA_DIR PROMPTS_DIR OUT_DIR``
"""

import sys
import time
from pathlib import Path

import torch

from wedlm import LLM
from wedlm.engine.factory import release_memory
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


# Short answers of a small model: many of them fill a step.
ENGINE = {"dtype": "bfloat16" if torch.cuda.is_available() else "float32", "max_num_seqs": 512}


def answer(teacher: str, data: Path, prompts: Path, out: Path) -> None:
    llm = LLM(teacher, **ENGINE)
    settings = AnswerSettings(max_prompt_tokens=384, max_tokens=240)
    sources = {name: data / file for name, file in PROMPTS.items()} | {"gsm8k_numbers": prompts / "gsm8k_numbers.jsonl"}
    for name, source in sources.items():
        began = time.perf_counter()
        written, left_out = write_answers(llm, source, out / f"{name}.jsonl", settings)
        print(f"{name}: {written} answers, {left_out} left out, {time.perf_counter() - began:.0f} s", flush=True)


def go_on(data: Path, out: Path) -> None:
    llm = LLM("demo-base", **ENGINE)
    settings = AnswerSettings(max_tokens=200, temperature=1.0)
    for name, (file, every, begun) in TEXTS.items():
        began = time.perf_counter()
        written = write_continuations(llm, data / file, out / f"{name}.jsonl", settings, every, begun)
        print(f"{name}: {written} continuations, {time.perf_counter() - began:.0f} s", flush=True)


def main(teacher: str, data: Path, prompts: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    answer(teacher, data, prompts, out)
    release_memory()
    go_on(data, out)


if __name__ == "__main__":
    main(sys.argv[1], *map(Path, sys.argv[2:]))
