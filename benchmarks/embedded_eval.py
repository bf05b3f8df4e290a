# SPDX-License-Identifier: Apache-2.0
"""The embedded model's whole table and sweeps on one GPU, in order of importance, within a time limit; resumable.

    python -m benchmarks.embedded_eval answer --data-dir ./data --output RESULTS --processes 4 --seconds 450
    python -m benchmarks.embedded_eval score --data-dir ./data --output RESULTS --summary summary.json

``answer`` only answers (generated texts and likelihoods), which is what needs the GPU; a stage that its own limit cuts
short goes on after the others, one that the whole limit cuts short in the next call. One process does not fill a GPU at
this size: ``--processes`` run beside each other, each taking the next stage that no other has. ``score`` scores the
finished stages, and of those that were cut short the first questions, up to one that has no answer. It works on any
machine, runs the generated code, compares verified with AR decoding and streaming with AR question by question, and
writes one summary, which benchmarks/embedded_tables.py puts into the docs. Everything in between is in the output
folder (``--pack`` puts it into one archive, whatever happens; unpack it there to go on).
"""

import argparse
import fcntl
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import tarfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's own bars; before tqdm's first import


from wedlm import LLM
from wedlm.engine.factory import release_memory
from wedlm.evaluate.answer_log import AnswerLog
from wedlm.evaluate.compare import compare_samples
from wedlm.evaluate.divergence import divergences
from wedlm.evaluate.harness import EngineBackend
from wedlm.evaluate.provenance import model_provenance
from wedlm.evaluate.result_folder import Sample
from wedlm.evaluate.run import Evaluation, load_tasks
from wedlm.evaluate.settings import Params, Settings, make_params, protocol_tasks
from wedlm.model.demo import DEMO_NEXT_TOKEN
from wedlm.model.formats.save import write_json_lines, write_whole

AR, VERIFIED = Params(decoding="autoregressive"), Params(decoding="verified")
STREAMING = Params(decoding="streaming", next_token=DEMO_NEXT_TOKEN)
GENERATED = ("gsm8k", "humaneval", "mbpp", "math500", "humaneval_plus", "mbpp_plus")
# What streaming trades: window, threshold, penalty, and what decides the next token; the default first.
SWEEP = [
    replace(STREAMING, next_token=rule, window_size=window, entropy_threshold=threshold, pos_penalty=penalty)
    for rule, window, threshold, penalty in (
        ("causal", 16, 0.26, 0.02),
        ("causal", 16, 0.25, 0.02),
        ("causal", 16, 0.3, 0.02),
        ("causal", 8, 0.3, 0.02),
        ("causal", 16, 0.35, 0.02),
        ("causal", 16, 0.2, 0.02),
        ("causal", 8, 0.25, 0.02),
        ("masked", 4, 0.4, 0.02),
        ("masked", 16, 0.4, 0.02),
    )
]
SWEPT = ("next_token", "window_size", "entropy_threshold", "pos_penalty")
NUM_URGENT = 7  # before the rest of the table
ON_CODE = (*SWEEP[:3], SWEEP[5])  # on HumanEval and MBPP, too
PAPER_GENERATED = ("gsm8k", "humaneval", "mbpp", "math500", "humaneval_plus", "arc_c", "arc_e")
PAPER_LARGE, LARGE_LIMIT = ("hellaswag", "mmlu"), 2000
GRACE_S = 10  # for what runs at the deadline
TIMES = ("seconds", "tokens_per_second", "samples_per_second")


@dataclass(frozen=True)
class Stage:
    """A run of one task. ``seconds``: it is left for later after so long. ``folder``: under the output folder."""

    name: str
    folder: str
    task: str
    params: Params
    seconds: int = 120
    sweep: tuple[str, ...] = ()
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = True
    dtype: str = "float32"
    protocol: str = "default"

    @property
    def asks(self) -> tuple[Any, ...]:
        """What two stages that put questions in the same words to the same weights share."""
        return self.task, self.num_fewshot, self.chat, self.dtype


