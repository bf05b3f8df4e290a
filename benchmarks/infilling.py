# SPDX-License-Identifier: Apache-2.0
"""Filling gaps in code and sentences, beside AR decoding: exact match, and the likelihood of what stood there.

    python -m benchmarks.infilling demo --data DIR --output benchmarks/results/infilling

DIR has ``humaneval``, ``mbpp_test`` and ``boolq_val`` (``wedlm eval --download``), test and validation data that no
recipe here trains on. ``code_spans`` and ``sentence_spans`` make ``--count`` gaps of each kind, by ``--seed``:
a line of a program, and one to eight words inside a sentence between its neighbours.

Infilling is told the gap's true length, with streaming's defaults and with one token a step, or chooses the length
(``LLM.infill``'s ``lengths``; of the first ``--choose`` gaps alone, since it takes most of the time). AR decoding, once
with the prefix alone and once with the suffix in a chat prompt before it, always gets the true length; its greedy text
is the true one where each true token is the AR head's most probable. Likelihoods are of the true tokens one after the
other; infilling's by masked rows that see prefix, suffix and the true tokens before them, and once more without the
suffix, which tells what it adds from what masked rows know less than the AR head does. What is done is kept in
OUTPUT/items.jsonl and not done again: ``--seconds`` ends a run early.
"""

import argparse
import gzip
import json
import math
import platform
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wedlm import LLM, SamplingParams
from wedlm.attention.base import ExtendBatch, RowVisibility
from wedlm.evaluate.likelihood import LikelihoodScorer

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
BATCH = 8
KINDS = ("code", "sentences")
METHODS = {
    "infill": "infilling, τ = 0.4",
    "infill_slow": "infilling, one token a step",
    "infill_chosen": f"infilling, length chosen among {', '.join(map(str, LENGTHS))}",
    "masked": "masked rows, prefix alone",
    "ar": "AR, prefix alone",
    "ar_prompted": "AR, suffix in the chat prompt",
}
LIKELIHOODS = ("infill", "masked", "ar", "ar_prompted")
_INSTRUCTION = """Continue a text that has a gap, so that what you write leads to the part after it, which is:

"""


@dataclass(frozen=True)
class Span:
    """A text in three parts, the middle one to be filled in."""

    prefix: str
    middle: str
    suffix: str


