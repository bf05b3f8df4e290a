# SPDX-License-Identifier: Apache-2.0
"""Drafts from the text: tokens a forward and speed with them mixed in, beside masked rows alone, and texts beside AR's.

    python benchmarks/lookup.py demo --data DIR --threads 2 --output benchmarks/results/lookup

Four sets: code edits and extractions (``wedlm.bench.copying``), chat (``tests/data/prompts.jsonl``) and GSM8K questions
(of DIR, without which they are left out). Each prompt runs alone, or ``--streams`` of them at once, at temperature 0,
with ``auto`` once with drafts from the text and once without, in turns as to which is first. Speed is that after the
first tokens; of several prompts at once that of all, prompts included. ``--verified`` also runs the two at a fixed
number of rows, ``--check`` AR, whose text all others must have. Saves DIR/lookup.json, to which sets that run later are
added, and report.md.
"""

import argparse
import gzip
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

from wedlm import LLM, SamplingParams
from wedlm.bench import copying
from wedlm.engine.outputs import GenerationOutput

ROOT = Path(__file__).parents[1]
MODES: dict[str, dict[str, Any]] = {
    "masked rows alone": {"decoding": "auto", "wedlm_lookup_drafts": 0},
    "mixed": {"decoding": "auto"},
}
FIXED: dict[str, dict[str, Any]] = {
    "verified": {"decoding": "verified"},
    "verified, lookup": {"decoding": "verified", "wedlm_lookup_drafts": 15},
}
FIELDS = ("num_tokens", "num_forwards", "num_rows", "num_drafted", "num_accepted", "num_lookup_drafted",
          "num_lookup_accepted")  # fmt: skip


def prompts_of(data: Path | None, limit: int) -> dict[str, list[str]]:
    """By set."""
    lines = (ROOT / "tests/data/prompts.jsonl").read_text(encoding="utf-8").splitlines()
    sets = {
        "code edits": copying.edits()[:limit],
        "extractions": copying.extractions()[:limit],
        "chat": [json.loads(line)["prompt"] for line in lines][:: max(1, len(lines) // limit)][:limit],
    }
    if data is not None:
        with gzip.open(data / "gsm8k_test.jsonl.gz", "rt", encoding="utf-8") as file:
            sets["GSM8K"] = [json.loads(line)["question"] for line in file][:limit]
    return sets


def seconds_of(outputs: list[GenerationOutput], whole: float) -> float:
    """Of one answer: from its first tokens to its end; of several at once: ``whole``, prompts included."""
    stats = outputs[0].stats
    if len(outputs) > 1 or stats is None:
        return whole
    return stats.num_tokens / stats.tokens_per_second - stats.time_to_first_token_s


def run(
    llm: LLM, prompts: list[str], modes: dict[str, dict[str, Any]], max_tokens: int, streams: int
) -> dict[str, dict[str, Any]]:
    """Sums over the prompts by mode, and each answer's tokens."""
    found: dict[str, dict[str, Any]] = {
        name: dict.fromkeys(FIELDS, 0) | {"seconds": 0.0, "answers": []} for name in modes
    }
    for first in range(0, len(prompts), streams):
        part = [[{"role": "user", "content": prompt}] for prompt in prompts[first : first + streams]]
        order = list(modes.items())[:: 1 if first // streams % 2 else -1]
        for name, options in order:
            # A salt of its own: neither finds the other's keys.
            params = SamplingParams(max_tokens=max_tokens, cache_salt=name, **options)
            start = time.perf_counter()
            outputs = llm.chat(part, params, progress=False)
            sums = found[name]
            sums["seconds"] += seconds_of(outputs, time.perf_counter() - start)
            for output in outputs:
                for field in FIELDS:
                    sums[field] += getattr(output.stats, field)
                sums["answers"].append(output.token_ids)
    return found


def figures(sums: dict[str, Any], reference: list[list[int]]) -> dict[str, Any]:
    """What is reported of one mode. ``reference``: the answers that it must have."""
    tokens = sums["num_tokens"]
    return {
        **{field: sums[field] for field in FIELDS},
        "seconds": round(sums["seconds"], 3),
        "tokens_per_forward": round(tokens / sums["num_forwards"], 3),
        "p_cache": round(tokens / sums["num_rows"], 3),
        "tok_per_s": round(tokens / sums["seconds"], 1),
        "same_text": sum(map(list.__eq__, sums["answers"], reference)),
        "answers": len(reference),
    }


def table(report: dict[str, Any]) -> str:
    """The report in Markdown."""
    head = ("set", "mode", "tokens / forward", "p_cache", "tok/s", "beside masked rows alone", "accepted", "same text")
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for name, modes in report["sets"].items():
        for mode, one in modes.items():
            base = modes[next(iter(modes))] if mode in MODES else modes.get("verified", one)
            ratio = one["tok_per_s"] / base["tok_per_s"]
            cells = (
                name, mode, f"{one['tokens_per_forward']:.2f}", f"{one['p_cache']:.3f}", f"{one['tok_per_s']:.0f}",
                f"{ratio:.2f}x", f"{one['num_lookup_accepted']} of {one['num_lookup_drafted']}",
                f"{one['same_text']} of {one['answers']}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, help="directory with gsm8k_test.jsonl.gz")
    parser.add_argument("--limit", type=int, default=50, help="prompts of each set")
    parser.add_argument("--sets", nargs="*", help="only these")
    parser.add_argument("--max-tokens", type=int, default=192)
    parser.add_argument("--streams", type=int, default=1, help="prompts that run at once")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--verified", action="store_true")
    parser.add_argument("--check", action="store_true", help="run AR, too, and compare texts with it")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    llm = LLM(arguments.model, device=arguments.device, dtype=arguments.dtype, max_model_len=2048)
    modes = MODES | (FIXED if arguments.verified else {})
    report: dict[str, Any] = {
        "model": arguments.model,
        "engine": llm.describe(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "max_tokens": arguments.max_tokens,
        "streams": arguments.streams,
        "sets": {},
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    saved = arguments.output / "lookup.json"
    if saved.exists():
        report["sets"] = json.loads(saved.read_text(encoding="utf-8"))["sets"]
    for name, prompts in prompts_of(arguments.data, arguments.limit).items():
        if arguments.sets and name not in arguments.sets:
            continue
        run(llm, prompts[:1], modes, 16, 1)  # what is measured or compiled once
        found = run(llm, prompts, modes, arguments.max_tokens, arguments.streams)
        reference = found["masked rows alone"]["answers"]
        if arguments.check:
            checked = run(llm, prompts, {"AR": {"decoding": "autoregressive"}}, arguments.max_tokens, arguments.streams)
            reference = checked["AR"]["answers"]
            found |= checked
        report["sets"][name] = {mode: figures(sums, reference) for mode, sums in found.items()}
        saved.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (arguments.output / "report.md").write_text(table(report), encoding="utf-8")
    print(table(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
