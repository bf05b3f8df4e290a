# SPDX-License-Identifier: Apache-2.0
"""``wedlm eval``: turns options into runs, and runs into a table."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wedlm.cli.loading import load_llm
from wedlm.cli.options import (
    MODEL,
    EngineOptions,
    KvCacheGb,
    ModelOptions,
    Only,
    command,
    option,
    values_of,
)
from wedlm.cli.reproduce import reproduce_tables
from wedlm.cli.terminal import err, needs_extra, note, progress_bar, write
from wedlm.extras import install_extras
from wedlm.tables import show_table

if TYPE_CHECKING:
    from wedlm.evaluate.caching_lm import Backend
    from wedlm.evaluate.run import Evaluation
    from wedlm.evaluate.settings import Params

WHAT, HOW = "What to evaluate", "Decoding (default: the protocol's)"


@dataclass(frozen=True, kw_only=True)
class WhatOptions:
    """The questions, and where answers go."""

    tasks: Annotated[str, option("Names with commas between: gsm8k,arc_e,...", WHAT)] = ""
    data_dir: Annotated[Path, option("Folder of the data files.", WHAT)] = Path("data")
    output: Annotated[Path, option("Folder for results; runs that it already has are skipped.", WHAT)] = Path("results")
    download: Annotated[Path | None, option("Fetch the public data files into this folder, and end.", WHAT)] = None
    protocol: Annotated[str, option("default, paper (asks and decodes like it) or paper-decoding.", WHAT)] = "default"
    sweep: Annotated[list[str] | None, option("key=value,value: a run for each value; repeat for a grid.", WHAT)] = None
    limit: Annotated[int | None, option("Only the first N questions of each task.", WHAT)] = None
    num_fewshot: Annotated[int | None, option("Examples in each prompt; default: the task's number.", WHAT)] = None
    chat_template: Annotated[
        bool, option("Ask in the model's chat template, for instruct models.", WHAT, "--chat-template")
    ] = False
    as_json: Annotated[bool, option("Print each run as one line of JSON instead of a table.", WHAT, "--json")] = False
    paper_tables: Annotated[
        bool, option("With reproduce: all sets of the paper's two quality tables.", WHAT, "--paper-tables")
    ] = False
    models: Annotated[
        str,
        option("With reproduce: NAME or NAME=base or NAME=instruct, commas between; default: the paper's.", WHAT),
    ] = ""
    answers_only: Annotated[
        bool,
        option("Answer only; the same call without this option scores.", WHAT, "--answers-only"),
    ] = False


@dataclass(frozen=True, kw_only=True)
class ParamOptions:
    """The fields of ``Params``; None takes the protocol's value."""

    decoding: Annotated[str | None, option("auto, verified, streaming, block or autoregressive.", HOW)] = None
    window_size: Annotated[int | None, option("Positions of a window or block; rows of verified.", HOW)] = None
    entropy_threshold: Annotated[str | None, option("Fill below this entropy (nats); none: one per forward.", HOW)] = (
        None
    )
    pos_penalty: Annotated[float | None, option("Entropy added per position of distance.", HOW)] = None
    next_token: Annotated[str | None, option("Streaming: masked or causal.", HOW)] = None
    draft_entropy: Annotated[float | None, option("Verified: draft up to the first row this uncertain.", HOW)] = None
    temperature: Annotated[float | None, option("0 takes the most probable token.", HOW)] = None
    top_p: Annotated[float | None, option("Sample from the smallest set with this probability.", HOW)] = None
    top_k: Annotated[int | None, option("Sample from the k most probable tokens; 0: all.", HOW)] = None
    seed: Annotated[int | None, option("Same seed, same answers.", HOW)] = None
    max_tokens: Annotated[int | None, option("Largest number of tokens of an answer.", HOW)] = None
    remasking_strategy: Annotated[
        str | None, option("Block: entropy, low_confidence_static or low_confidence_dynamic.", HOW)
    ] = None
    confidence_threshold: Annotated[float | None, option("Block, low_confidence_dynamic: fill above it.", HOW)] = None
    denoising_steps: Annotated[int | None, option("Block, low_confidence_...: most forwards per block.", HOW)] = None


