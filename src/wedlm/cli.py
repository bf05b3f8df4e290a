# SPDX-License-Identifier: Apache-2.0
"""The command ``wedlm``. torch is imported only once a command needs it, so that --help answers at once."""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from wedlm.cli_bench import bench
from wedlm.cli_eval import evaluate
from wedlm.cli_report import compare, report
from wedlm.cli_serve import serve
from wedlm.cli_terminal import option, plain_errors, read_prompts

# \b keeps the line breaks of a paragraph.
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="""Causal diffusion language models: several tokens a forward under the plain causal mask.

\b
Decoding modes (--decoding):
[b]auto[/b]            verified, with as many rows as pay under the load; AR's text; the default
[b]verified[/b]        drafts tokens and checks them in the same forward; AR's text
[b]streaming[/b]       fills positions as they become certain; for WeDLM checkpoints
[b]auto_streaming[/b]  streaming, with windows as wide as pay under the load, on which the text then depends
[b]block[/b]           fills one block of positions completely, then the next
[b]autoregressive[/b]  one token a forward; the baseline

\b
Examples:
wedlm demo
wedlm chat --system "Answer in one sentence."
wedlm generate "What is a prime number?" --max-tokens 64
wedlm serve
wedlm train config.yaml
wedlm eval --tasks gsm8k --data-dir ./data
wedlm bench --threads 2
wedlm COMMAND --help""",
)

PROMPT, HOW, DRAW, MODEL = "Prompt and output", "Decoding", "Sampling and length", "Model and machine"


