# SPDX-License-Identifier: Apache-2.0
"""Step times of two trees, in interleaved pairs of processes: the median ratio says what a change of the engine costs.

    git worktree add ../before REVISION
    python benchmarks/step_overhead.py ../before .                   # CPU: tiny random weights and the demo model
    python benchmarks/step_overhead.py ../before . --device cuda     # 8B shape, batch 1 and 128

Each pair runs every case in both trees, one process per tree, in turns of which is first. Last line: JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

CASES = ("autoregressive", "verified")


def measure(device: str, subject: str, batches: list[int], steps: int) -> dict[str, float]:
    """Milliseconds of a step (medians) by case, in the tree that is on the path."""
    import torch

    from wedlm import LLM, SamplingParams

    clock = time.perf_counter
    if device == "cpu":
        torch.set_num_threads(1)
        clock = time.thread_time  # with one thread it is the step's time without what else the machine does
    vocab_size = 1000
    if subject == "demo":
        engine = LLM("demo", device=device, max_num_seqs=max(batches)).engine
    else:
        engine = shape_engine(subject, device, max(batches))
    found = {}
    for decoding in CASES:
        for batch in batches:
            params = SamplingParams(
                decoding=decoding, max_tokens=4 * steps + 500, ignore_eos=True, wedlm_draft_entropy=1e9
            )
            prompts = [[3 + (7 * i + 3 * n) % (vocab_size // 8) for i in range(32)] for n in range(batch)]
            requests = [engine.add(f"{decoding}-{batch}-{n}", prompt, params) for n, prompt in enumerate(prompts)]
            while any(request.num_output_tokens == 0 for request in requests):
                engine.step()
            for _ in range(10):
                engine.step()
            times = []
            for _ in range(steps):
                start = clock()
                engine.step()
                times.append(clock() - start)
            for request in requests:
                engine.abort(request.request_id)
            found[f"{subject}, {decoding}, batch {batch}"] = 1e3 * statistics.median(times)
    return found


def shape_engine(shape: str, device: str, max_num_seqs: int):  # type: ignore[no-untyped-def]
    """An engine around random weights, as this tree's own benchmark makes it."""
    import torch

    from wedlm.bench.shapes import MASK_TOKEN_ID, random_model, shape_config
    from wedlm.engine.factory import plan_engine
    from wedlm.engine.options import EngineConfig, EngineOptions

    config = shape_config(shape)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = random_model(config, torch.device(device), dtype, None)
    facts = (config.vocab_size, MASK_TOKEN_ID, config.eos_token_ids, config.max_length)
    limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max(2048, 16 * max_num_seqs)}
    cache_bytes = (20 << 30) if device == "cuda" else (64 << 20)
    return plan_engine(model, EngineConfig(*facts, EngineOptions(**limits, kv_cache_bytes=cache_bytes)), None).build()


def run(tree: Path, arguments: argparse.Namespace, subject: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str((tree / "src").resolve()), "OMP_WAIT_POLICY": "passive"}
    words = ["--measure", subject, "--device", arguments.device, "--steps", str(arguments.steps)]
    words += ["--batches", arguments.batches]
    command = [sys.executable, str(Path(__file__).resolve()), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tree)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trees", nargs="*", type=Path, help="the tree before and the tree after")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--subjects", help="shapes of bench, or demo; default: tiny,demo, on CUDA qwen3-8b")
    parser.add_argument("--batches", help="default: 1,8, on CUDA 1,128")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.batches = arguments.batches or ("1,128" if arguments.device == "cuda" else "1,8")
    if arguments.measure:
        batches = [int(batch) for batch in arguments.batches.split(",")]
        print(json.dumps(measure(arguments.device, arguments.measure, batches, arguments.steps)))
        return
    if len(arguments.trees) != 2:
        parser.error("expected two trees, before and after")
    subjects = (arguments.subjects or ("qwen3-8b" if arguments.device == "cuda" else "tiny,demo")).split(",")
    sides: list[dict[str, list[float]]] = [{}, {}]
    for pair in range(arguments.pairs):
        for subject in subjects:
            for side in (0, 1) if pair % 2 else (1, 0):
                for case, value in run(arguments.trees[side], arguments, subject).items():
                    sides[side].setdefault(case, []).append(value)
    report = {}
    for case, before in sides[0].items():
        ratios = sorted(b / a for a, b in zip(before, sides[1][case], strict=True))
        report[case] = {
            "before_ms": round(statistics.median(before), 4),
            "after_ms": round(statistics.median(sides[1][case]), 4),
            "median_ratio": round(statistics.median(ratios), 4),
            "ratios": [round(ratio, 4) for ratio in ratios],
        }
        one = report[case]
        print(f"{case}: {one['before_ms']} -> {one['after_ms']} ms, ratio {one['median_ratio']}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
