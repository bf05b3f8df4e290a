# SPDX-License-Identifier: Apache-2.0
"""The embedded model's whole table and sweeps on one GPU, in order of importance, within a time limit; resumable.

    python -m benchmarks.embedded_eval answer --data-dir ./data --output RESULTS --seconds 560 --pack answers.tar.xz
    python -m benchmarks.embedded_eval score --data-dir ./data --output RESULTS --summary summary.json

``answer`` only answers (generated texts and likelihoods), which is what needs the GPU; a stage that its limit or the
whole limit cuts short goes on in the next call. ``score`` scores the finished stages, on any machine: it runs the
generated code, compares verified with AR decoding, and writes one summary. Everything in between is in the output
folder (``--pack`` puts it into one archive, whatever happens; unpack it there to go on).

One process does not fill a GPU at this size: N of them with ``--share 0/N`` to ``--share N-1/N`` take turns of stages,
each with an output folder and an archive of its own; unpacked into one folder these are scored together.
"""

import argparse
import json
import os
import signal
import sys
import tarfile
import time
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's own bars; before tqdm's first import


from wedlm import LLM
from wedlm.engine.factory import release_memory
from wedlm.evaluate.answer_log import AnswerLog
from wedlm.evaluate.divergence import divergences
from wedlm.evaluate.harness import EngineBackend
from wedlm.evaluate.provenance import model_provenance
from wedlm.evaluate.run import Evaluation, load_tasks
from wedlm.evaluate.settings import Params, Settings

MODES = {
    "ar": Params(decoding="autoregressive"),
    "verified": Params(decoding="verified"),
    "streaming": Params(decoding="streaming"),
}
GENERATED = ("gsm8k", "humaneval", "mbpp", "math500", "humaneval_plus", "mbpp_plus")
LIKELIHOODS = ("arc_c", "arc_e", "hellaswag", "mmlu")
THRESHOLDS = (0.4, None, 0.2, 0.6, 0.8, 0.1, 0.3, 0.5, 0.7, 0.9)
PENALTIES = (0.02, 0.0, 0.05, 0.1, 0.01, 0.2)
SWEEP_QUESTIONS, SWEEP_TOKENS = 256, 256


@dataclass(frozen=True)
class Stage:
    """A run of one task. ``seconds``: it is left for later after so long. ``folder``: under the output folder."""

    name: str
    folder: str
    task: str
    params: Params
    seconds: int
    sweep: tuple[str, ...] = ()
    limit: int | None = None
    num_fewshot: int | None = None
    chat: bool = True
    dtype: str = "float32"


def stages() -> list[Stage]:
    """All, the most important first."""
    found = []
    for task in GENERATED:
        limits = {"ar": 120, "verified": 120, "streaming": 180}
        for mode, params in MODES.items():
            found.append(Stage(f"{task} {mode}", "table", task, params, limits[mode], num_fewshot=0))
    found += [Stage(task, "table", task, MODES["ar"], 180) for task in LIKELIHOODS]
    sweep = {"limit": SWEEP_QUESTIONS, "num_fewshot": 0}
    short = replace(MODES["streaming"], max_tokens=SWEEP_TOKENS)
    for threshold in THRESHOLDS:
        for mode in ("streaming", "block"):
            params = replace(short, decoding=mode, entropy_threshold=threshold)
            varied = ("decoding", "entropy_threshold")
            found.append(Stage(f"threshold {threshold} {mode}", "sweeps", "gsm8k", params, 60, varied, **sweep))
    for penalty in PENALTIES:
        params = replace(short, pos_penalty=penalty)
        found.append(Stage(f"penalty {penalty}", "sweeps", "gsm8k", params, 60, ("pos_penalty",), **sweep))
    for mode in ("ar", "verified"):
        params = replace(MODES[mode], max_tokens=SWEEP_TOKENS)
        found.append(Stage(f"{mode} beside the sweeps", "sweeps", "gsm8k", params, 60, ("decoding",), **sweep))
    for mode in ("ar", "verified"):
        name = f"gsm8k {mode} bfloat16"
        found.append(Stage(name, "bfloat16", "gsm8k", MODES[mode], 60, num_fewshot=0, dtype="bfloat16"))
    paper = replace(MODES["streaming"], window_size=6, pos_penalty=0.1, entropy_threshold=None, temperature=0.1)
    for task in ("gsm8k", "humaneval"):
        found.append(Stage(f"{task} as the paper", "paper", task, paper, 120, num_fewshot=0))
    return found


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
            chat_template=stage.chat,
        )
        key = stage.task, stage.num_fewshot, stage.chat, scores
        if key not in self._tasks:
            self._tasks[key] = load_tasks(settings, scores)
        llm = self.llm(stage.dtype)
        backend = EngineBackend(llm, model_provenance(llm, self.arguments.model, None))
        return Evaluation(backend, settings, self._tasks[key])


