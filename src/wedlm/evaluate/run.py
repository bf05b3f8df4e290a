# SPDX-License-Identifier: Apache-2.0
"""Run a model with one set of parameters on some tasks, and write a ``point-<key>.json`` and files of samples.

docs/evaluation.md describes the files.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from wedlm.evaluate.answer_log import AnswerLog
from wedlm.evaluate.caching_lm import Backend, CachingLM, GenerationSettings, StopEvaluation
from wedlm.evaluate.code_tasks import check_sandbox
from wedlm.evaluate.data import digest
from wedlm.evaluate.provenance import now
from wedlm.evaluate.settings import TASKS_DIRECTORY, Params, Settings
from wedlm.model.formats.save import write_whole

FORMAT = 1
Progress = Callable[[str, int, int], None]  # task, answers so far, answers in all
Record = dict[str, Any]


def load_tasks(settings: Settings, scores: bool = True) -> dict[str, Any]:
    """The harness's task objects by name, with their questions read. Raises ValueError if a data file is missing or
    malformed, or if a task needs to run code and that is impossible here, unless nothing will be scored (``scores``).
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about choices that the task files make
    _keep_compiled_templates()
    metadata = {"data_dir": str(settings.data_dir), "chat": settings.chat_template}
    manager = TaskManager(include_path=str(TASKS_DIRECTORY), include_defaults=False, metadata=metadata)
    tasks = manager.load(list(settings.tasks))["tasks"]
    if scores and any((task.config.metadata or {}).get("runs_code") for task in tasks.values()):
        check_sandbox()
    for task in tasks.values():
        if settings.num_fewshot is not None:
            task.set_config(key="num_fewshot", value=settings.num_fewshot)
        task.set_fewshot_seed(seed=0)
    return tasks


@cache
def _keep_compiled_templates() -> None:
    """Cache compiled templates, because the harness compiles a prompt's template again for every question, which takes
    longer than a GPU's answer."""
    utils.env.from_string = lru_cache(maxsize=256)(utils.env.from_string)


@dataclass(frozen=True)
class Evaluation:
    """A model, ready to run on tasks with different parameters."""

    backend: Backend
    settings: Settings
    tasks: Mapping[str, Any]

    def key(self, params: Params) -> str:
        """16 hexadecimal digits: a digest of everything that can change an answer or a score."""
        model = self.backend.provenance
        facts: Record = {
            "format": FORMAT,
            "model": [model.hash, model.dtype, self.backend.max_length],
            "params": params.record(),
            "tasks": {name: [_version(task), self._num_fewshot(task)] for name, task in self.tasks.items()},
            "data": {name: [digest(task.dataset["test"]), digest(_shots(task))] for name, task in self.tasks.items()},
            "chat_template": self.settings.chat_template,
            "limit": self.settings.limit,
        }
        if model.engine != "wedlm":
            facts["engine"] = model.engine
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def find(self, params: Params) -> Record | None:
        """The run's record, if the output folder has it."""
        path = self._run_path(self.key(params))
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def run(self, params: Params, sweep: Mapping[str, Any], progress: Progress = lambda *_: None) -> Record:
        """Evaluate a run, continuing where a killed process left it, and write its files."""
        key, logs = self.key(params), self._logs(params)
        lm = self.backend.lm(self._generation(params, logs, progress))
        tasks = {name: self._run_task(key, name, lm, logs[name]) for name in self.tasks}
        device, machine = _origin(logs.values())
        record = {
            "format": FORMAT,
            "key": key,
            "model": {**asdict(self.backend.provenance), "device": device},
            "params": params.record(),
            "swept": dict(sweep),
            "protocol": self.settings.protocol,
            "chat_template": self.settings.chat_template,
            "limit": self.settings.limit,
            "num_fewshot": self.settings.num_fewshot,
            "tasks": tasks,
            "environment": machine,
            "created": now(),
        }
        _write(self._run_path(key), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        for log in logs.values():
            log.discard()
        return record

    def answer(self, params: Params, progress: Progress = lambda *_: None) -> None:
        """Compute the answers that the logs lack, and score nothing; ``run`` does that, on this machine or another."""
        logs = self._logs(params)
        lm = self.backend.lm(self._generation(params, logs, progress, answers_only=True))
        for task in self.tasks.values():
            with suppress(StopEvaluation):
                self._evaluate(task, lm)

    def _logs(self, params: Params) -> dict[str, AnswerLog]:
        self.settings.output.mkdir(parents=True, exist_ok=True)
        origin = {"device": self.backend.provenance.device, "environment": self.backend.environment}
        key = self.key(params)
        return {name: AnswerLog(self.partial_path(key, name), origin) for name in self.tasks}

    def _generation(
        self, params: Params, logs: Mapping[str, AnswerLog], progress: Progress, answers_only: bool = False
    ) -> GenerationSettings:
        decoding, chat = params.sampling_params(), self.settings.chat_template
        return GenerationSettings(decoding, chat, logs.__getitem__, progress, answers_only)

    def _evaluate(self, task: Any, lm: CachingLM) -> Any:
        """The harness's results; raises ``StopEvaluation`` if ``lm`` only answers."""
        return evaluate(
            lm=lm,
            task_dict={"tasks": {task.config.task: task}, "groups": {}},
            limit=self.settings.limit,
            bootstrap_iters=1000,  # every metric has a closed form; 0 would leave the errors out
            apply_chat_template=self.settings.chat_template,
            fewshot_as_multiturn=True,
        )

    def _run_task(self, key: str, name: str, lm: CachingLM, log: AnswerLog) -> Record:
        """Evaluate one task, write its samples, and describe it for the run's file."""
        task = self.tasks[name]
        results = self._evaluate(task, lm)
        metrics = _metrics(results["results"][name])
        main = (task.config.metadata or {}).get("main_metric") or next(iter(metrics))
        generates = task.OUTPUT_TYPE == "generate_until"
        samples = [_sample(task, sample, log, main) for sample in sorted(results["samples"][name], key=_document_index)]
        path = self.settings.output / f"samples-{key}-{name}.jsonl"
        _write(path, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))
        return {
            "version": _version(task),
            "kind": "generate" if generates else "likelihood",
            "num_fewshot": self._num_fewshot(task),
            "shots_from": task.dataset["test"].source if self._num_fewshot(task) else None,
            "num_samples": len(samples),
            "metric": main,
            **metrics[main],
            "metrics": metrics,
            "speed": _generation_speed(samples) if generates else _likelihood_speed(samples, log),
            "samples_file": path.name,
        }

    def _num_fewshot(self, task: Any) -> int:
        return int(task.config.num_fewshot or 0)

    def _run_path(self, key: str) -> Path:
        return self.settings.output / f"point-{key}.json"

    def partial_path(self, key: str, task: str) -> Path:
        """The file with the answers of an unfinished run."""
        return self.settings.output / f"samples-{key}-{task}.jsonl.partial"


