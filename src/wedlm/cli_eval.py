# SPDX-License-Identifier: Apache-2.0
"""``wedlm eval``: options to runs, runs to a table."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from wedlm.cli_terminal import err, note, option, out, plain_errors, write

if TYPE_CHECKING:
    from wedlm.evaluate.caching_lm import Backend

WHAT, HOW, MODEL = "What to evaluate", "Decoding (default: the protocol's)", "Model and machine"


def evaluate(
    ctx: typer.Context,
    tasks: Annotated[str, option("Names with commas between: gsm8k,arc_e,...", WHAT)] = "",
    data_dir: Annotated[Path, option("Folder of the data files.", WHAT)] = Path("data"),
    output: Annotated[Path, option("Folder for results; what it has already is not run again.", WHAT)] = Path(
        "results"
    ),
    download: Annotated[Path | None, option("Fetch the public data files into this folder, and end.", WHAT)] = None,
    protocol: Annotated[str, option("default, or paper: the paper's decoding parameters.", WHAT)] = "default",
    sweep: Annotated[list[str] | None, option("key=value,value: a run for each value; repeated: a grid.", WHAT)] = None,
    limit: Annotated[int | None, option("Only the first N questions of each task.", WHAT)] = None,
    num_fewshot: Annotated[int | None, option("Examples in a prompt; default: each task's own.", WHAT)] = None,
    chat_template: Annotated[
        bool, option("Ask in the model's chat template, for instruct models.", WHAT, "--chat-template")
    ] = False,
    as_json: Annotated[bool, option("Print each run as one line of JSON instead of a table.", WHAT, "--json")] = (
        False
    ),
    answers_only: Annotated[
        bool,
        option("Answer, but do not score: the same call without this does.", WHAT, "--answers-only"),
    ] = False,
    decoding: Annotated[
        str | None, option("auto, verified, streaming, auto_streaming, block or autoregressive.", HOW)
    ] = None,
    window_size: Annotated[int | None, option("Positions of a window or block; rows of verified.", HOW)] = None,
    entropy_threshold: Annotated[str | None, option("Fill below this entropy (nats); none: one a forward.", HOW)] = (
        None
    ),
    pos_penalty: Annotated[float | None, option("Entropy added per position of distance.", HOW)] = None,
    draft_entropy: Annotated[float | None, option("Verified: draft up to the first row this uncertain.", HOW)] = None,
    temperature: Annotated[float | None, option("0 takes the most probable token.", HOW)] = None,
    top_p: Annotated[float | None, option("Sample from the smallest set with this probability.", HOW)] = None,
    top_k: Annotated[int | None, option("Sample from the k most probable tokens; 0: all.", HOW)] = None,
    seed: Annotated[int | None, option("Same seed, same answers.", HOW)] = None,
    max_tokens: Annotated[int | None, option("Cut answers after so many tokens.", HOW)] = None,
    engine: Annotated[str, option("wedlm, or vllm: its AR decoding, as a baseline.", MODEL)] = "wedlm",
    workers: Annotated[
        int | None, option("Replicas of the model by Ray, on this machine or a cluster; one GPU each.", MODEL)
    ] = None,
    model: Annotated[str, option("Checkpoint directory, .gguf file, hub id, 'demo' or 'demo-base'.", MODEL)] = "demo",
    adapter: Annotated[
        str | None, option("Directory of a LoRA, merged in; one of masked rows stays beside.", MODEL)
    ] = None,
    dtype: Annotated[str, option("auto, float32, bfloat16 or float16.", MODEL)] = "auto",
    device: Annotated[str, option("auto, cpu, cuda, cuda:1, ...", MODEL)] = "auto",
    max_model_len: Annotated[int | None, option("Longest prompt and answer together, in tokens.", MODEL)] = None,
    max_num_seqs: Annotated[int, option("Most sequences in one forward.", MODEL)] = 64,
    kv_cache_gb: Annotated[float | None, option("Key/value cache; default: what LLM takes.", MODEL)] = None,
    threads: Annotated[int | None, option("CPU threads; default: torch's choice.", MODEL)] = None,
    debug: Annotated[bool, option("Show the traceback of an error.", MODEL, "--debug")] = False,
) -> None:
    """Measure accuracy and speed on benchmarks, one decoding mode or a grid of parameters.

    \b
    Examples:
    wedlm eval --tasks gsm8k --data-dir ./data --limit 100 --chat-template --num-fewshot 0
    wedlm eval --tasks gsm8k,math500 --sweep decoding=streaming,verified --sweep window_size=8,16
    wedlm eval --tasks arc_c,hellaswag,mmlu --model ./my-checkpoint --protocol paper

    Generated code runs in a sandbox. A killed run goes on where it was. docs/evaluation.md has the tasks and the files.
    """
    with plain_errors(debug):
        if download is not None:
            run_download(download)
            return
        run_eval(ctx.params)


@contextmanager
def _needs_extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("wedlm"):
            raise
        raise ValueError(f"{error.name} is not installed; expected pip install 'wedlm[eval]'") from error


def run_download(directory: Path) -> None:
    """Fetch all public data files."""
    with _needs_extra():
        from wedlm.evaluate.download import download_all
    for name in download_all(directory):
        note(f"{directory / name} is there")


def run_eval(options: dict[str, Any]) -> None:
    """Evaluate the runs that the output folder lacks; print all of them. ValueError for a wrong option."""
    from wedlm.evaluate.settings import PARAM_NAMES, Settings, make_params, parse_sweep, parse_value

    settings = Settings(
        tasks=tuple(name.strip() for name in options["tasks"].split(",") if name.strip()),
        data_dir=Path(options["data_dir"]),
        output=Path(options["output"]),
        **{name: options[name] for name in ("protocol", "limit", "num_fewshot", "chat_template")},
    )
    chosen = {name: options[name] for name in PARAM_NAMES if options[name] is not None}
    if "entropy_threshold" in chosen:
        chosen["entropy_threshold"] = parse_value("entropy_threshold", chosen["entropy_threshold"])
    if options["engine"] == "vllm":
        chosen.setdefault("decoding", "autoregressive")
    base, grid = make_params(settings.protocol, chosen), parse_sweep(options["sweep"] or [])
    with err.status("Reading the questions ..."), _needs_extra():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's own bars; before its first import
        from wedlm.evaluate.run import Evaluation, load_tasks, sweep_params

        runs = sweep_params(base, grid)
        if options["engine"] == "vllm" and (other := {p.decoding for p, _ in runs} - {"autoregressive"}):
            raise ValueError(f"--decoding is {', '.join(sorted(other))}; expected autoregressive beside --engine vllm")
        tasks = load_tasks(settings, scores=not options["answers_only"])
    backend = _backend(options, max(params.max_rows for params, _ in runs))
    evaluation = Evaluation(backend, settings, tasks)
    records = []
    for number, (params, sweep) in enumerate(runs, start=1):
        record = evaluation.find(params)
        if record is None and options["answers_only"]:
            with _bar(f"Run {number} of {len(runs)}") as progress:
                evaluation.answer(params, progress)
            note(f"the answers of run {number} of {len(runs)} are in {settings.output}: {evaluation.key(params)}")
            continue
        if record is None:
            with _bar(f"Run {number} of {len(runs)}") as progress:
                record = evaluation.run(params, sweep, progress)
        else:
            note(f"run {number} of {len(runs)} is in {settings.output} already: {record['key']}")
        records.append(record)
        if options["as_json"]:
            write(json.dumps(record, ensure_ascii=False) + "\n")
    if records and not options["as_json"]:
        out.print(table(records))


def _backend(options: dict[str, Any], max_rows: int) -> "Backend":
    """The model on the engine that was asked for. ``max_rows``: of a sequence in a step. ValueError."""
    from wedlm.model import load_tokenizer

    if options["chat_template"] and not load_tokenizer(options["model"]).has_chat_template:
        raise ValueError(f"--chat-template is given, but {options['model']} has none; expected an instruct model")
    given = {name: options[name] for name in _LLM_OPTIONS}
    if options["kv_cache_gb"] is not None:
        given["kv_cache_bytes"] = int(options["kv_cache_gb"] * 1e9)
    if options["engine"] == "vllm":
        _refuse(options, ("adapter", "kv_cache_gb", "threads", "workers"), "--engine vllm")
        from wedlm.evaluate.vllm_lm import VllmBackend

        return VllmBackend(given)
    if options["engine"] != "wedlm":
        raise ValueError(f"--engine is {options['engine']}; expected wedlm or vllm")
    # So that a step holds the widest windows of all sequences.
    given["max_num_batched_tokens"] = max(2048, options["max_num_seqs"] * max_rows)
    if options["workers"] is not None:
        return _replicas(given, options["workers"], options["threads"])
    from wedlm.cli_generate import load_llm
    from wedlm.evaluate.harness import EngineBackend
    from wedlm.evaluate.provenance import model_provenance

    llm = load_llm(given | {"threads": options["threads"]})
    return EngineBackend(llm, model_provenance(llm, options["model"], options["adapter"]))


def _replicas(given: dict[str, Any], workers: int, threads: int | None) -> "Backend":
    if workers < 1:
        raise ValueError(f"--workers is {workers}; expected at least 1")
    if find_spec("ray") is None:
        raise ValueError("--workers needs ray, which is not installed; expected pip install 'wedlm[eval,workers]'")
    from wedlm.evaluate.workers import RayBackend

    with err.status(f"Loading {workers} replicas ..."):
        return RayBackend(given, workers, threads)


def _refuse(options: dict[str, Any], names: Sequence[str], beside: str) -> None:
    for name in names:
        if options[name] is not None:
            raise ValueError(f"--{name.replace('_', '-')} is {options[name]}; expected no such option beside {beside}")


_LLM_OPTIONS = ("model", "adapter", "dtype", "device", "max_model_len", "max_num_seqs")


@contextmanager
def _bar(title: str) -> Iterator[Any]:
    """A progress bar; yields what to call with a task, answers so far, and answers in all."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        shown: dict[str, Any] = {}

        def update(task: str, done: int, total: int) -> None:
            if task not in shown:
                shown[task] = bar.add_task(f"{title}: {task}", total=total)
            bar.update(shown[task], completed=done, total=total)

        yield update


