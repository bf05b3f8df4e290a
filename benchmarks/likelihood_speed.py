# SPDX-License-Identifier: Apache-2.0
"""Scoring of multiple choices: ours, with prefix reuse, against the harness's transformers backend on the same weights.

    python benchmarks/likelihood_speed.py --data-dir ./data --out benchmarks/results/likelihood_speed.json

HellaSwag at each number of shots; transformers at each batch size, of which the fastest counts. Both score the same
requests; the largest difference of scores stands beside the times. Ours starts with an empty cache each time.
"""

import argparse
import json
import logging
import os
import platform
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from wedlm import LLM
from wedlm.evaluate.harness import EngineLM
from wedlm.evaluate.run import load_tasks
from wedlm.evaluate.settings import Settings
from wedlm.machine import cpu_name
from wedlm.model import load_model, load_tokenizer
from wedlm.model.formats.checkpoint import save_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo-base", help="an AR checkpoint")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--task", default="hellaswag")
    parser.add_argument("--shots", type=int, nargs="+", default=[0, 10])
    parser.add_argument("--questions", type=int, nargs="+", default=[40, 10], help="for each of --shots")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16], help="of transformers")
    parser.add_argument("--repeats", type=int, default=3, help="of ours, and of transformers at its best batch size")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as directory:
        model, config = load_model(arguments.model, getattr(torch, arguments.dtype), torch.device("cpu"))
        save_model(model, config, directory)
        load_tokenizer(arguments.model).save(directory)
        del model
        runs = [
            compare(directory, shots, questions, arguments)
            for shots, questions in zip(arguments.shots, arguments.questions, strict=True)
        ]
    report = {
        "task": arguments.task,
        "model": arguments.model,
        "dtype": arguments.dtype,
        "threads": arguments.threads,
        "machine": platform.machine(),
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "runs": runs,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report))


def compare(directory: str, shots: int, questions: int, arguments: argparse.Namespace) -> dict:
    """Times of both, in seconds, for the first ``questions``."""
    from lm_eval.models.huggingface import HFLM

    requests = make_requests(shots, questions, arguments)
    hf = HFLM(pretrained=directory, dtype=arguments.dtype, device="cpu", batch_size=1)
    hf_seconds: dict[int, list[float]] = {}
    for batch_size in arguments.batch_sizes:
        hf.batch_size_per_gpu = batch_size
        seconds, theirs = timed(hf, requests)
        hf_seconds[batch_size] = [seconds]
        print(f"{shots} shots: transformers, batches of {batch_size}: {seconds:.1f} s", flush=True)
    best = min(hf_seconds, key=lambda size: hf_seconds[size][0])
    ours_seconds = []
    for repeat in range(arguments.repeats):
        if repeat:
            hf.batch_size_per_gpu = best
            hf_seconds[best].append(timed(hf, requests)[0])
        lm = EngineLM(LLM(directory, device="cpu", dtype=arguments.dtype))
        seconds, ours = timed(lm, requests)
        ours_seconds.append(seconds)
        print(f"{shots} shots: ours: {seconds:.1f} s", flush=True)
    return {
        "shots": shots,
        "questions": questions,
        "requests": len(requests),
        "transformers_seconds": hf_seconds,
        "transformers_best_batch_size": best,
        "ours_seconds": ours_seconds,
        "speed_up": median(hf_seconds[best]) / median(ours_seconds),
        "largest_difference": max(abs(a - b) for (a, _), (b, _) in zip(ours, theirs, strict=True)),
        "computed_tokens": lm.scorer.stats.num_computed_tokens,
        "reused_tokens": lm.scorer.stats.num_reused_tokens,
    }


def make_requests(shots: int, questions: int, arguments: argparse.Namespace) -> list[Instance]:
    settings = Settings((arguments.task,), arguments.data_dir, Path(), num_fewshot=shots)
    (task,) = load_tasks(settings).values()
    task.build_all_requests(limit=questions, rank=0, world_size=1)
    return task.instances


def timed(lm: LM, requests: list[Instance]) -> tuple[float, list[tuple[float, bool]]]:
    began = time.perf_counter()
    scores = lm.loglikelihood(requests)
    return time.perf_counter() - began, scores


if __name__ == "__main__":
    main()
