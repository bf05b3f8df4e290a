# SPDX-License-Identifier: Apache-2.0
"""``wedlm bench``: options to a run, a run to a table, a file and figures."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wedlm.cli_terminal import note, option, plain_errors, write

if TYPE_CHECKING:
    from wedlm.bench.settings import Settings
    from wedlm.bench.stats import Row

WHAT, MUCH, HOW, MODEL = "What to measure", "How much", "Decoding", "Model and machine"


def bench(
    ctx: typer.Context,
    parts: Annotated[
        list[str] | None,
        typer.Argument(
            help="latency throughput serving (default) steps accept pairs prefill host contexts scenarios; or all",
            metavar="[PART]...",
        ),
    ] = None,
    against: Annotated[str | None, option("vllm: its AR on the same weights, first, where it is installed.", WHAT)] = (
        None
    ),
    accept: Annotated[
        list[str] | None,
        option("accept: share of drafts accepted by depth, as 0.78,0.72,0.64; may be repeated.", WHAT),
    ] = None,
    evaluation: Annotated[
        Path | None, option("Folder of wedlm eval: also draw its speed against quality over τ.", WHAT)
    ] = None,
    output: Annotated[Path | None, option("Folder for bench.json and plots, written after each part.", WHAT)] = None,
    show: Annotated[Path | None, option("Show, and draw, the run in this folder; measure nothing.", WHAT)] = None,
    plots: Annotated[bool, option("Draw figures into --output (needs matplotlib).", WHAT, "--plots/--no-plots")] = True,
    budget_s: Annotated[float | None, option("Begin nothing new after so many seconds.", MUCH)] = None,
    batches: Annotated[str | None, option("Batch sizes with commas between. [GPU 1,8,32,64,128; CPU 1,4]", MUCH)] = (
        None
    ),
    runs: Annotated[int | None, option("Runs of each case. [3]", MUCH)] = None,
    pairs: Annotated[int | None, option("Pairs of auto and AR. [10]", MUCH)] = None,
    steps: Annotated[int | None, option("Steps of a run with a fixed batch. [GPU 60; CPU 16]", MUCH)] = None,
    answer: Annotated[int | None, option("Most tokens of an answer. [GPU 128; CPU 48]", MUCH)] = None,
    prompt: Annotated[
        int | None, option("Tokens of a prompt. [the question's; random weights: GPU 512, CPU 64]", MUCH)
    ] = None,
    requests: Annotated[int | None, option("Requests that arrive. [GPU 96; CPU 8]", MUCH)] = None,
    rate: Annotated[float | None, option("Requests a second; default: 0.7 of what AR can serve.", MUCH)] = None,
    contexts: Annotated[str | None, option("Context lengths. [GPU 512,4096,16384,32000; CPU 128,512]", MUCH)] = None,
    long_prompt: Annotated[int | None, option("Tokens of prefill's prompt. [GPU 8192; CPU 1024]", MUCH)] = None,
    modes: Annotated[
        str | None, option("Modes with commas between. [all; random weights: those of AR's text]", HOW)
    ] = (None),
    window_size: Annotated[int | None, option("Positions of a window or block; most rows a forward. [16]", HOW)] = None,
    entropy_threshold: Annotated[str, option("Streaming, block: fill below this entropy (nats); none.", HOW)] = "0.4",
    pos_penalty: Annotated[float, option("Streaming, block: entropy added per position of distance.", HOW)] = 0.02,
    draft_entropy: Annotated[float, option("Verified: draft up to the first row this uncertain.", HOW)] = 2.5,
    model: Annotated[
        str | None, option("Checkpoint directory, .gguf file, hub id, 'demo' or 'demo-base'. [demo]", MODEL)
    ] = None,
    shape: Annotated[str | None, option("Random weights instead: qwen3-8b, smollm2-135m or tiny.", MODEL)] = None,
    adapter: Annotated[str | None, option("Directory of a LoRA in peft's format, merged in.", MODEL)] = None,
    dtype: Annotated[str, option("auto, float32, bfloat16 or float16.", MODEL)] = "auto",
    quantization: Annotated[
        str | None, option("int8 or fp8: the layers' weights in eight bits, for GPUs; not vLLM's.", MODEL)
    ] = None,
    device: Annotated[str, option("auto, cpu, cuda, cuda:1, ...", MODEL)] = "auto",
    max_num_batched_tokens: Annotated[
        int | None, option("Rows of a step, chunks of prompts included. [2048, or the largest batch's]", MODEL)
    ] = None,
    capture_chunks: Annotated[
        bool | None,
        option(
            "Steps with prompt chunks as CUDA graphs, too; default: yes.", MODEL, "--capture-chunks/--no-capture-chunks"
        ),
    ] = None,
    chunk_step_ratio: Annotated[
        float | None,
        option(
            "A step with prompt chunks takes about so many times one without, at most. [captured 1.8; else inf]",
            MODEL,
        ),
    ] = None,
    kv_cache_gb: Annotated[float | None, option("Key/value cache; default: what the engine takes.", MODEL)] = None,
    threads: Annotated[int | None, option("CPU threads; default: torch's choice.", MODEL)] = None,
    debug: Annotated[bool, option("Show the traceback of an error.", MODEL, "--debug")] = False,
) -> None:
    """Measure speed: our modes beside AR in one engine, runs taking turns; optionally beside vLLM.

    \b
    Examples:
    wedlm bench
    wedlm bench scenarios pairs --threads 2
    wedlm bench all --shape qwen3-8b --against vllm --budget-s 460 --output ./results

    Figures are medians of runs, their spread in bench.json; the last line is JSON. docs/benchmarks.md explains them.
    """
    with plain_errors(debug):
        if show is not None:
            show_run(show, evaluation, plots)
            return
        settings = read_settings(ctx.params)
        run(settings, output, evaluation, plots and output is not None)


def read_settings(options: dict[str, Any]) -> "Settings":
    """Options of the command line, checked. Raises ValueError."""
    from wedlm.bench.settings import Amounts, Settings, change_amounts, read_modes, read_numbers, read_parts
    from wedlm.cli_generate import parse_threshold
    from wedlm.engine.options import read_device, read_quantization, read_ratio

    shape, model = options["shape"], options["model"]
    if shape is not None and (model is not None or options["adapter"] is not None):
        raise ValueError(f"--shape is {shape}, and --model or --adapter is given; expected one subject")
    _set_threads(options["threads"])
    lists = {
        name: None if options[name] is None else read_numbers(f"--{name}", options[name], 1, 2**31)
        for name in ("batches", "contexts")
    }
    single = {name: options[name] for name in ("runs", "pairs", "steps", "answer", "prompt", "requests", "long_prompt")}
    on_gpu = read_device(options["device"]).type == "cuda"
    amounts = change_amounts(Amounts.of(on_gpu, shape is not None), lists | single)
    for name in ("rate", "budget_s", "kv_cache_gb"):
        if options[name] is not None and not options[name] > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {options[name]:g}; expected a number above 0")
    given = ("quantization", "max_num_batched_tokens", "capture_chunks", "chunk_step_ratio")
    engine = {name: options[name] for name in given}
    read_quantization(options["quantization"])
    if options["chunk_step_ratio"] is not None:
        read_ratio("--chunk-step-ratio", options["chunk_step_ratio"])  # before vLLM has run for nothing
    if options["kv_cache_gb"] is not None:
        engine["kv_cache_bytes"] = int(options["kv_cache_gb"] * 1e9)
    return Settings(
        parts=read_parts(options["parts"] or [], shape),
        modes=read_modes(options["modes"], shape),
        amounts=amounts,
        model=None if shape is not None else model or "demo",
        decoding={
            "wedlm_window_size": options["window_size"],
            "wedlm_entropy_threshold": parse_threshold(options["entropy_threshold"]),
            "wedlm_pos_penalty_factor": options["pos_penalty"],
            "wedlm_draft_entropy": options["draft_entropy"],
        },
        curves=tuple(read_numbers("--accept", text, 0, 1) for text in options["accept"] or []),
        engine={name: value for name, value in engine.items() if value is not None},
        **{name: options[name] for name in ("shape", "adapter", "dtype", "device", "rate", "against", "budget_s")},
    )


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"threads is {threads}; expected at least 1")
    import torch

    torch.set_num_threads(threads)


def run(settings: "Settings", output: Path | None, evaluation: Path | None, draws: bool) -> None:
    """Measure, print tables and the line of JSON, write the figures."""
    from wedlm.bench.record import key_figure, label_of
    from wedlm.bench.run import run_bench
    from wedlm.bench.stats import describe
    from wedlm.bench.tables import show_tables
    from wedlm.evaluate.plots import need_matplotlib

    if draws:
        need_matplotlib()
    elif evaluation is not None:
        raise ValueError("--evaluation is given without --output or with --no-plots; expected a folder to draw into")

    def say(part: str, row: "Row | None") -> None:
        if row is None:
            note(f"{part} ...")
        else:
            name, value = key_figure(row)
            note(f"  {part}: {describe(label_of(row))}: {name} {value:g}")

    record = run_bench(settings, sys.argv[1:], output, say)
    show_tables(record.values["parts"])
    rival = record.values.get("vllm", {})
    if "error" in rival:
        note(f"warning: {rival['error']}", "yellow")
    if record.values["cut"]:
        note(f"the budget of {settings.budget_s:g} s cut {len(record.values['cut'])} measurements", "yellow")
    if draws and output is not None:
        _draw(record.values, evaluation, output)
    write(record.summary(output) + "\n")


def show_run(folder: Path, evaluation: Path | None, draws: bool) -> None:
    """The tables of a finished run, and its figures beside it. ValueError if there is none."""
    from wedlm.bench.record import read_record
    from wedlm.bench.tables import show_tables
    from wedlm.evaluate.plots import need_matplotlib

    values = read_record(folder)
    show_tables(values["parts"])
    if draws:
        need_matplotlib()
        _draw(values, evaluation, folder)


def _draw(values: dict[str, Any], evaluation: Path | None, folder: Path) -> None:
    from wedlm.bench.plots import draw_bench, draw_evaluation, write_plots

    drawn = [*draw_bench(values), *([] if evaluation is None else draw_evaluation(evaluation))]
    for path in write_plots(drawn, folder):
        note(f"wrote {path}")
