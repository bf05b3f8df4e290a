# SPDX-License-Identifier: Apache-2.0
"""Cost of an engine step on the CPU by rows, beside transformers' AR step in the same run; last line JSON.

    python benchmarks/cpu_step.py --threads 2 --out benchmarks/results/cpu_step

A step is all of it: scheduling, forward, choice of tokens, commit, text. Rows: 1 is AR decoding; R is streaming
decoding that fills one position a step. Variants and transformers take turns within every repetition, because shared
machines drift.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from wedlm import LLM, SamplingParams
from wedlm.machine import cpu_name
from wedlm.model import load_model

PROMPT_TOKENS, STEPS = 256, 24
ROWS = (1, 4, 8, 16, 32)


def transformers_model(dtype: torch.dtype) -> LlamaForCausalLM:
    """The demo's weights in transformers' own class."""
    ours, config = load_model("demo", dtype)
    hf = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.to_hf().items() if k != "architectures"})).to(dtype)
    hf.load_state_dict(ours.state_dict(), strict=False)
    return hf.eval()


@torch.inference_mode()
def transformers_step_ms(model: LlamaForCausalLM, prompt: list[int]) -> list[float]:
    """Greedy decoding with its default cache, one forward at a time."""
    ids, cache, times = torch.tensor([prompt]), None, []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        times.append((time.perf_counter() - start) * 1e3)
    return times[1:]


def engine_step_ms(llm: LLM, prompt: list[int], rows: int) -> list[float]:
    """Steps of one request that run exactly ``rows`` rows: AR's, or streaming's, whose window fills its first position
    alone. (A verified step without drafts runs only as many masked rows as its next drafts need, 5 of 16.)"""
    one_by_one = {"wedlm_window_size": rows - 1, "wedlm_entropy_threshold": None, "wedlm_pos_penalty_factor": 1e6}
    decoding, options = ("autoregressive", {}) if rows == 1 else ("streaming", one_by_one)
    params = SamplingParams(decoding=decoding, max_tokens=STEPS, ignore_eos=True, **options)
    llm.engine.add("bench", prompt, params)
    times = []
    while llm.engine.has_work:
        start = time.perf_counter()
        changed = llm.engine.step()
        if changed:
            times.append((time.perf_counter() - start) * 1e3)
    return times


def peak_memory_mb() -> float:
    """Of a process that loads the demo model, answers a prompt and exits."""
    code = (
        "from wedlm import LLM, SamplingParams; "
        "LLM('demo', device='cpu').generate('The sun is', SamplingParams(max_tokens=64)); "
        "print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1])"
    )
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return int(out.stdout.split()[-1]) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="also measure benchmarks/compiled.py")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hf = transformers_model(torch.bfloat16)
    engines = {name: LLM("demo", dtype=name, device="cpu", max_model_len=1024) for name in ("bfloat16", "float16")}
    if args.compile:
        from compiled import compiled_engine

        engines["bfloat16, torch.compile"] = compiled_engine()
    prompt = (engines["bfloat16"].tokenizer.encode("The history of mathematics is long. ") * 64)[:PROMPT_TOKENS]
    samples: dict[tuple[str, int], list[float]] = {}
    for repetition in range(args.repetitions + 1):
        turn = {("transformers", 1): statistics.median(transformers_step_ms(hf, prompt))}
        for name, llm in engines.items():
            for rows in ROWS:
                turn[name, rows] = statistics.median(engine_step_ms(llm, prompt, rows))
        if repetition:  # the first warms up
            for key, value in turn.items():
                samples.setdefault(key, []).append(value)
    report(args, samples)


def report(args: argparse.Namespace, samples: dict[tuple[str, int], list[float]]) -> None:
    """Medians over repetitions, the spread, and the ratio to transformers within the same repetition."""
    base = samples["transformers", 1]
    lines = [
        "| variant | rows | ms a step (median) | min .. max | x transformers' AR step |",
        "| --- | --- | --- | --- | --- |",
    ]
    results = []
    for (name, rows), times in samples.items():
        ratio = statistics.median(t / b for t, b in zip(times, base, strict=True))
        median = statistics.median(times)
        lines.append(f"| {name} | {rows} | {median:.2f} | {min(times):.2f} .. {max(times):.2f} | {ratio:.2f} |")
        results.append({"variant": name, "rows": rows, "ms": times, "median_ms": median, "ratio": ratio})
    record = {
        "benchmark": "cpu_step",
        "date": date.today().isoformat(),
        "model": "SmolLM2-135M-Instruct (demo)",
        "cpu": cpu_name(),
        "threads": args.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "prompt_tokens": PROMPT_TOKENS,
        "steps_per_sample": STEPS,
        "repetitions": args.repetitions,
        "peak_memory_mb": peak_memory_mb(),
        "results": results,
    }
    header = (
        f"# Cost of a step on the CPU\n\n{record['model']}, {record['cpu']}, {args.threads} threads, "
        f"torch {torch.__version__}, "
        f"transformers {transformers.__version__} (bfloat16), context {PROMPT_TOKENS}; median of "
        f"{args.repetitions} repetitions, each the median of {STEPS} steps, variants taking turns. "
        f"Peak memory of a process that loads the model and answers: {record['peak_memory_mb']:.0f} MB.\n\n"
    )
    print("\n".join(lines))
    if args.out:
        args.out.with_suffix(".md").write_text(
            header + "\n".join(lines) + "\n\nMade by `python benchmarks/cpu_step.py`.\n"
        )
        args.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