Model = Annotated[str, option("Checkpoint directory, .gguf file, hub id, 'demo' or 'demo-base'.", MODEL)]
Decoding = Annotated[
    str | None, option("auto, verified, streaming, auto_streaming, block, autoregressive. [auto]", HOW)
]
Window = Annotated[
    int | None, option("Positions of a window or block; most rows a forward of auto and verified. [16]", HOW)
]
Threshold = Annotated[str, option("Streaming, block: fill below this entropy (nats); none: one a forward.", HOW)]
Penalty = Annotated[float, option("Streaming, block: entropy added per position of distance.", HOW)]
DraftEntropy = Annotated[float, option("Verified: draft up to the first row this uncertain (nats).", HOW)]
MaxTokens = Annotated[int, option("Cut the answer after so many tokens.", DRAW)]
Temperature = Annotated[float, option("0 takes the most probable token.", DRAW)]
TopP = Annotated[float, option("Sample from the smallest set with this probability.", DRAW)]
TopK = Annotated[int, option("Sample from the k most probable tokens; 0: from all.", DRAW)]
Seed = Annotated[int | None, option("Same seed, same text.", DRAW)]
Adapter = Annotated[
    str | None, option("Directory of a LoRA, merged into the model; one of masked rows stays beside it.", MODEL)
]
Dtype = Annotated[str, option("auto, float32, bfloat16 or float16.", MODEL)]
Quantization = Annotated[str | None, option("int8 or fp8: the layers' weights in eight bits, for GPUs.", MODEL)]
Device = Annotated[str, option("auto, cpu, cuda, cuda:1, ...", MODEL)]
MaxModelLen = Annotated[int | None, option("Longest prompt and answer together, in tokens.", MODEL)]
Threads = Annotated[int | None, option("CPU threads; default: torch's choice.", MODEL)]
Debug = Annotated[bool, option("Show the traceback of an error.", MODEL, "--debug")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"wedlm {version('wedlm')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """The help text is the app's."""


@app.command()
def generate(
    ctx: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; without it and --file: standard input.")] = None,
    file: Annotated[Path | None, option("Read the prompt from this file; - is standard input.", PROMPT)] = None,
    lines: Annotated[bool, option("One prompt a line (blank ones skipped), decoded together.", PROMPT, "--lines")] = (
        False
    ),
    chat: Annotated[
        bool | None,
        option(
            "As a user's message in the chat template, or as it stands; default: chat if the model has a template.",
            PROMPT,
            "--chat/--raw",
        ),
    ] = None,
    as_json: Annotated[
        bool, option("One JSON object a line: prompt, text, token_ids, finish_reason, stats, ...", PROMPT, "--json")
    ] = False,
    logprobs: Annotated[
        int | None, option("With --json: log-probabilities, also of so many alternatives.", PROMPT)
    ] = None,
    decoding: Decoding = None,
    window_size: Window = None,
    entropy_threshold: Threshold = "0.4",
    pos_penalty: Penalty = 0.02,
    draft_entropy: DraftEntropy = 2.5,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    max_tokens: MaxTokens = 256,
    min_tokens: Annotated[int, option("No end before so many tokens.", DRAW)] = 0,
    stop: Annotated[list[str] | None, option("End before this string; may be repeated.", DRAW)] = None,
    ignore_eos: Annotated[bool, option("Go on after end tokens.", DRAW, "--ignore-eos")] = False,
    model: Model = "demo",
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    device: Device = "auto",
    max_model_len: MaxModelLen = None,
    max_num_seqs: Annotated[int, option("Most prompts in one forward.", MODEL)] = 64,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Complete prompts: the argument, a file, or standard input.

    \b
    Examples:
    wedlm generate "What is a prime number?" --max-tokens 64
    git diff | wedlm generate --decoding verified
    wedlm generate --file prompts.txt --lines --json --seed 1 --temperature 0.7
    wedlm generate "One, two, three," --raw --model ./my-checkpoint

    Text goes to standard output, figures to standard error. Ctrl-C keeps what was generated.
    Exit codes: 1 if some prompts were refused, 2 for an error, 130 after Ctrl-C.
    """
    with plain_errors(debug):
        from wedlm.cli_generate import load_llm, run_generate, sampling_params

        prompts = read_prompts(prompt, file, lines)
        params = sampling_params(ctx.params)  # first, so that a wrong option is told before a model is fetched
        run_generate(load_llm(ctx.params), prompts, params, use_chat=chat, as_json=as_json)


@app.command()
def chat(
    ctx: typer.Context,
    system: Annotated[str | None, option("System message of the conversation.", PROMPT)] = None,
    decoding: Decoding = None,
    window_size: Window = None,
    entropy_threshold: Threshold = "0.4",
    pos_penalty: Penalty = 0.02,
    draft_entropy: DraftEntropy = 2.5,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    max_tokens: MaxTokens = 512,
    model: Model = "demo",
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    device: Device = "auto",
    max_model_len: MaxModelLen = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Talk to a model; tokens that one forward made final share a colour.

    \b
    Examples:
    wedlm chat
    wedlm chat --decoding autoregressive --system "Answer in one sentence."

    Ctrl-C stops an answer; /help lists the commands, such as /set decoding verified.
    """
    with plain_errors(debug):
        from wedlm.cli_generate import load_llm, sampling_params

        params = sampling_params(ctx.params)
        llm = load_llm(ctx.params)
        from wedlm.cli_chat import ChatSession

        ChatSession(llm, params, system).run()


@app.command()
def demo(
    ctx: typer.Context,
    model: Model = "demo",
    adapter: Adapter = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Answer three prompts in three decoding modes, and show what each forward did.

    \b
    Examples:
    wedlm demo
    wedlm demo --dtype float32

    The first run fetches the embedded model (93 MB). On two CPU cores the rest takes less than a minute.
    """
    with plain_errors(debug):
        from wedlm.cli_generate import load_llm

        llm = load_llm(ctx.params)
        from wedlm.cli_demo import run_demo

        run_demo(llm, model)


@app.command()
def init(
    source: Annotated[str, typer.Argument(help="AR checkpoint: directory, .gguf file, hub id, or 'demo-base'.")],
    output: Annotated[Path, typer.Argument(help="Directory to write.")],
    mask_token_id: Annotated[int | None, typer.Option(help="Mask token; default: one that text never needs.")] = None,
    block_size: Annotated[int, typer.Option(help="Noise block of training, in tokens.")] = 32,
    force: Annotated[bool, typer.Option("--force", help="Write into a directory that is not empty.")] = False,
    debug: Debug = False,
) -> None:
    """Make a WeDLM directory, ready for training, from an AR checkpoint.

    \b
    Examples:
    wedlm init demo-base ./my-wedlm
    wedlm init ./my-ar-model ./my-wedlm --block-size 32
    """
    with plain_errors(debug):
        from wedlm.cli_init import run_init

        run_init(source, output, mask_token_id, block_size, force)


app.command()(serve)
app.command()(bench)
app.command()(report)
app.command()(compare)
app.command(name="eval")(evaluate)


@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(ctx: typer.Context) -> None:
    """Adapt an AR checkpoint to WeDLM, or fine-tune: CONFIG.yaml --key value ..."""
    from wedlm.train.cli import main

    raise typer.Exit(main(ctx.args))


def main() -> None:
    """Entry point."""
    app()