def _rows(data: Path, name: str) -> list[dict[str, Any]]:
    with gzip.open(data / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def code_spans(data: Path, count: int, seed: int) -> list[Span]:
    """A line, less its indentation, of each of ``count`` programs of HumanEval and MBPP's test set; neither the first
    nor the last line of code, and none that begins a function or an import."""
    programs = [row["prompt"] + row["canonical_solution"] for row in _rows(data, "humaneval")]
    for row in _rows(data, "mbpp_test"):
        lines = [line.rstrip() for line in row["code"].replace("\t", "    ").splitlines()]
        programs.append(f'"""{row["text"]}"""\n' + "\n".join(lines) + "\n")
    rng, spans = random.Random(seed), []
    rng.shuffle(programs)
    for program in programs:
        starts_code = program.rfind('"""') + 3
        lines = list(re.finditer(r"^[ ]*(?=\S)(.*)$", program[starts_code:], re.MULTILINE))[1:-1]
        fit = [line for line in lines if 4 <= len(line[1]) <= 60 and not re.match(r"def |import |from |#", line[1])]
        if fit and len(spans) < count:
            line = rng.choice(fit)
            # Tokens of code have the last blank of an indentation in front of the first word.
            start = starts_code + max(line.start(1) - 1, line.start())
            end = starts_code + line.end(1)
            spans.append(Span(program[:start], program[start:end], program[end:]))
    return spans


def sentence_spans(data: Path, count: int, seed: int) -> list[Span]:
    """One to eight words inside a sentence of each of ``count`` passages of BoolQ's validation set (Wikipedia), between
    the two sentences before it and the two after it; neither its first word nor its last."""
    passages = [
        row["query"].removeprefix("Passage: ").rpartition("\nQuestion: ")[0] for row in _rows(data, "boolq_val")
    ]
    rng, spans, seen = random.Random(seed), [], set()
    rng.shuffle(passages)
    for passage in passages:
        sentences = re.split(r"(?<=[.!?]) (?=[A-Z])", passage)
        fit = [i for i in range(1, len(sentences) - 1) if 8 <= len(sentences[i].split(" ")) <= 40]
        if not fit or passage in seen or len(spans) == count:
            continue
        seen.add(passage)
        at = rng.choice(fit)
        words = sentences[at].split(" ")
        size = rng.randint(1, min(8, len(words) - 2))
        first = rng.randint(1, len(words) - 1 - size)
        before = " ".join([*sentences[max(0, at - 2) : at], *words[:first]])
        after = " ".join([*words[first + size :], *sentences[at + 1 : at + 3]])
        spans.append(Span(before, " " + " ".join(words[first : first + size]), " " + after))
    return spans


@torch.inference_mode()
def gap_logprobs(llm: LLM, prefix: Sequence[int], suffix: Sequence[int], middle: Sequence[int]) -> list[float]:
    """Of each token of the middle, given prefix, suffix and the tokens before it: by decoding's first masked row.

    All masked rows run at once, each seeing the true tokens before its own position and no other masked row. ValueError
    for a middle of more than 128 tokens, whose rows no attention takes together.
    """
    if len(middle) > 128:
        raise ValueError(f"the middle has {len(middle)} tokens; expected at most 128")
    runner, pool, mask = llm.engine.runner, llm.engine.pool, llm.engine.config.mask_token_id
    known, gap, name, device = [*prefix, *suffix], len(middle), "gap likelihood", runner.device
    places = torch.tensor([*range(len(prefix)), *range(len(prefix) + gap, len(known) + gap)], device=device)
    pool.allocate(name, known, 0)
    try:
        if not pool.reserve(name, len(known) + 2 * gap):
            raise ValueError(f"{len(known)} tokens and a gap of {gap} do not fit into the key/value cache")
        pages = pool.table(name)

        def run(tokens: list[int], positions: Tensor, start: int, masked: Tensor, sees: RowVisibility | None) -> Tensor:
            batch = ExtendBatch([start], [len(tokens)], [pages], sees)
            attend = runner.eager.plan_attention(runner.cache, batch)
            rows = torch.tensor(tokens, device=device)
            return runner.eager.model(rows, positions, attend, masked, masked if len(masked) else None)

        index = torch.arange(2 * gap, device=device)
        masked = index[gap:]
        run(known, places, 0, index[:0], None)
        sees = RowVisibility((index - gap).clamp(min=0), torch.where(index < gap, 0, index))
        logits = run([*middle, *[mask] * gap], len(prefix) + index % gap, len(known), masked, sees).float()
    finally:
        pool.free(name)
    logits[:, mask] = -math.inf  # which is never chosen
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(middle, device=device)[:, None])[:, 0].tolist()


def measure(llm: LLM, spans: list[Span], chooses: bool) -> list[dict[str, Any]]:
    """What each method makes of each gap, by method: whether it is the true text, and the log-likelihood of that.
    ``chooses``: choosing the length, too."""
    encode = llm.tokenizer.encode
    prefixes = [encode(span.prefix) for span in spans]
    suffixes = [encode(span.suffix, add_special_tokens=False) for span in spans]
    middles = [encode(span.middle, add_special_tokens=False) for span in spans]
    found: list[dict[str, Any]] = [{"num_tokens": len(middle), "exact": {}, "logprob": {}} for middle in middles]

    def fill(name: str, lengths: Sequence[int] | None = None, **options: Any) -> None:
        params = [
            SamplingParams(temperature=0.0, max_tokens=len(m), min_tokens=0 if lengths else len(m), **options)
            for m in middles
        ]
        if lengths:
            params = [SamplingParams(temperature=0.0)] * len(middles)
        outputs = llm.infill(prefixes, suffixes, params, lengths=lengths, progress=False)
        for one, span, output in zip(found, spans, outputs, strict=True):
            one["exact"][name] = output.text == span.middle
            if lengths:
                one["chosen_tokens"] = len(encode(output.text, add_special_tokens=False))

    fill("infill")
    fill("infill_slow", wedlm_entropy_threshold=None)
    if chooses:
        fill("infill_chosen", LENGTHS)
    prompted = [
        [*llm.chat_prompt([{"role": "user", "content": _INSTRUCTION + span.suffix}]), *prefix]
        for span, prefix in zip(spans, prefixes, strict=True)
    ]
    scorer = LikelihoodScorer(llm)
    for name, contexts in (("ar", prefixes), ("ar_prompted", prompted)):
        for index, score in scorer.score(list(zip(contexts, middles, strict=True))):
            found[index]["exact"][name] = score.greedy
            found[index]["logprob"][name] = score.logprob
    for one, parts in zip(found, zip(prefixes, suffixes, middles, strict=True), strict=True):
        one["logprob"]["infill"] = math.fsum(gap_logprobs(llm, *parts))
        one["logprob"]["masked"] = math.fsum(gap_logprobs(llm, parts[0], [], parts[2]))
    return found