def table(records: Sequence[dict[str, Any]]) -> Table:
    """A row per run and task; what the runs differ in comes first."""
    varied = list(dict.fromkeys(name for record in records for name in record["swept"]))
    view = Table(box=None, pad_edge=False)
    for name in [*varied, "task", "shots", "questions", "metric"]:
        view.add_column(name)
    for name in ("score", "tokens/forward", "p_cache", "speed"):
        view.add_column(name, justify="right")
    for record in records:
        for name, task in record["tasks"].items():
            own = ["none" if record["params"][key] is None else str(record["params"][key]) for key in varied]
            view.add_row(
                *own, name, str(task["num_fewshot"]), str(task["num_samples"]), task["metric"], *_figures(task)
            )
    return view


def _figures(task: dict[str, Any]) -> list[str]:
    error = "" if task["stderr"] is None else f" ± {100 * task['stderr']:.1f}"
    score, speed = f"{100 * task['value']:.1f}{error} %", task["speed"]
    if task["kind"] == "likelihood":
        return [score, "", "", f"{speed['samples_per_second']:.1f} questions/s"]
    forwards, cache = f"{speed['tokens_per_forward']:.2f}", f"{speed['p_cache']:.2f}"
    return [score, forwards, cache, f"{speed['tokens_per_second']:.0f} tok/s"]