@dataclass(frozen=True, kw_only=True)
class HostOptions:
    """What computes the answers: our engine in this process, replicas of it, or vLLM."""

    engine: Annotated[str, option("wedlm, or vllm: its AR decoding, as a baseline.", MODEL)] = "wedlm"
    workers: Annotated[
        int | None, option("Replicas of the model with Ray, on this machine or a cluster; one GPU each.", MODEL)
    ] = None
    kv_cache_gb: KvCacheGb = None


_ENGINE = (
    "adapter",
    "dtype",
    "quantization",
    "deterministic",
    "device",
    "tensor_parallel_size",
    "max_model_len",
    "block_length",
    "max_num_seqs",
    "gpu_memory_utilization",
    "cuda_graphs",
)

# Options that mean nothing beside reproduce, and their defaults.
_NOT_REPRODUCED = {"model": ModelOptions.model, "protocol": "default", "sweep": None, "answers_only": False}


@command
def evaluate(
    *,
    action: Annotated[
        str | None, typer.Argument(help="reproduce: the paper's tables.", metavar="reproduce", show_default=False)
    ] = None,
    what: WhatOptions,
    params: ParamOptions,
    host: HostOptions,
    model: ModelOptions,
    options: Annotated[EngineOptions, Only(*_ENGINE)],
) -> None:
    """Measure accuracy and speed on benchmarks, in one decoding mode or over a grid of parameters.

    \b
    Examples:
    wedlm eval --tasks gsm8k --data-dir ./data --limit 100 --chat-template --num-fewshot 0
    wedlm eval --tasks gsm8k,math500 --sweep decoding=streaming,verified --sweep window_size=8,16
    wedlm eval --tasks arc_c,hellaswag,mmlu --model ./my-checkpoint --protocol paper
    wedlm eval reproduce --paper-tables --data-dir ./data --workers 8

    Generated code runs in a sandbox. A killed run continues where it was. docs/evaluation.md describes the tasks.
    """
    if what.download is not None:
        run_download(what.download)
        if action is None:
            return
        what = replace(what, data_dir=what.download)
    if action is None:
        given = {"paper_tables": what.paper_tables or None, "models": what.models or None}
        _refuse(given, tuple(given), "wedlm eval without reproduce")
        if host.engine == "wedlm":
            params = _of_blocks(params, model.model, options.block_length)
        run_eval(what, params, host, lambda max_rows: _backend(what, host, model, options, max_rows))
        return
    if action != "reproduce" or not what.paper_tables:
        raise ValueError(f"the arguments begin with {action}; expected reproduce --paper-tables, or options alone")
    given = {name: value for name, value in (values_of(what) | values_of(model)).items() if name in _NOT_REPRODUCED}
    _refuse(
        {name: value if value != _NOT_REPRODUCED[name] else None for name, value in given.items()}, tuple(given), action
    )

    def record_of(name: str, tasks: str, decoding: str | None) -> dict[str, Any]:
        own, asked = replace(model, model=name), replace(what, tasks=tasks, protocol="paper")
        (record,) = run_eval(
            asked,
            _of_blocks(replace(params, decoding=decoding), name, options.block_length),
            host,
            lambda max_rows: _backend(asked, host, own, options, max_rows),
        )
        return record

    places = (what.data_dir, what.output)
    reproduce_tables(names_of(what.models), names_of(what.tasks), *places, params.decoding, record_of)


