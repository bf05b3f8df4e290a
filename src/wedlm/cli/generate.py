# SPDX-License-Identifier: Apache-2.0
"""``wedlm generate``: prompts from the command line, a file or standard input; answers as text or JSON."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wedlm.cli.answer import stream_answer
from wedlm.cli.batch import BatchWork, run_batch
from wedlm.cli.loading import load_llm
from wedlm.cli.options import (
    DEFAULTS,
    DRAW,
    PROMPT,
    USUAL,
    Decoding,
    EngineOptions,
    ModelOptions,
    Only,
    SamplingOptions,
    WindowOptions,
    command,
    option,
    sampling_params,
    values_of,
)
from wedlm.cli.terminal import INTERRUPTED, Interrupt, check_text, err, note, out, progress_bar, write
from wedlm.engine.sampling_params import GAP

if TYPE_CHECKING:
    from wedlm import LLM, GenerationOutput, SamplingParams


@dataclass(frozen=True, kw_only=True)
class _Output:
    """Where prompts come from and how answers are printed."""

    prompt: Annotated[str | None, typer.Argument(help="The prompt; without it and --file: standard input.")] = None
    file: Annotated[Path | None, option("Read the prompt from this file; - is standard input.", PROMPT)] = None
    lines: Annotated[bool, option("One prompt per line (blank ones skipped), decoded together.", PROMPT, "--lines")] = (
        False
    )
    chat: Annotated[
        bool | None,
        option(
            "As a user's message in the chat template, or as it stands; default: chat if the model has a template.",
            PROMPT,
            "--chat/--raw",
        ),
    ] = None
    suffix: Annotated[
        str | None,
        option("Text after the answer, which fills the gap between the prompt and this text.", PROMPT),
    ] = None
    gap: Annotated[int, option("With --suffix: length of the gap in tokens, instead of --max-tokens.", PROMPT)] = GAP
    as_json: Annotated[
        bool, option("One JSON object per line: prompt, text, token_ids, finish_reason, stats, ...", PROMPT, "--json")
    ] = False
    workers: Annotated[
        str | None,
        option("ray: spread the lines of --file over Ray's workers; the objects of --json go to --output.", PROMPT),
    ] = None
    num_workers: Annotated[int | None, option("With --workers; default: as many as there is room for.", PROMPT)] = None
    output: Annotated[
        Path | None, option("With --workers: the file of the answers; one that was begun is gone on with.", PROMPT)
    ] = None


@dataclass(frozen=True, kw_only=True)
class _Answer(SamplingOptions):
    """Where answers end and what is reported, in addition to the options of every command."""

    min_tokens: Annotated[int, option("Smallest number of tokens of the answer.", DRAW)] = DEFAULTS.min_tokens
    stop: Annotated[list[str] | None, option("Stop before this string; may be repeated.", DRAW)] = None
    ignore_eos: Annotated[bool, option("Continue after end tokens.", DRAW, "--ignore-eos")] = DEFAULTS.ignore_eos
    logprobs: Annotated[int | None, option("With --json: log-probabilities, also of N alternatives.", PROMPT)] = (
        DEFAULTS.logprobs
    )


@command
def generate(
    *,
    how: _Output,
    decoding: Decoding = None,
    window: WindowOptions,
    answer: _Answer,
    model: ModelOptions,
    engine: Annotated[EngineOptions, Only(*USUAL, "max_num_seqs", "deterministic")],
) -> None:
    """Complete prompts from the argument, a file, or standard input.

    \b
    Examples:
    wedlm generate "What is a prime number?" --max-tokens 64
    git diff | wedlm generate --decoding verified
    wedlm generate --file prompts.txt --lines --json --seed 1 --temperature 0.7
    wedlm generate "One, two, three," --raw --model ./my-checkpoint
    wedlm generate "The capital of France is" --suffix ", and that of Italy is Rome." --gap 1
    wedlm generate --file prompts.txt --workers ray --output answers.jsonl

    Text goes to standard output, figures to standard error. Ctrl-C keeps what was generated.
    Exit codes: 1 if some prompts were refused, 2 for an error, 130 after Ctrl-C.
    """
    if how.workers is not None:
        _check_batch(how)
    elif how.output is not None or how.num_workers is not None:
        name = "num-workers" if how.output is None else "output"
        raise ValueError(f"--{name} is set without --workers; expected --workers ray beside it")
    prompts = read_prompts(how.prompt, how.file, how.lines or how.workers is not None)
    # First, so that a wrong option is told before a model is fetched.
    options = {"decoding": decoding} | values_of(window, answer)
    if how.suffix is not None:
        options["max_tokens"] = how.gap
        if how.chat:
            raise ValueError("--suffix and --chat are both set; expected one of them, as a gap is in plain text")
    params = sampling_params(options)
    if how.output is not None:
        run_batch(BatchWork(prompts, how.output, how.num_workers), model, engine, params, how.chat)
        return
    llm = load_llm(model, engine)
    if how.suffix is not None:
        params = llm.before(how.suffix, params)
    run_generate(llm, prompts, params, use_chat=how.chat if how.suffix is None else False, as_json=how.as_json)


def _check_batch(how: _Output) -> None:
    """ValueError for options that cannot be beside --workers."""
    if how.workers != "ray":
        raise ValueError(f"--workers is {how.workers!r}; expected ray")
    if how.suffix is not None:
        raise ValueError("--suffix is set beside --workers; expected one of them")
    for name, value in (("--file", how.file), ("--output", how.output)):
        if value is None:
            raise ValueError(f"{name} is missing beside --workers; expected a file")
    if how.num_workers is not None and how.num_workers < 1:
        raise ValueError(f"--num-workers is {how.num_workers}; expected at least 1")


def read_prompts(prompt: str | None, file: Path | None, lines: bool) -> list[str]:
    """The prompts from the argument, the file, or standard input. With ``lines`` each line is one, and blank lines are
    left out."""
    if prompt is not None and file is not None:
        raise ValueError("both a prompt and --file are given; expected one of them")
    if prompt is None:
        prompt = _read(None if file is None or str(file) == "-" else file).removesuffix("\n")
    check_text("the prompt", prompt)
    prompts = [line for line in prompt.split("\n") if line.strip()] if lines else [prompt]
    if not prompts or not prompts[0]:
        raise ValueError("the prompt is empty; expected some text")
    return prompts


def _read(file: Path | None) -> str:
    name = "standard input" if file is None else str(file)
    if file is None:
        if sys.stdin.isatty():
            note("Type the prompt, then press Ctrl-D on an empty line.")
        data = sys.stdin.buffer.read()
    elif file.is_file():
        data = file.read_bytes()
    else:
        raise ValueError(f"--file is {name}, where there is no file; expected a text file")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")  # Windows editors write a mark and such line ends
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not valid UTF-8 at byte {error.start}; expected text in that encoding") from None


def run_generate(
    llm: "LLM", prompts: list[str], params: "SamplingParams", use_chat: bool | None, as_json: bool
) -> None:
    """Complete the prompts and print texts or JSON. The exit code is 1 if some prompt was refused, and 130 after
    Ctrl-C.

    ``use_chat`` None uses the chat template if the model has one.
    """
    if use_chat is None:
        use_chat = llm.tokenizer.has_chat_template
    if len(prompts) == 1 and not as_json:
        prompt: Any = llm.chat_prompt([_user(prompts[0])]) if use_chat else prompts[0]
        with Interrupt() as interrupt:
            output = stream_answer(llm, prompt, params, interrupt, coloured=False)
        _end([output], interrupt)
        return
    start, outputs = time.perf_counter(), []
    with Interrupt() as interrupt:
        for text, output in zip(prompts, _outputs(llm, prompts, params, use_chat, interrupt), strict=True):
            outputs.append(output)
            if as_json:
                write(json.dumps(output.record(text), ensure_ascii=False) + "\n")
            elif output.error is None:
                write(f"> {text}\n{output.text.strip()}\n\n")
    if not as_json:
        note(_total_line(outputs, time.perf_counter() - start))
    _end(outputs, interrupt)


def _outputs(
    llm: "LLM", prompts: Sequence[str], params: "SamplingParams", use_chat: bool, interrupt: Interrupt
) -> Iterator["GenerationOutput"]:
    """The outputs in the order of the prompts, each as soon as it and all before it are finished.

    All run together, because reading one stream steps the engine for all. Raises ValueError if every prompt is refused.
    """
    streams: list[Any] = []
    for prompt in prompts:
        if interrupt.asked:
            break
        try:
            streams.append(llm.generate_stream(llm.chat_prompt([_user(prompt)]) if use_chat else prompt, params))
        except ValueError as error:
            streams.append(error)
    refused = [stream for stream in streams if isinstance(stream, ValueError)]
    if refused and len(refused) == len(prompts):
        raise refused[0]
    streams += [None] * (len(prompts) - len(streams))
    # Where outputs appear on the terminal, they themselves show how far it is.
    shown = err.is_terminal and not out.is_terminal and len(prompts) > 1
    with progress_bar(shown) as bar:
        task = bar.add_task("Generating", total=len(prompts))
        for index, stream in enumerate(streams):
            yield _finish(llm, stream, index, interrupt)
            bar.advance(task)


def _finish(llm: "LLM", stream: Any, index: int, interrupt: Interrupt) -> "GenerationOutput":
    """The output of a stream or of a refusal; None for a prompt that Ctrl-C prevented."""
    from wedlm import GenerationOutput

    if stream is None:
        return GenerationOutput("", [], None, "abort")
    if isinstance(stream, ValueError):
        note(f"warning: prompt {index} was refused: {stream}", "yellow")
        return GenerationOutput("", [], None, "error", error=str(stream))
    output = None
    for piece in stream:
        output = piece.output
        if interrupt.asked:
            llm.abort()
    assert output is not None, "the last piece of a stream carries the output"
    return output


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _total_line(outputs: Sequence["GenerationOutput"], seconds: float) -> str:
    """The figures of several prompts. Forwards and rows are summed over prompts, although these shared forwards."""
    from wedlm.engine.outputs import Totals

    stats, totals = [output.stats for output in outputs if output.stats is not None], Totals.of(outputs)
    modes = "/".join(sorted({one.decoding for one in stats})) or "nothing ran"
    return (
        f"{modes}: {len(stats)} prompts, {totals.num_tokens} tokens, {totals.tokens_per_forward:.2f} tokens/forward, "
        f"p_cache {totals.p_cache:.2f}, {totals.num_tokens / seconds:.0f} tok/s"
    )


def _end(outputs: Sequence["GenerationOutput"], interrupt: Interrupt) -> None:
    sys.stdout.flush()
    if interrupt.asked:
        raise typer.Exit(INTERRUPTED)
    if any(output.error is not None for output in outputs):
        raise typer.Exit(1)
