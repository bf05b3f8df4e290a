# SPDX-License-Identifier: Apache-2.0
"""The command ``wedlm``. torch is imported only once a command needs it, so that --help answers at once."""

import dataclasses
import json
import sys
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wedlm import LLM, GenerationOutput, SamplingParams
    from wedlm.engine.types import RequestStats

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help=(
        "Causal diffusion language models: several tokens a forward under the plain causal mask.\n\n"
        "Decoding modes: [b]verified[/b] gives the text of AR decoding and checks its own drafts; [b]streaming[/b] "
        "fills masked positions as they become certain (WeDLM checkpoints); [b]block[/b] fills block by block; "
        "[b]autoregressive[/b] is one token a forward.\n\n"
        'Examples:\n\n  wedlm demo\n\n  wedlm generate "What is a prime number?" --max-tokens 64\n\n'
        "  wedlm generate --file prompts.txt --lines --json --model ./my-wedlm\n\n  wedlm chat"
    ),
)
out, err = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)
# One colour per forward, in turn; tokens that became final together look alike.
PALETTE = ("cyan", "yellow", "green", "magenta", "blue", "red")

Model = Annotated[str, typer.Option(help="Checkpoint directory, .gguf file, hub id, or 'demo'.")]
Decoding = Annotated[
    str | None, typer.Option(help="verified, streaming, block or autoregressive; default: the model's.")
]
MaxTokens = Annotated[int, typer.Option(help="Cut the answer after so many tokens.")]
Temperature = Annotated[float, typer.Option(help="0 takes the most probable token.")]
TopP = Annotated[float, typer.Option(help="Sample from the smallest set with this probability mass.")]
TopK = Annotated[int, typer.Option(help="Sample from the k most probable tokens; 0: from all.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.")]
Window = Annotated[int | None, typer.Option(help="W of streaming and block, rows a step of verified.")]
Threshold = Annotated[
    str, typer.Option(help="Streaming: fill positions with entropy below this (nats); none: one a step.")
]
Penalty = Annotated[float, typer.Option(help="Streaming: entropy added per position of distance.")]
DraftEntropy = Annotated[float, typer.Option(help="Verified: draft up to the first row this uncertain (nats).")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, ...")]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest prompt and answer together, in tokens.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; default: torch's choice.")]


@app.callback()
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if show_version:
        print(f"wedlm {version('wedlm')}")
        raise typer.Exit


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; without it and --file, standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from a file; - is standard input.")] = None,
    lines: Annotated[bool, typer.Option("--lines", help="One prompt a line, all decoded together.")] = False,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="Use the chat template or not; default: if there is one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line: text, token_ids, stats.")] = False,
    model: Model = "demo",
    decoding: Decoding = None,
    max_tokens: MaxTokens = 256,
    min_tokens: Annotated[int, typer.Option(help="No end before so many tokens.")] = 0,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")] = None,
    seed: Seed = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after end tokens.")] = False,
    logprobs: Annotated[int | None, typer.Option(help="With --json: log-probabilities of so many tokens.")] = None,
    window_size: Window = None,
    entropy_threshold: Threshold = "0.4",
    pos_penalty: Penalty = 0.02,
    draft_entropy: DraftEntropy = 1.5,
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_model_len: MaxModelLen = None,
    max_num_seqs: Annotated[int, typer.Option(help="Most prompts in one forward.")] = 64,
    threads: Threads = None,
) -> None:
    """Complete prompts: the argument, a file, or standard input."""
    with _plain_errors():
        prompts = _read_prompts(prompt, file, lines)
        from wedlm import SamplingParams

        params = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            stop=stop,
            seed=seed,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            decoding=decoding,  # type: ignore[arg-type]  # checked by SamplingParams
            wedlm_window_size=window_size,
            wedlm_entropy_threshold=parse_threshold(entropy_threshold),
            wedlm_pos_penalty_factor=pos_penalty,
            wedlm_draft_entropy=draft_entropy,
        )
        llm = load_llm(
            model, threads, dtype=dtype, device=device, max_model_len=max_model_len, max_num_seqs=max_num_seqs
        )
        use_chat = llm.tokenizer.has_chat_template if chat is None else chat
        encoded: list[Any] = (
            [llm.chat_prompt([{"role": "user", "content": p}]) for p in prompts] if use_chat else prompts
        )
        if len(prompts) == 1 and not as_json:
            _stream_one(llm, encoded[0], params)
            return
        for text, output in zip(prompts, llm.generate(encoded, params), strict=True):
            if as_json:
                print(json.dumps(_record(text, output), ensure_ascii=False), flush=True)
            else:
                out.print(Text(output.text if output.error is None else f"error: {output.error}"))