def _of_blocks(params: ParamOptions, model: str, block_length: int | None) -> ParamOptions:
    """The parameters for this checkpoint. One that sees by blocks decodes by those, and by probability, unless other
    parameters are given."""
    from wedlm.model.formats.checkpoint import open_checkpoint

    config = open_checkpoint(model).config
    if not config.sees_by_block:
        return params
    own: dict[str, Any] = {
        "decoding": "block",
        "window_size": block_length or config.block_size,
        "remasking_strategy": "low_confidence_dynamic",
    }
    return replace(params, **{name: value for name, value in own.items() if getattr(params, name) is None})


def run_download(directory: Path) -> None:
    """Fetch all public data files."""
    with needs_extra("eval"):
        from wedlm.evaluate.download import download_all
    for name in download_all(directory):
        note(f"{directory / name} is there")


def names_of(text: str) -> list[str]:
    """Split names at commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def run_eval(
    what: WhatOptions, params: ParamOptions, host: HostOptions, load: Callable[[int], "Backend"]
) -> list[dict[str, Any]]:
    """Evaluate the runs that the output folder lacks; print and return all runs. Raises ValueError for a wrong option.

    ``load`` loads the model, given the most rows of a sequence per step.
    """
    from wedlm.evaluate.settings import Settings, protocol_tasks

    settings = Settings(
        tasks=protocol_tasks(what.protocol, names_of(what.tasks)),
        data_dir=what.data_dir,
        output=what.output,
        protocol=what.protocol,
        limit=what.limit,
        num_fewshot=what.num_fewshot,
        chat_template=what.chat_template,
    )
    grid = _grid(what, params, host.engine)
    with err.status("Reading the questions ..."), needs_extra("eval"):
        from wedlm.evaluate.run import Evaluation, load_tasks, sweep_params

        runs = sweep_params(*grid)
        if host.engine == "vllm" and (other := {p.decoding for p, _ in runs} - {"autoregressive"}):
            raise ValueError(f"--decoding is {', '.join(sorted(other))}; expected autoregressive with --engine vllm")
        tasks = load_tasks(settings, scores=not what.answers_only)
    evaluation = Evaluation(load(max(run.max_rows for run, _ in runs)), settings, tasks)
    records = []
    for number, (run, sweep) in enumerate(runs, start=1):
        title = f"run {number} of {len(runs)}"
        record = _record(evaluation, run, sweep, title, what.answers_only)
        if record is None:
            continue
        records.append(record)
        if what.as_json:
            write(json.dumps(record, ensure_ascii=False) + "\n")
    if records and not what.as_json:
        show_records(records)
    return records


def _grid(what: WhatOptions, params: ParamOptions, engine: str) -> tuple["Params", list[dict[str, Any]]]:
    """The protocol's parameters with those that were given, and the swept ones. Raises ValueError."""
    from wedlm.evaluate.settings import make_params, parse_sweep, parse_value

    chosen = {name: value for name, value in values_of(params).items() if value is not None}
    if "entropy_threshold" in chosen:
        chosen["entropy_threshold"] = parse_value("entropy_threshold", chosen["entropy_threshold"])
    if engine == "vllm":
        chosen.setdefault("decoding", "autoregressive")
    return make_params(what.protocol, chosen), parse_sweep(what.sweep or [])


def _record(
    evaluation: "Evaluation", params: "Params", sweep: Mapping[str, Any], title: str, answers_only: bool
) -> dict[str, Any] | None:
    """The run's results, from the folder or newly evaluated; None if it was only answered."""
    folder, record = evaluation.settings.output, evaluation.find(params)
    if record is not None:
        note(f"{title} is in {folder} already: {record['key']}")
        return record
    with _bar(title.capitalize()) as progress:
        if not answers_only:
            return evaluation.run(params, sweep, progress)
        evaluation.answer(params, progress)
    note(f"the answers of {title} are in {folder}: {evaluation.key(params)}")
    return None


