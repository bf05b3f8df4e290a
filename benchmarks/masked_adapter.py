# SPDX-License-Identifier: Apache-2.0
"""What an adapter of masked rows gains on a frozen model, and that it leaves the text alone, set by set.

    python benchmarks/masked_adapter.py demo-base --adapter ADAPTER --set gsm8k=gsm8k.jsonl.gz --set chat=chat.jsonl:9
        --base-answers base.json.gz --out result.json

Sets are files of conversations, of which the first message is asked; a number behind a colon takes the first of them.
The base's AR answers without the adapter are made once and kept in ``--base-answers``; AR and verified decoding with
the adapter are compared with them token by token. Saves one JSON object; its figures are those of all answers, of
those that ended by themselves (``ended``) and of those that the limit cut (``cut``).
"""

import argparse
import gzip
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from wedlm import LLM, SamplingParams
from wedlm.engine.outputs import GenerationOutput, Totals
from wedlm.train.sources import numbered_lines


def questions(spec: str) -> list[list[dict[str, str]]]:
    """The first message of each conversation of FILE[:LIMIT]."""
    name, colon, limit = spec.rpartition(":")
    path = Path(name if colon else spec)
    rows = [json.loads(line) for _, line in numbered_lines(path)]
    found = [[(row if isinstance(row, list) else row["messages"])[0]] for row in rows]
    return found[: int(limit) if colon else None]


def figures(outputs: Sequence[GenerationOutput]) -> dict:
    """``steps``: the share of forwards that made at least 1, 2, ... tokens final, each answer's last forward apart."""
    totals = Totals.of(outputs)
    sizes = Counter(
        size for one in outputs for step, size in Counter(one.token_steps).items() if step != one.token_steps[-1]
    )
    steps = sum(sizes.values())
    return {
        "answers": len(outputs),
        "tokens": totals.num_tokens,
        "tokens_per_forward": round(totals.tokens_per_forward, 3),
        "p_cache": round(totals.p_cache, 3),
        "steps": [
            round(sum(n for size, n in sizes.items() if size >= least) / steps, 3)
            for least in range(1, max(sizes, default=0) + 1)
        ],
    }


def by_end(outputs: Sequence[GenerationOutput]) -> dict:
    ended = [one for one in outputs if one.finish_reason == "stop"]
    cut = [one for one in outputs if one.finish_reason == "length"]
    return {**figures(outputs), "ended": figures(ended), "cut": figures(cut)}


def answer(llm: LLM, sets: dict, params: SamplingParams) -> tuple[dict[str, list[GenerationOutput]], float]:
    """All sets in one batch."""
    began = time.perf_counter()
    outputs = llm.chat([prompt for prompts in sets.values() for prompt in prompts], params)
    seconds = time.perf_counter() - began
    ends, found = 0, {}
    for name, prompts in sets.items():
        found[name] = outputs[ends : ends + len(prompts)]
        ends += len(prompts)
    return found, seconds


def base_answers(
    path: Path | None, model: str, sets: dict, options: dict, max_tokens: int
) -> dict[str, list[list[int]]]:
    """Token ids of the base's AR answers, from the file where it has them."""
    if path is not None and path.is_file():
        kept = json.loads(gzip.decompress(path.read_bytes()))
        if kept["max_tokens"] == max_tokens and all(len(kept["sets"].get(n, [])) >= len(p) for n, p in sets.items()):
            return kept["sets"]
    llm = LLM(model, **options)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, decoding="autoregressive")
    outputs, _ = answer(llm, sets, params)
    found = {name: [one.token_ids for one in some] for name, some in outputs.items()}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        building = path.with_name(f".{path.name}")
        building.write_bytes(gzip.compress(json.dumps({"max_tokens": max_tokens, "sets": found}).encode()))
        building.replace(path)
    return found


def same(outputs: Sequence[GenerationOutput], base: Sequence[Sequence[int]]) -> int:
    return sum(list(one.token_ids) == list(ids) for one, ids in zip(outputs, base, strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--adapter", type=Path, help="none: make the base's answers alone")
    parser.add_argument("--set", action="append", required=True, dest="sets", metavar="NAME=FILE[:LIMIT]")
    parser.add_argument("--rows", type=int, nargs="+", default=[16], help="verified: rows a step, one run for each")
    parser.add_argument("--draft-entropy", type=float, default=2.5, help="verified: nats")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--base-answers", type=Path, help="where they are kept between runs")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-num-seqs", type=int, default=128)
    parser.add_argument("--kv-cache-gb", type=float, default=4.0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()

    sets = {name: questions(spec) for name, _, spec in (one.partition("=") for one in given.sets)}
    options = {
        "dtype": given.dtype,
        "device": given.device,
        "max_num_seqs": given.max_num_seqs,
        "kv_cache_bytes": int(given.kv_cache_gb * 1e9),
        "max_num_batched_tokens": max(8192, 2 * max(given.rows) * given.max_num_seqs),
    }
    if given.device == "cpu":
        options["quantization"] = "none"  # verified text is AR's in the arithmetic that both share
    base = base_answers(given.base_answers, given.model, sets, options, given.max_tokens)
    report: dict = {
        "model": str(Path(*Path(given.model).parts[-2:])),
        "dtype": given.dtype,
        "max_tokens": given.max_tokens,
        "draft_entropy": given.draft_entropy,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() and given.device != "cpu" else "cpu",
        "sets": {name: {"prompts": len(prompts)} for name, prompts in sets.items()},
    }
    if given.adapter is not None:
        llm = LLM(given.model, adapter=str(given.adapter), **options)
        report["adapter"] = given.adapter.parent.name
        for rows in [1, *given.rows]:
            params = SamplingParams(temperature=0.0, max_tokens=given.max_tokens, decoding="autoregressive")
            if rows > 1:
                more = {"wedlm_window_size": rows, "wedlm_draft_entropy": given.draft_entropy}
                params = SamplingParams(temperature=0.0, max_tokens=given.max_tokens, decoding="verified", **more)
            outputs, seconds = answer(llm, sets, params)
            llm.engine.pool.reset_prefix_cache()
            mode = "autoregressive" if rows == 1 else f"verified {rows}"
            for name, some in outputs.items():
                report["sets"][name][mode] = {"same_text_as_base": same(some, base[name]), **by_end(some)}
            report[f"seconds {mode}"] = round(seconds, 1)
            brief = {name: (one[mode]["same_text_as_base"], one["prompts"], one[mode]["tokens_per_forward"])
                     for name, one in report["sets"].items()}  # fmt: skip
            print(
                json.dumps({"adapter": report["adapter"], "mode": mode, "same, of, tokens a forward": brief}),
                flush=True,
            )
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