@app.command()
def chat(
    model: Model = "demo",
    system: Annotated[str | None, typer.Option(help="System message of the conversation.")] = None,
    decoding: Decoding = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    window_size: Window = None,
    entropy_threshold: Threshold = "0.4",
    dtype: Dtype = "auto",
    device: Device = "auto",
    max_model_len: MaxModelLen = None,
    threads: Threads = None,
) -> None:
    """Talk to a model; tokens that one forward made final share a colour. /help lists the commands."""
    with _plain_errors():
        from wedlm import SamplingParams
        from wedlm.cli_chat import ChatSession

        params = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            max_tokens=max_tokens,
            seed=seed,
            decoding=decoding,  # type: ignore[arg-type]  # checked by SamplingParams
            wedlm_window_size=window_size,
            wedlm_entropy_threshold=parse_threshold(entropy_threshold),
        )
        llm = load_llm(model, threads, dtype=dtype, device=device, max_model_len=max_model_len)
        ChatSession(llm, params, system, out, err).run()


@app.command()
def demo(model: Model = "demo", dtype: Dtype = "auto", threads: Threads = None) -> None:
    """Answer three prompts in every mode with the embedded model, and show what each forward did."""
    with _plain_errors():
        from wedlm.cli_demo import run_demo

        run_demo(load_llm(model, threads, dtype=dtype), out)


def load_llm(model: str, threads: int | None, **options: Any) -> "LLM":
    """An ``LLM`` with a status line while it loads."""
    with err.status(f"Loading {model} ..."):
        import torch

        from wedlm import LLM

        if threads is not None:
            if threads < 1:
                raise ValueError(f"threads is {threads}; expected at least 1")
            torch.set_num_threads(threads)
        return LLM(model, **options)


def parse_threshold(text: str) -> float | None:
    """A number of nats, or "none"."""
    if text.lower() == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"entropy_threshold is {text!r}; expected a number >= 0 or none") from None


def stats_line(stats: "RequestStats") -> str:
    """One line of figures; tokens per forward never without p_cache."""
    return (
        f"{stats.decoding}: {stats.num_tokens} tokens in {stats.num_forwards} forwards, "
        f"{stats.tokens_per_forward:.2f} tokens/forward, p_cache {stats.p_cache:.2f}, "
        f"{stats.tokens_per_second:.0f} tok/s"
    )


def print_stream(
    llm: "LLM", prompt: Any, params: "SamplingParams", coloured: bool, shown: list[str] | None = None
) -> "GenerationOutput | None":
    """Print an answer as it becomes final, and append its pieces to ``shown``.

    Ctrl-C ends it: the text so far stays on the screen and None is returned.
    """
    stream = llm.generate_stream(prompt, params)
    output = None
    try:
        for piece in stream:
            style = PALETTE[piece.step % len(PALETTE)] if coloured else ""
            out.print(Text(piece.text, style=style), end="")
            if shown is not None:
                shown.append(piece.text)
            output = piece.output
    except KeyboardInterrupt:
        output = None
    finally:
        stream.close()  # type: ignore[attr-defined]
        out.print()
    return output


def _stream_one(llm: "LLM", prompt: Any, params: "SamplingParams") -> None:
    output = print_stream(llm, prompt, params, coloured=False)
    if output is None:
        raise typer.Exit(130)
    if output.stats is not None:
        err.print(Text(stats_line(output.stats), style="dim"))


def _record(prompt: str, output: "GenerationOutput") -> dict[str, Any]:
    record = {"prompt": prompt, **dataclasses.asdict(output)}
    return {name: value for name, value in record.items() if value is not None or name == "stats"}


def _read_prompts(prompt: str | None, file: Path | None, lines: bool) -> list[str]:
    if prompt is not None and file is not None:
        raise ValueError("both a prompt and --file are given; expected one of them")
    if prompt is None:
        if file is None or str(file) == "-":
            prompt = sys.stdin.read()
        elif not file.is_file():
            raise ValueError(f"--file is {file}, which does not exist; expected a text file")
        else:
            prompt = file.read_text(encoding="utf-8")
        prompt = prompt.removesuffix("\n")
    prompts = [line for line in prompt.splitlines() if line.strip()] if lines else [prompt]
    if not prompts or not prompts[0]:
        raise ValueError("the prompt is empty; expected some text")
    return prompts


@contextmanager
def _plain_errors() -> "Iterator[None]":
    """What the user can mend becomes one sentence and exit code 2; Ctrl-C ends with 130, without a traceback."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        err.print(Text(f"warning: {message}", style="yellow"))

    previous: Callable[..., None] = warnings.showwarning
    warnings.showwarning = show
    try:
        yield
    except (ValueError, RuntimeError, OSError) as error:
        err.print(Text(f"error: {error}", style="red"))
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        warnings.showwarning = previous


def main() -> None:
    """Entry point."""
    app()
