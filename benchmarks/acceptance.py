# SPDX-License-Identifier: Apache-2.0
"""Share of drafts that verification accepts, by depth: what ``wedlm bench accept --accept`` wants to know of a model.

    python benchmarks/acceptance.py demo --data gsm8k_test.jsonl.gz --limit 64 --out acceptance.json

Verified decoding at temperature 0 of GSM8K questions, every masked row drafted, however unsure; the share at a depth is
of the drafts whose predecessors were accepted. Prints and saves one JSON object.
"""

import argparse
import gzip
import json
from pathlib import Path

import torch

from wedlm import LLM, SamplingParams
from wedlm.accelerate.measure import MASKED_ROWS_ALONE, drafted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=64, help="only the first N questions")
    parser.add_argument("--rows", type=int, default=16, help="rows a step")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with gzip.open(arguments.data, "rt", encoding="utf-8") as file:
        questions = [json.loads(line)["question"] for line in file][: arguments.limit]
    llm = LLM(arguments.model, dtype=arguments.dtype, device=arguments.device, wedlm_window_size=arguments.rows)
    prompts = [llm.chat_prompt([{"role": "user", "content": question}]) for question in questions]
    params = SamplingParams(temperature=0.0, max_tokens=arguments.max_tokens, decoding="auto", **MASKED_ROWS_ALONE)
    found = drafted(llm, prompts, params, lambda _: None)
    report = {
        "model": str(Path(*Path(arguments.model).parts[-2:])),
        "questions": len(questions),
        "rows": arguments.rows,
        "dtype": str(next(llm.model.parameters()).dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if llm.device.type == "cuda" else "cpu",
        "tokens_per_forward": round(found["tokens_per_forward"], 3),
        "drafts": found["trials"],
        "accepted": [round(share, 3) for share in found["shares"]],
    }
    print(json.dumps(report))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
