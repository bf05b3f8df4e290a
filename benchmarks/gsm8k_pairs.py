# SPDX-License-Identifier: Apache-2.0
"""Compare runs of benchmarks/gsm8k.py text by text, and say how near the two tokens are where texts part.

    python -m benchmarks.gsm8k_pairs bf16.json fp8.json samples-KEY-gsm8k.jsonl --data gsm8k_test.jsonl.gz --out OUT

Each file is what gsm8k.py wrote, or the samples of an evaluation, cut to as many tokens. In a file of several modes the
first is compared with the others, and then the first modes of all files with each other. With ``--gaps N`` the model
reads, in float32, what stands before the first N differences within each file, and gives the log-probabilities of both
tokens.
"""

import argparse
import gzip
import itertools
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wedlm import LLM, SamplingParams
from wedlm.evaluate.compare import compare_samples
from wedlm.evaluate.divergence import first_difference
from wedlm.evaluate.final_number import same_number
from wedlm.evaluate.result_folder import Sample
from wedlm.model import Tokenizer, load_tokenizer

Values = dict[str, Any]
_EDGES = (0.05, 0.1, 0.25, 0.5, 1.0)  # nats


@dataclass(frozen=True)
class Texts:
    """The answers of one mode, in the order of the questions, and what is to be said of them."""

    name: str
    ids: list[list[int]]
    samples: list[Sample]
    facts: Values


def read_texts(path: Path, rows: list[Values], tokenizer: Tokenizer, most: int) -> list[Texts]:
    """The modes of a file of gsm8k.py, or the one of a samples file."""

    def texts(name: str, ids: list[list[int]], facts: Values) -> Texts:
        written = [tokenizer.decode(one) for one in ids]
        samples = [
            Sample(number, row["question"], row["answer"], bool(same_number(text, row["answer"])), text)
            for number, (row, text) in enumerate(zip(rows, written, strict=True))
        ]
        return Texts(name, ids, samples, {**facts, "right": sum(sample.correct for sample in samples)})

    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        found = {line["doc_id"]: line["token_ids"][:most] for line in lines}
        return [texts(f"{path.name} autoregressive", [found[number] for number in range(len(rows))], {})]
    report = json.loads(path.read_text(encoding="utf-8"))
    shared = {name: value for name, value in report.items() if name != "modes"}
    left_out = ("texts", "token_ids", "seconds", "tokens_per_second")
    return [
        texts(
            f"{path.stem} {mode['mode']}",
            mode["token_ids"],
            {**shared, **{name: value for name, value in mode.items() if name not in left_out}},
        )
        for mode in report["modes"]
    ]


def pair(a: Texts, b: Texts) -> Values:
    """How many texts are the same, how many tokens until they part, and B's accuracy less A's in points."""
    places = [first_difference(x, y) for x, y in zip(a.ids, b.ids, strict=True)]
    together = sum(len(x) if at is None else at + 1 for x, at in zip(a.ids, places, strict=True))
    parted = sum(at is not None for at in places)
    right = compare_samples(a.samples, b.samples)
    return {
        "a": a.name,
        "b": b.name,
        "same": len(places) - parted,
        "parted": parted,
        "tokens_per_parting": round(together / parted, 3) if parted else None,
        "points": round(100 * right.difference, 2),
        "half_width": round(100 * right.half_width, 2),
        "only_a_right": right.only_a,
        "only_b_right": right.only_b,
        "p_value": round(right.p_value, 4),
    }


def gaps(llm: LLM, rows: list[Values], a: Texts, b: Texts, most: int) -> Values:
    """Float32's log-probability of A's token less that of B's where they part, in nats."""
    asked, tokens = [], []
    for row, x, y in zip(rows, a.ids, b.ids, strict=True):
        at = first_difference(x, y)
        if at is not None and at < min(len(x), len(y)) and len(asked) < most:
            asked.append(llm.chat_prompt([{"role": "user", "content": row["question"]}]) + x[:at])
            tokens.append((x[at], y[at]))
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=20, decoding="autoregressive")
    outputs = llm.generate(asked, params, progress=False)
    found, best = [], 0
    for output, (mine, its) in zip(outputs, tokens, strict=True):
        assert output.top_logprobs is not None
        ranked = output.top_logprobs[0]
        known = dict(ranked)
        best += {mine, its} == {token for token, _ in ranked[:2]}
        found.append(abs(known[mine] - known[its]) if mine in known and its in known else float("inf"))
    found.sort()
    return {
        "places": len(found),
        "the_two_best_of_float32": best,
        "median_nats": round(statistics.median(found), 4),
        "ninetieth_nats": round(found[int(0.9 * (len(found) - 1))], 4),
        "largest_nats": round(found[-1], 4),
        "within": {str(edge): sum(gap <= edge for gap in found) for edge in _EDGES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True, help="gsm8k_test.jsonl.gz")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--gaps", type=int, default=0, help="places to read in float32, of each file")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with gzip.open(given.data, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    tokenizer = load_tokenizer(given.model)
    files = [read_texts(path, rows, tokenizer, given.max_tokens) for path in given.files]
    within = [(modes[0], other) for modes in files for other in modes[1:]]
    across = list(itertools.combinations([modes[0] for modes in files], 2))
    pairs = [pair(a, b) for a, b in [*within, *across]]
    if given.gaps:
        llm = LLM(given.model, dtype="float32", max_num_seqs=8, kv_cache_bytes=10**9)
        for values, (a, b) in zip(pairs, within, strict=False):
            values["float32_gaps"] = gaps(llm, rows, a, b, given.gaps)
    report = {
        "command": f"python -m benchmarks.gsm8k_pairs FILES --data {given.data.name} --gaps {given.gaps}",
        "runs": [{"name": texts.name, **texts.facts} for modes in files for texts in modes],
        "pairs": pairs,
    }
    given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
