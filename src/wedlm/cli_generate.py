# SPDX-License-Identifier: Apache-2.0
"""Options to a loaded model, prompts to outputs: what ``wedlm generate`` does, and what chat and demo share with it."""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from wedlm.cli_terminal import INTERRUPTED, PALETTE, Interrupt, err, note, out, status, write

if TYPE_CHECKING:
    from wedlm import LLM, GenerationOutput, SamplingParams
    from wedlm.engine.request import RequestStats

# Option of the command line -> field of SamplingParams.
FIELDS = {
    **{
        name: name
        for name in ("temperature", "top_p", "top_k", "max_tokens", "min_tokens", "stop", "seed", "ignore_eos")
    },
    "logprobs": "logprobs",
    "decoding": "decoding",
    "window_size": "wedlm_window_size",
    "entropy_threshold": "wedlm_entropy_threshold",
    "pos_penalty": "wedlm_pos_penalty_factor",
    "draft_entropy": "wedlm_draft_entropy",
}
_LLM_OPTIONS = (
    "adapter",
    "dtype",
    "quantization",
    "device",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "kv_cache_bytes",
)


def sampling_params(options: Mapping[str, Any]) -> "SamplingParams":
    """``SamplingParams`` of the options that a command has. Raises ValueError."""
    from wedlm import SamplingParams

    values = {field: options[name] for name, field in FIELDS.items() if name in options}
    values["wedlm_entropy_threshold"] = parse_threshold(options["entropy_threshold"])
    return SamplingParams(**values)


def parse_threshold(text: str) -> float | None:
    """A number of nats, or "none"."""
    try:
        return None if text.lower() == "none" else float(text)
    except ValueError:
        raise ValueError(f"entropy_threshold is {text!r}; expected a number >= 0 or none") from None


def load_llm(options: Mapping[str, Any]) -> "LLM":
    """An ``LLM``, with a status line while it loads. Raises ValueError."""
    model, threads = options["model"], options.get("threads")
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; expected at least 1")
    with status(f"Loading {model} ..."):
        import torch

        from wedlm import LLM
        from wedlm.model.formats.resolve import locate
    locate(model)  # outside the status line: a download shows its own progress
    if threads is not None:
        torch.set_num_threads(threads)
    with status(f"Loading {model} ..."):
        return LLM(model, **{name: options[name] for name in _LLM_OPTIONS if name in options})


def run_generate(
    llm: "LLM", prompts: list[str], params: "SamplingParams", use_chat: bool | None, as_json: bool
) -> None:
    """Complete the prompts and print texts or JSON; exit code 1 if some prompt was refused, 130 after Ctrl-C.

    ``use_chat`` None: if the model has a chat template.
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
                write(json.dumps(_record(text, output), ensure_ascii=False) + "\n")
            elif output.error is None:
                write(f"> {text}\n{output.text.strip()}\n\n")
    if not as_json:
        note(_total_line(outputs, time.perf_counter() - start))
    _end(outputs, interrupt)


def stream_answer(
    llm: "LLM", prompt: str | list[int], params: "SamplingParams", interrupt: Interrupt, coloured: bool
) -> "GenerationOutput":
    """Print an answer as it becomes final, and its figures. Ctrl-C ends it; what was generated stays."""
    output, last = None, "\n"
    for piece in llm.generate_stream(prompt, params):
        write(piece.text, PALETTE[piece.step % len(PALETTE)] if coloured else "")
        output, last = piece.output, piece.text[-1:] or last
        if interrupt.asked:
            llm.abort()
    assert output is not None, "the last piece of a stream carries the output"
    if last != "\n":
        write("\n")
    assert output.stats is not None
    note(("stopped; " if output.finish_reason == "abort" else "") + stats_line(output.stats))
    return output


def stats_line(stats: "RequestStats") -> str:
    """One line of figures; tokens per forward never without p_cache."""
    return (
        f"{stats.decoding}: {stats.num_tokens} tokens / {stats.num_forwards} forwards = "
        f"{stats.tokens_per_forward:.2f}, p_cache {stats.p_cache:.2f}, {stats.tokens_per_second:.0f} tok/s"
    )


def _outputs(
    llm: "LLM", prompts: Sequence[str], params: "SamplingParams", use_chat: bool, interrupt: Interrupt
) -> Iterator["GenerationOutput"]:
    """The outputs in the order of the prompts, each as soon as it and those before it are there.

    All run together: reading one stream steps the engine for all. ValueError if every prompt is refused.
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
    columns = (TextColumn("Generating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Where outputs appear on the terminal, they themselves show how far it is.
    shown = err.is_terminal and not out.is_terminal and len(prompts) > 1
    with Progress(*columns, console=err, transient=True, disable=not shown) as bar:
        task = bar.add_task("", total=len(prompts))
        for index, stream in enumerate(streams):
            yield _finish(llm, stream, index, interrupt)
            bar.advance(task)


def _finish(llm: "LLM", stream: Any, index: int, interrupt: Interrupt) -> "GenerationOutput":
    """The output of a stream, of a refusal, or of a prompt that Ctrl-C came before (None)."""
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


def _record(prompt: str, output: "GenerationOutput") -> dict[str, Any]:
    record = {"prompt": prompt, **dataclasses.asdict(output)}
    return {name: value for name, value in record.items() if value is not None or name == "stats"}


def _total_line(outputs: Sequence["GenerationOutput"], seconds: float) -> str:
    """The figures of several prompts; forwards and rows are summed over prompts, though they shared forwards."""
    stats = [output.stats for output in outputs if output.stats is not None]
    tokens, forwards, rows = (
        sum(getattr(one, name) for one in stats) for name in ("num_tokens", "num_forwards", "num_rows")
    )
    modes = "/".join(sorted({one.decoding for one in stats})) or "nothing ran"
    return (
        f"{modes}: {len(stats)} prompts, {tokens} tokens, {tokens / max(1, forwards):.2f} tokens/forward, "
        f"p_cache {tokens / max(1, rows):.2f}, {tokens / seconds:.0f} tok/s"
    )


def _end(outputs: Sequence["GenerationOutput"], interrupt: Interrupt) -> None:
    sys.stdout.flush()
    if interrupt.asked:
        raise typer.Exit(INTERRUPTED)
    if any(output.error is not None for output in outputs):
        raise typer.Exit(1)