def stages() -> list[Stage]:
    """All, the most important first."""

    def table(params: Params, tasks: tuple[str, ...]) -> list[Stage]:
        return [Stage(f"{task} {params.decoding}", "table", task, params, num_fewshot=0) for task in tasks]

    def sweep(task: str, several: list[Params]) -> list[Stage]:
        return [Stage(f"{task} {_short(one)}", "sweeps", task, one, sweep=SWEPT, num_fewshot=0) for one in several]

    def paper(tasks: tuple[str, ...], limit: int | None = None, seconds: int = 120) -> list[Stage]:
        more: dict[str, Any] = {"limit": limit, "chat": False, "protocol": "paper", "seconds": seconds}
        first = f" first {limit}" if limit else ""
        return [
            Stage(f"{task} {mode}{first}", "paper", task, make_params("paper", {"decoding": mode}), **more)
            for mode in ("streaming", "autoregressive")
            for task in protocol_tasks("paper", tasks)
        ]

    most, code, rest = GENERATED[:1], GENERATED[1:3], GENERATED[3:]
    return [
        *table(AR, most),
        *table(STREAMING, most),
        *sweep("gsm8k", SWEEP[:NUM_URGENT]),
        *[stage for params in (AR, STREAMING) for stage in table(params, code)],
        *[stage for task in code for stage in sweep(task, [*ON_CODE])],
        *[stage for params in (AR, STREAMING) for stage in table(params, rest)],
        *[stage for task in rest for stage in sweep(task, SWEEP[:1])],
        *table(VERIFIED, GENERATED),
        *[Stage(task, "table", task, AR) for task in ("arc_c", "arc_e")],
        *paper(PAPER_GENERATED),
        *paper(PAPER_LARGE, LARGE_LIMIT),
        *[Stage(task, "table", task, AR, 300) for task in ("hellaswag", "mmlu")],
        *sweep("gsm8k", SWEEP[NUM_URGENT:]),
        *paper(PAPER_LARGE, seconds=300),
        *[
            Stage(f"gsm8k {params.decoding} bfloat16", "bfloat16", "gsm8k", params, num_fewshot=0, dtype="bfloat16")
            for params in (AR, VERIFIED)
        ],
    ]


def _short(params: Params) -> str:
    threshold, penalty = params.entropy_threshold, params.pos_penalty
    more = "" if penalty == STREAMING.pos_penalty else f" penalty {penalty:g}"
    return f"{params.next_token} W{params.window_size} tau {threshold:g}{more}"


class OutOfTime(Exception):
    """A limit has passed; what was answered is on disk."""


class Bench:
    """Models and tasks, loaded when they are first needed; one model at a time."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self._llm: tuple[str, LLM] | None = None
        self._tasks: dict[tuple, Any] = {}

    def llm(self, dtype: str) -> LLM:
        if self._llm is None or self._llm[0] != dtype:
            self._llm = None  # before the next one needs the memory
            release_memory()
            given, seqs = self.arguments, self.arguments.max_num_seqs
            llm = LLM(
                given.model,
                dtype=dtype,
                device=given.device,
                max_num_seqs=seqs,
                max_num_batched_tokens=max(2048, seqs * max(stage.params.max_rows for stage in stages())),
                kv_cache_bytes=int(given.kv_cache_gb * 1e9),
            )
            self._llm = dtype, llm
        return self._llm[1]

    def evaluation(self, stage: Stage, scores: bool) -> Evaluation:
        limit = min(stage.limit or 10**9, self.arguments.limit or 10**9)
        settings = Settings(
            (stage.task,),
            self.arguments.data_dir,
            self.arguments.output / stage.folder,
            limit=None if limit == 10**9 else limit,
            num_fewshot=stage.num_fewshot,
            protocol=stage.protocol,
            chat_template=stage.chat,
        )
        key = stage.task, stage.num_fewshot, stage.chat, scores
        if key not in self._tasks:
            self._tasks[key] = load_tasks(settings, scores)
        llm = self.llm(stage.dtype)
        backend = EngineBackend(llm, model_provenance(llm, self.arguments.model, None))
        return Evaluation(backend, settings, self._tasks[key])


def finished(output: Path) -> dict[str, dict[str, Any]]:
    """What is known of finished stages, by name."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (output / "stages").glob("*.json")]
    return {record["stage"]: record for record in records}


