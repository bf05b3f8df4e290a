# SPDX-License-Identifier: Apache-2.0
"""The base's own greedy answers to prompts, those that a limit cuts included, as data for a LoRA of masked rows.

    python masked_answers.py MODEL PROMPTS OUT [--part I/N]

One process does not fill a GPU at this size: run N of them with parts 0/N to N-1/N, and put their files together.
"""

import argparse
import time
from pathlib import Path

import torch

from wedlm import LLM
from wedlm.train.answers import AnswerSettings, write_answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--part", default="0/1", help="I/N: every N-th prompt from the I-th on")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=256, help="answers in one step")
    parser.add_argument("--kv-cache-gb", type=float, default=4.0, help="of this process: several share the GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    index, _, count = given.part.partition("/")
    llm = LLM(
        given.model,
        device=given.device,
        dtype="bfloat16" if given.device == "cuda" else "float32",
        max_num_seqs=given.batch_size,
        kv_cache_bytes=int(given.kv_cache_gb * 1e9),
    )
    settings = AnswerSettings(max_prompt_tokens=448, max_tokens=given.max_tokens, keep_cut=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    building = given.out.with_name(f".{given.out.name}")
    began = time.perf_counter()
    written, left_out = write_answers(llm, given.prompts, building, settings, (int(index), int(count)))
    building.replace(given.out)
    print(f"{given.out.name}: {written} answers, {left_out} left out, {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