def sweep_params(base: Params, runs: Sequence[Mapping[str, Any]]) -> list[tuple[Params, Mapping[str, Any]]]:
    """The parameters of each run of a grid, and which of them the grid varied."""
    return [(replace(base, **run), run) for run in runs]


def _version(task: Any) -> float:
    return float(task.config.metadata["version"])


def _shots(task: Any) -> list[Record]:
    return task.dataset["test"].shots


def _document_index(sample: Record) -> int:
    return sample["doc_id"]


def _origin(logs: Iterable[AnswerLog]) -> tuple[str, Record]:
    """Device and environment of the latest answers, with all names if several devices took part."""
    origins = [origin for log in logs for origin in log.origins]
    latest = origins[-1]
    names = dict.fromkeys(origin["environment"]["device_name"] for origin in origins)
    return latest["device"], {**latest["environment"], "device_name": ", ".join(names)}


def _metrics(results: Mapping[str, Any]) -> dict[str, Record]:
    """The metrics, which the harness names ``acc,none`` and ``acc_stderr,none``; numbers only."""
    found: dict[str, Record] = {}
    for name, value in results.items():
        metric, comma, filter_name = name.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = results.get(f"{metric}_stderr,{filter_name}")
            known = isinstance(stderr, int | float) and math.isfinite(stderr)
            found[metric] = {"value": float(value), "stderr": float(stderr) if known else None}  # type: ignore[arg-type]
    return found


def _sample(task: Any, sample: Record, log: AnswerLog, main: str) -> Record:
    """A line of the samples file."""
    entries = log.of_document(sample["doc_id"])
    arguments, values = sample["arguments"], {name: float(sample[name]) for name in sample["metrics"]}
    record = {
        "doc_id": sample["doc_id"],
        "prompt": arguments[0][0],
        "target": str(sample["target"]),
        "metrics": values,
        "correct": values[main] == 1,
    }
    if task.OUTPUT_TYPE == "generate_until":
        return {**record, **entries[0]}
    choices = [continuation for _, continuation in arguments]
    if len({context for context, _ in arguments}) > 1:  # the choices are in the contexts
        record["prompt"], choices = "", [context + continuation for context, continuation in arguments]
    logprobs = [entry["logprob"] for entry in entries]
    gold = sample["doc"]["gold"]
    return {
        **record,
        "target": choices[gold],
        "choices": choices,
        "logprobs": logprobs,
        "greedy": [entry["greedy"] for entry in entries],
        "chosen": max(range(len(logprobs)), key=logprobs.__getitem__),
        "seconds": sum(entry["seconds"] for entry in entries),
    }


def _generation_speed(samples: Sequence[Record]) -> Record:
    tokens = sum(len(sample["token_ids"]) for sample in samples)
    forwards, rows = sum(sample["forwards"] for sample in samples), sum(sample["rows"] for sample in samples)
    seconds = sum(sample["seconds"] for sample in samples)
    return {
        "num_tokens": tokens,
        "num_forwards": forwards,
        "num_rows": rows,
        "tokens_per_forward": tokens / forwards if forwards else 0.0,
        "p_cache": tokens / rows if rows else 0.0,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else 0.0,
        "num_cut": sum(sample["finish_reason"] == "length" for sample in samples),
    }


def _likelihood_speed(samples: Sequence[Record], log: AnswerLog) -> Record:
    seconds = sum(sample["seconds"] for sample in samples)
    entries = log.entries.values()
    return {
        "seconds": seconds,
        "samples_per_second": len(samples) / seconds if seconds else 0.0,
        "num_computed_tokens": sum(entry["computed"] for entry in entries),
        "num_reused_tokens": sum(entry["reused"] for entry in entries),
    }


def _write(path: Path, text: str) -> None:
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