def _backend(
    what: WhatOptions, host: HostOptions, model: ModelOptions, options: EngineOptions, max_rows: int
) -> "Backend":
    """The model on the requested engine. ``max_rows``: the most rows of a sequence per step. Raises ValueError."""
    from wedlm.model import load_tokenizer

    if what.chat_template and not load_tokenizer(model.model).has_chat_template:
        raise ValueError(f"--chat-template is given, but {model.model} has none; expected an instruct model")
    if host.engine == "vllm":
        given = {"adapter": options.adapter, "threads": model.threads}
        _refuse(given | values_of(host), ("adapter", "kv_cache_gb", "threads", "workers"), "--engine vllm")
        from wedlm.evaluate.vllm_lm import VllmBackend

        return VllmBackend({"model": model.model} | {name: getattr(options, name) for name in _ENGINE})
    if host.engine != "wedlm":
        raise ValueError(f"--engine is {host.engine}; expected wedlm or vllm")
    # So that a step holds the widest windows of all sequences.
    rows = max(options.max_num_batched_tokens, options.max_num_seqs * max_rows)
    cache = None if host.kv_cache_gb is None else int(host.kv_cache_gb * 1e9)
    options = replace(options, max_num_batched_tokens=rows, kv_cache_bytes=cache)
    if host.workers is not None:
        return _replicas({"model": model.model, **dataclasses.asdict(options)}, host.workers, model.threads)
    from wedlm.evaluate.harness import EngineBackend
    from wedlm.evaluate.provenance import model_provenance

    llm = load_llm(model, options)
    return EngineBackend(llm, model_provenance(llm, model.model, options.adapter))


def _replicas(given: dict[str, Any], workers: int, threads: int | None) -> "Backend":
    if workers < 1:
        raise ValueError(f"--workers is {workers}; expected at least 1")
    if find_spec("ray") is None:
        raise ValueError("--workers needs ray, which is not installed; expected " + install_extras("eval", "workers"))
    from wedlm.evaluate.workers import RayBackend

    with err.status(f"Loading {workers} replicas ..."):
        return RayBackend(given, workers, threads)


def _refuse(options: Mapping[str, Any], names: Sequence[str], beside: str) -> None:
    for name in names:
        if options[name] is not None:
            raise ValueError(f"--{name.replace('_', '-')} is {options[name]}; expected no such option with {beside}")


@contextmanager
def _bar(title: str) -> Iterator[Any]:
    """A progress bar; yields the function to call with a task, answers so far, and answers in all."""
    with progress_bar(err.is_terminal) as bar:
        shown: dict[str, Any] = {}

        def update(task: str, done: int, total: int) -> None:
            if task not in shown:
                shown[task] = bar.add_task(f"{title}: {task}", total=total)
            bar.update(shown[task], completed=done, total=total)

        yield update


def show_records(records: Sequence[dict[str, Any]]) -> None:
    """Print a row for each run and task; the parameters in which runs differ come first."""
    varied = list(dict.fromkeys(name for record in records for name in record["swept"]))
    rows = []
    for record in records:
        own = ["none" if record["params"][key] is None else str(record["params"][key]) for key in varied]
        for name, task in record["tasks"].items():
            about = (name, str(task["num_fewshot"]), str(task["num_samples"]), task["metric"])
            rows.append([*own, *about, *_figures(task)])
    figures = ("shots", "questions", "metric", "score", "tokens/forward", "p_cache", "speed")
    show_table(None, [*varied, "task"], figures, rows)


def _figures(task: dict[str, Any]) -> list[str]:
    error = "" if task["stderr"] is None else f" ± {100 * task['stderr']:.1f}"
    score, speed = f"{100 * task['value']:.1f}{error} %", task["speed"]
    if task["kind"] == "likelihood":
        return [score, "", "", f"{speed['samples_per_second']:.1f} questions/s"]
    forwards, cache = f"{speed['tokens_per_forward']:.2f}", f"{speed['p_cache']:.2f}"
    return [score, forwards, cache, f"{speed['tokens_per_second']:.0f} tok/s"]