def pending(done: Sequence[dict[str, Any]], spans: dict[str, list[Span]]) -> Iterator[tuple[str, list[int]]]:
    """Batches of what is not done, the kinds in turns."""
    have = {(one["kind"], one["index"]) for one in done}
    for first in range(0, max(map(len, spans.values())), BATCH):
        for kind, of_kind in spans.items():
            batch = [i for i in range(first, min(first + BATCH, len(of_kind))) if (kind, i) not in have]
            if batch:
                yield kind, batch


def report(items: Sequence[dict[str, Any]], about: dict[str, Any]) -> str:
    """In Markdown."""
    lines = [
        f"# Filling gaps: {about['model']}",
        "",
        f"{about['how']}; seed {about['seed']}; {about['seconds']:,.0f} s on {about['machine']}.",
        "Made by `python -m benchmarks.infilling`, which says what each row is.",
        *([about["note"]] if about["note"] else []),
    ]
    for kind in KINDS:
        own = [one for one in items if one["kind"] == kind]
        if not own:
            continue
        tokens = sum(one["num_tokens"] for one in own)
        lines += ["", f"## {len(own)} {'lines of code' if kind == 'code' else 'gaps in sentences'}", ""]
        lines += [f"{tokens / len(own):.1f} tokens on average.", ""]
        lines += [
            "| | exact match | log-likelihood, nats a token | likelier than by AR, prefix alone |",
            "| --- " * 4 + "|",
        ]
        chosen = [one for one in own if "chosen_tokens" in one]
        for name, title in METHODS.items():
            among = chosen if name == "infill_chosen" else own
            if not among:
                continue
            cells = [title, "", "", ""]
            if name != "masked":
                share = sum(one["exact"][name] for one in among) / len(among)
                error = math.sqrt(share * (1 - share) / len(among))
                cells[1] = f"{100 * share:.1f} % ± {100 * error:.1f}"
            if name in LIKELIHOODS:
                cells[2] = f"{sum(one['logprob'][name] for one in own) / tokens:.3f}"
                better = sum(one["logprob"][name] > one["logprob"]["ar"] for one in own)
                cells[3] = "" if name == "ar" else f"{100 * better / len(own):.0f} %"
            lines.append(f"| {' | '.join(cells)} |")
        if chosen:
            right = sum(one["chosen_tokens"] == one["num_tokens"] for one in chosen)
            same = sum(one["exact"]["infill"] for one in chosen) / len(chosen)
            lines += [
                "",
                f"The length was chosen in {len(chosen)} gaps, and was the true one in {right}; told the true",
            ]
            lines += [f"length, infilling is exact in {100 * same:.1f} % of these."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data files")
    parser.add_argument("--output", type=Path, required=True, help="a folder; what it has is kept, and added to")
    parser.add_argument("--count", type=int, default=500, help="gaps of each kind")
    parser.add_argument("--choose", type=int, default=48, help="of how many of each kind the length is chosen, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no batch after this time")
    parser.add_argument("--note", default="", help="a sentence for the report")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "items.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    spans = {
        "code": code_spans(options.data, options.count, options.seed),
        "sentences": sentence_spans(options.data, options.count, options.seed),
    }
    llm, start = LLM(options.model), time.perf_counter()
    for kind, batch in pending(done, spans):
        begun = time.perf_counter()
        if begun - start > options.seconds:
            break
        found = measure(llm, [spans[kind][i] for i in batch], chooses=batch[0] < options.choose)
        each = (time.perf_counter() - begun) / len(batch)
        new = [
            {"kind": kind, "index": i, "seconds": round(each, 3), **one} for i, one in zip(batch, found, strict=True)
        ]
        with path.open("a") as file:
            file.writelines(json.dumps(one) + "\n" for one in new)
        done += new
    about = {
        "model": options.model,
        "how": llm.describe(),
        "seed": options.seed,
        "note": options.note,
        "machine": f"{torch.get_num_threads()} threads of {platform.machine()}",
        "seconds": sum(one["seconds"] for one in done),
    }
    (options.output / "report.md").write_text(report(done, about), encoding="utf-8")
    missing = sum(len(batch) for _, batch in pending(done, spans))
    print(json.dumps({"done": len(done), "missing": missing, "seconds": round(about["seconds"], 1)}))


if __name__ == "__main__":
    main()