@contextmanager
def claimed(output: Path, stage: Stage) -> Iterator[bool]:
    """Whether the stage is this process's; a process that dies has no claim."""
    with (output / "stages" / f"{stage.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except BlockingIOError:
            mine = False
        yield mine


def answer(arguments: argparse.Namespace, deadline: float) -> None:
    """Run the stages that are neither finished nor another process's; one JSON line for each."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    bench, left = Bench(arguments), chosen(arguments)
    while left:
        cut = []
        for stage in left:
            if deadline - time.monotonic() < 5:
                return
            with claimed(arguments.output, stage) as mine:
                if mine and stage.name not in finished(arguments.output) and not try_one(bench, stage, deadline):
                    cut.append(stage)
        left = cut


def try_one(bench: Bench, stage: Stage, deadline: float) -> bool:
    """False if it took too long."""
    try:
        record = {"stage": stage.name, **answer_one(bench, stage, deadline)}
    except OutOfTime as error:
        print(json.dumps({"stage": stage.name, "ended": str(error)}), flush=True)
        return False
    except Exception:  # the stages after it may be well
        traceback.print_exc()
        print(json.dumps({"stage": stage.name, "ended": "error"}), flush=True)
        return True
    with write_whole(bench.arguments.output / "stages" / f"{stage.name}.json") as path:
        path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    print(json.dumps(record), flush=True)
    return True


def answer_beside_each_other(arguments: argparse.Namespace, deadline: float) -> None:
    (arguments.output / "stages").mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=answer, args=(arguments, deadline)) for _ in range(arguments.processes)]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, deadline + GRACE_S - time.monotonic()))
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            if process.pid is not None:
                process.join(GRACE_S)
        if arguments.pack is not None:
            pack(arguments.output, arguments.pack)


def answer_one(bench: Bench, stage: Stage, deadline: float) -> dict[str, Any]:
    evaluation = bench.evaluation(stage, scores=False)
    began = time.monotonic()
    last = min(deadline, began + stage.seconds)

    def watch(task: str, count: int, total: int) -> None:
        if time.monotonic() > last and count < total:
            raise OutOfTime(f"{count} of {total} answers after {time.monotonic() - began:.0f} s")

    evaluation.answer(stage.params, watch)
    key = evaluation.key(stage.params)
    entries = AnswerLog(evaluation.partial_path(key, stage.task)).entries
    report: dict[str, Any] = {"key": key, "answers": len(entries), "seconds": round(time.monotonic() - began, 1)}
    if all("token_ids" in entry for entry in entries.values()):
        tokens = sum(len(entry["token_ids"]) for entry in entries.values())
        forwards = sum(entry["forwards"] for entry in entries.values())
        report |= {"tokens": tokens, "tokens_per_forward": round(tokens / max(forwards, 1), 3)}
    return report


def score(bench: Bench) -> None:
    """Write the runs of all stages that have answers, and the summary."""
    known, runs = finished(bench.arguments.output), []
    for whole in chosen(bench.arguments):
        stage: Stage | None = whole
        if whole.name not in known:
            stage = begun(bench, whole)
        elif bench.evaluation(whole, scores=False).key(whole.params) != known[whole.name]["key"]:
            raise ValueError(f"{whole.name} was answered by another model, --dtype or data; expected the same here")
        if stage is None:
            continue
        evaluation = bench.evaluation(stage, scores=True)
        sweep = {name: getattr(stage.params, name) for name in stage.sweep}
        record = evaluation.find(stage.params) or evaluation.run(stage.params, sweep)
        (result,) = record["tasks"].values()
        path = evaluation.settings.output / result["samples_file"]
        samples = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        runs.append((stage, record, samples))
        print(json.dumps(row_of(stage, record, bench.arguments.times)), flush=True)
    pairs = [same_texts(bench, *pair) for pair in pairs_of(runs, "verified")]
    machine = runs[0][1] if runs else {}
    report = {
        "model": machine.get("model"),
        "environment": machine.get("environment"),
        "command": "python -m benchmarks.embedded_eval answer ...; python -m benchmarks.embedded_eval score ...",
        "verified_against_ar": pairs,
        "streaming_against_ar": [difference(*pair) for pair in pairs_of(runs, "streaming")],
        "points": [row_of(stage, record, bench.arguments.times) for stage, record, _ in runs],
    }
    bench.arguments.summary.parent.mkdir(parents=True, exist_ok=True)
    bench.arguments.summary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {bench.arguments.summary}")


def begun(bench: Bench, stage: Stage) -> Stage | None:
    """A run of the first questions of a stage that was cut short, up to one that has no answer, with their answers in
    its log. None if the stage has none, or scores likelihoods.

    Later answers are left out, because those that ended before others are the short ones.
    """
    evaluation = bench.evaluation(stage, scores=False)
    log = AnswerLog(evaluation.partial_path(evaluation.key(stage.params), stage.task))
    count = next(number for number in itertools.count() if "text" not in (log.find(number, 0) or {}))
    if count == 0:
        return None
    part = replace(stage, name=f"{stage.name} first {count}", limit=count)
    evaluation = bench.evaluation(part, scores=False)
    if evaluation.find(part.params) is None:
        kept = ({"doc_id": doc, "index": 0, **log.entries[doc, 0]} for doc in range(count))
        path = evaluation.partial_path(evaluation.key(part.params), part.task)
        write_json_lines(path, [*({"origin": origin} for origin in log.origins), *kept])
    return part


def row_of(stage: Stage, record: dict[str, Any], times: bool) -> dict[str, Any]:
    (result,) = record["tasks"].values()
    speed = {name: value for name, value in result["speed"].items() if times or name not in TIMES}
    kept = ("num_samples", "num_fewshot", "metric", "value", "stderr", "metrics")
    params = {"params": asdict(stage.params)} if result["kind"] == "generate" else {}
    facts = {"dtype": stage.dtype, "chat_template": stage.chat, **params}
    return {"stage": stage.name, "task": stage.task, **{k: result[k] for k in kept}, "speed": speed, **facts}


def pairs_of(runs: list[tuple], decoding: str) -> list[tuple]:
    """AR beside each run of that mode with questions of the same kind; of several, AR's largest run."""
    of_ar = [one for one in runs if one[0].params.decoding == "autoregressive"]
    ar = {one[0].asks: one for one in sorted(of_ar, key=lambda one: one[0].limit or math.inf)}
    modes = [one for one in runs if one[0].params.decoding == decoding and one[0].asks in ar]
    return [(ar[one[0].asks], one) for one in modes]


def difference(ar: tuple, streaming: tuple) -> dict[str, Any]:
    """Score less AR's, paired, in points with the half width of its 95 % interval."""
    stage, _, _ = streaming
    a, b = ([_sample(line) for line in one[2]] for one in (ar, streaming))
    pairs = compare_samples(a, b)
    return {
        "stage": stage.name,
        "task": stage.task,
        "questions": pairs.num_questions,
        "points": round(100 * pairs.difference, 2),
        "half_width": round(100 * pairs.half_width, 2),
        "only_ar_right": pairs.only_a,
        "only_streaming_right": pairs.only_b,
        "p_value": round(pairs.p_value, 4),
        "same_text": round(pairs.same_text, 3),
    }


def _sample(line: dict[str, Any]) -> Sample:
    return Sample(line["doc_id"], line["prompt"], line["target"], line["correct"], line["text"])


def same_texts(bench: Bench, ar: tuple, verified: tuple) -> dict[str, Any]:
    """How many answers have the same tokens, and where others part."""
    (stage, _, a), (_, _, b) = ar, verified
    both = {line["doc_id"] for line in a} & {line["doc_id"] for line in b}
    a, b = ([line for line in lines if line["doc_id"] in both] for lines in (a, b))
    differing = divergences(bench.llm(stage.dtype), a, b, stage.chat)
    return {
        "task": stage.task,
        "dtype": stage.dtype,
        "answers": len(a),
        "same": len(a) - len(differing),
        "tokens": sum(len(x["token_ids"]) for x in a),
        "largest_gap": max((one.gap for one in differing), default=None),
        "differing": [asdict(one) for one in differing],
    }


def chosen(arguments: argparse.Namespace) -> list[Stage]:
    """Those of the names asked for, with this run's data type and patience."""
    found = [stage for stage in stages() if not arguments.only or any(part in stage.name for part in arguments.only)]
    return [replace(one, seconds=one.seconds * arguments.patience, dtype=arguments.dtype or one.dtype) for one in found]


def pack(output: Path, archive: Path) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz", preset=1) as tar:
        tar.add(output, ".", filter=lambda one: None if one.name.endswith(".lock") else one)
    print(f"packed {archive}: {archive.stat().st_size / 2**20:.1f} MiB", flush=True)


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["answer", "score", "list"])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--seconds", type=float, default=560, help="answer: of everything, loading included")
    parser.add_argument("--only", action="append", help="stages with this in their names; may be repeated")
    parser.add_argument("--processes", type=int, default=1, help="answer: processes that run side by side")
    parser.add_argument("--limit", type=int, help="questions of a task, for a trial")
    parser.add_argument("--patience", type=float, default=1, help="answer: times each stage's own limit")
    parser.add_argument("--dtype", help="of all stages; by default float32, except where bfloat16 is what is measured")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--kv-cache-gb", type=float, default=8.0, help="of each process")
    parser.add_argument("--pack", type=Path, help="answer: put the output folder into this .tar.xz at the end")
    parser.add_argument("--summary", type=Path, default=Path("summary.json"), help="score: where to write")
    parser.add_argument(
        "--times",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="score: --no-times if other work ran beside",
    )
    arguments = parser.parse_args()
    if arguments.what == "list":
        for stage in chosen(arguments):
            print(f"{stage.name}: at most {stage.seconds} s")
    elif arguments.what == "score":
        score(Bench(arguments))
    else:
        answer_beside_each_other(arguments, began + arguments.seconds)


if __name__ == "__main__":
    main()