def finished(output: Path) -> dict[str, dict[str, Any]]:
    """What is known of finished stages, of all shares, by name."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(output.glob("stages*.json")):
        found |= json.loads(path.read_text(encoding="utf-8"))
    return found


def read_share(text: str) -> tuple[int, int]:
    """(i, n) of I/N."""
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise argparse.ArgumentTypeError(f"it is {text!r}; expected I/N with I from 0 to N - 1")
    return int(first), int(second)


def answer(bench: Bench, deadline: float) -> None:
    """Run the stages that are not finished; one JSON line for each."""
    output = bench.arguments.output
    output.mkdir(parents=True, exist_ok=True)
    done = finished(output)
    index, count = bench.arguments.share
    kept = output / ("stages.json" if count == 1 else f"stages-{index}-of-{count}.json")
    for stage in [one for one in chosen(bench.arguments) if one.name not in done]:
        if deadline - time.monotonic() < 5:
            print(json.dumps({"stage": stage.name, "ended": "no time left"}), flush=True)
            return
        try:
            done[stage.name] = answer_one(bench, stage, deadline)
        except OutOfTime as error:
            print(json.dumps({"stage": stage.name, "ended": str(error)}), flush=True)
            continue
        except Exception:  # the stages after it may be well
            traceback.print_exc()
            print(json.dumps({"stage": stage.name, "ended": "error"}), flush=True)
            continue
        kept.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
        print(json.dumps({"stage": stage.name, **done[stage.name]}), flush=True)


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
    """Write the runs of all finished stages, and the summary."""
    known, runs = finished(bench.arguments.output), []
    for stage in [one for one in chosen(bench.arguments) if one.name in known]:
        evaluation = bench.evaluation(stage, scores=True)
        sweep = {name: getattr(stage.params, name) for name in stage.sweep}
        if evaluation.key(stage.params) != known[stage.name]["key"]:
            raise ValueError(f"{stage.name} was answered by another model, --dtype or data; expected the same here")
        record = evaluation.find(stage.params) or evaluation.run(stage.params, sweep)
        (result,) = record["tasks"].values()
        path = evaluation.settings.output / result["samples_file"]
        samples = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        runs.append((stage, record, samples))
        print(json.dumps(row_of(stage, record)), flush=True)
    pairs = [same_texts(bench, *pair) for pair in pairs_of(runs)]
    machine = runs[0][1] if runs else {}
    report = {
        "model": machine.get("model"),
        "environment": machine.get("environment"),
        "command": "python -m benchmarks.embedded_eval answer ...; python -m benchmarks.embedded_eval score ...",
        "verified_against_ar": pairs,
        "points": [row_of(stage, record) for stage, record, _ in runs],
    }
    bench.arguments.summary.parent.mkdir(parents=True, exist_ok=True)
    bench.arguments.summary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {bench.arguments.summary}")


def row_of(stage: Stage, record: dict[str, Any]) -> dict[str, Any]:
    (result,) = record["tasks"].values()
    kept = ("num_samples", "num_fewshot", "metric", "value", "stderr", "metrics")
    params = {"params": asdict(stage.params)} if result["kind"] == "generate" else {}
    facts = {"dtype": stage.dtype, "chat_template": stage.chat, **params}
    return {"stage": stage.name, "task": stage.task, **{k: result[k] for k in kept}, "speed": result["speed"], **facts}


def pairs_of(runs: list) -> list[tuple]:
    """AR beside verified decoding of the same task and data type."""
    by_name = {(stage.task, stage.folder, stage.dtype, stage.params.decoding): one for one in runs for stage in one[:1]}
    return [
        (one, by_name[task, folder, dtype, "verified"])
        for (task, folder, dtype, decoding), one in by_name.items()
        if decoding == "autoregressive" and (task, folder, dtype, "verified") in by_name
    ]


def same_texts(bench: Bench, ar: tuple, verified: tuple) -> dict[str, Any]:
    """How many answers have the same tokens, and where others part."""
    (stage, _, a), (_, _, b) = ar, verified
    differing = divergences(bench.llm(stage.dtype), a, b, stage.chat)
    return {
        "task": stage.task,
        "folder": stage.folder,
        "dtype": stage.dtype,
        "answers": len(a),
        "same": len(a) - len(differing),
        "tokens": sum(len(x["token_ids"]) for x in a),
        "largest_gap": max((one.gap for one in differing), default=None),
        "differing": [asdict(one) for one in differing],
    }


def chosen(arguments: argparse.Namespace) -> list[Stage]:
    """Those of the names asked for, with this run's data type and patience."""
    found = [stage for stage in stages() if arguments.only is None or arguments.only in stage.name]
    index, count = arguments.share
    found = found[index::count]
    return [replace(one, seconds=one.seconds * arguments.patience, dtype=arguments.dtype or one.dtype) for one in found]


def pack(output: Path, archive: Path) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz", preset=1) as tar:
        tar.add(output, ".")
    print(f"packed {archive}: {archive.stat().st_size / 2**20:.1f} MiB", flush=True)


def main() -> None:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["answer", "score", "list"])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--seconds", type=float, default=560, help="answer: of everything, loading included")
    parser.add_argument("--only", help="stages with this in their names")
    parser.add_argument("--share", type=read_share, default=(0, 1), metavar="I/N", help="every N-th stage, from I on")
    parser.add_argument("--limit", type=int, help="questions of a task, for a trial")
    parser.add_argument("--patience", type=float, default=1, help="answer: times each stage's own limit")
    parser.add_argument("--dtype", help="of all stages; by default float32, except where bfloat16 is what is measured")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--kv-cache-gb", type=float, default=24.0)
    parser.add_argument("--pack", type=Path, help="answer: put the output folder into this .tar.xz at the end")
    parser.add_argument("--summary", type=Path, default=Path("summary.json"), help="score: where to write")
    arguments = parser.parse_args()
    bench = Bench(arguments)
    if arguments.what == "list":
        for stage in chosen(arguments):
            print(f"{stage.name}: at most {stage.seconds} s")
    elif arguments.what == "score":
        score(bench)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            answer(bench, began + arguments.seconds)
        finally:
            if arguments.pack is not None:
                pack(arguments.output, arguments.pack)


if __name__ == "__main__":
    main()
