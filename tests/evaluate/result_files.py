# SPDX-License-Identifier: Apache-2.0
"""Made-up results in the format of docs/evaluation.md."""

import json
from pathlib import Path
from typing import Any

WORDS = ["The ", "answer ", "is ", "four", ", ", "of ", "course", ". ", "<b>", "&", "\n", "so ", "é"]
STOP = len(WORDS)  # an end token: no text


class WordDecoder:
    """A tokenizer of ``WORDS``."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(WORDS[token] for token in ids if token != STOP)


def sample(doc_id: int, correct: bool, ids: list[int], steps: list[int], **changes: Any) -> dict[str, Any]:
    record = {
        "doc_id": doc_id,
        "prompt": f"Question {doc_id}: what is 2 + 2?",
        "target": "four",
        "metrics": {"exact_match": float(correct)},
        "correct": correct,
        "text": WordDecoder().decode(ids),
        "token_ids": ids,
        "token_steps": steps,
        "finish_reason": "stop",
        "forwards": max(steps, default=-1) + 1,
        "rows": 8 * (max(steps, default=-1) + 1),
        "prompt_tokens": 10,
        "truncated": False,
        "seconds": 0.5,
    }
    return {**record, **changes}


def samples_of(correct: list[bool], per_step: int = 1) -> list[dict[str, Any]]:
    """Question i was answered right iff ``correct[i]``; a forward made ``per_step`` tokens final."""
    ids = [0, 1, 2, 3, 4, 5, 6, 7, STOP]
    steps = [index // per_step for index in range(len(ids))]
    return [
        sample(number, right, ids if right else [0, 1, 2, *ids[:4]], steps if right else steps[:7])
        for number, right in enumerate(correct)
    ]


def write_run(  # noqa: PLR0913 - what a file of results holds; each test names the few that matter to it
    folder: Path,
    key: str,
    samples: list[dict[str, Any]],
    decoding: str = "autoregressive",
    name: str = "toy",
    task: str = "gsm8k",
    model_hash: str = "ab" * 8,
    tokens_per_second: float = 40.0,
    version: float = 1.0,
    **params: Any,
) -> Path:
    """Write a run of one task and its samples; the path of the run's file."""
    folder.mkdir(parents=True, exist_ok=True)
    value = sum(record["correct"] for record in samples) / max(1, len(samples))
    generates = "choices" not in samples[0]
    sums = {
        "num_tokens": sum(len(record.get("token_ids", ())) for record in samples),
        "num_forwards": sum(record.get("forwards", 0) for record in samples),
        "num_rows": sum(record.get("rows", 0) for record in samples),
    }
    speed: dict[str, float] = {"seconds": 1.0, "samples_per_second": 3.0}
    if generates:
        speed = {
            **sums,
            "tokens_per_forward": sums["num_tokens"] / sums["num_forwards"],
            "p_cache": sums["num_tokens"] / sums["num_rows"],
            "seconds": 1.0,
            "tokens_per_second": tokens_per_second,
            "num_cut": sum(record["finish_reason"] == "length" for record in samples),
        }
    metric = "exact_match" if generates else "acc_norm"
    result = {
        "version": version,
        "kind": "generate" if generates else "likelihood",
        "num_fewshot": 0,
        "num_samples": len(samples),
        "metric": metric,
        "value": value,
        "stderr": (value * (1 - value) / max(1, len(samples) - 1)) ** 0.5 if len(samples) > 1 else None,
        "metrics": {metric: {"value": value, "stderr": None}},
        "speed": speed,
        "samples_file": f"samples-{key}-{task}.jsonl",
    }
    run = {
        "format": 1,
        "key": key,
        "model": {"name": name, "hash": model_hash, "dtype": "float32", "device": "cpu", "adapter": None},
        "params": {
            "decoding": decoding,
            "window_size": 16,
            "entropy_threshold": 0.4,
            "pos_penalty": 0.02,
            "draft_entropy": 2.5,
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": 0,
            "seed": 0,
            "max_tokens": 512,
            **params,
        },
        "swept": {},
        "protocol": "default",
        "chat_template": True,
        "limit": None,
        "num_fewshot": None,
        "tasks": {task: result},
        "environment": {"wedlm": "0.1.0", "device_name": "a machine", "threads": 2},
        "created": "2026-01-01T00:00:00Z",
    }
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in samples)
    (folder / f"samples-{key}-{task}.jsonl").write_text(lines, encoding="utf-8")
    path = folder / f"point-{key}.json"
    path.write_text(json.dumps(run, ensure_ascii=False), encoding="utf-8")
    return path


def write_sweep(folder: Path, num: int = 40) -> None:
    """AR, verified, and streaming and block over thresholds and penalties."""
    write_run(folder, "0" * 16, samples_of([n % 2 == 0 for n in range(num)]))
    write_run(folder, "1" * 16, samples_of([n % 2 == 0 for n in range(num)], 2), "verified", tokens_per_second=70)
    number = 2
    for decoding, bonus in (("streaming", 1.0), ("block", 0.6)):
        for threshold in (None, 0.2, 0.4, 0.8):
            for penalty in (0.02, 0.1):
                size = 10 * (threshold or 0) * bonus
                right = [n % 2 == 0 and n >= size for n in range(num)]
                samples = samples_of(right, 1 + round(3 * (threshold or 0) * bonus))
                write_run(
                    folder,
                    f"{number:016x}",
                    samples,
                    decoding,
                    tokens_per_second=30 + 60 * (threshold or 0) * bonus - 100 * penalty,
                    entropy_threshold=threshold,
                    pos_penalty=penalty,
                )
                number += 1


def samples(evaluation, record, task):
    path = evaluation.settings.output / record["tasks"][task]["samples_file"]
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_time(line):
    line = {name: value for name, value in line.items() if name != "seconds"}
    return line | {"logprobs": [round(value, 4) for value in line.get("logprobs", [])]}
