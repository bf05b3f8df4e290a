# SPDX-License-Identifier: Apache-2.0
"""``wedlm demo``: the embedded model answers in three modes, and the figures say honestly what each mode did."""

from typing import TYPE_CHECKING, Annotated

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from wedlm.cli.loading import load_llm
from wedlm.cli.options import USUAL, EngineOptions, ModelOptions, Only, command
from wedlm.cli.terminal import by_step, has_colours, out, status

if TYPE_CHECKING:
    from wedlm import LLM, GenerationOutput

PROMPTS = (
    "What is the capital of France, and what is it known for? Answer in two sentences.",
    "Write a Python function that returns the larger of two numbers.",
    "A baker sells 12 loaves in the morning and twice as many in the afternoon. How many does she sell in all?",
)
MAX_TOKENS = 40
MODES = {
    "autoregressive": "one token a forward: the baseline",
    "verified": "masked rows draft tokens, the AR head checks them in the same forward: AR's text, token for token",
    "streaming": "masked positions of a sliding window are filled as soon as they are certain: the paper's mode",
}
UNADAPTED = (
    "This is the original AR checkpoint: its masked rows were never trained. So their drafts are seldom accepted, "
    "verified decoding gains little, and streaming text means nothing yet. That verified text is AR's text does not "
    "depend on training: it holds with any weights."
)
ADAPTED = (
    "This checkpoint is adapted to WeDLM: its masked rows were trained. Streaming text is its own, not AR's; verified "
    "text is AR's."
)
ROUNDING = (
    "Where verified text first left AR's text above, AR's two best tokens were {gap:.2g} nats apart: {dtype} rounds "
    "the same row differently in forwards of 1 and of 16 rows. --dtype float32 removes nearly all such "
    "ties, and is slower."
)
FAULT = (
    "Where verified text first left AR's text above, AR's two best tokens were {gap:.2g} nats apart. That is more than "
    "{dtype} rounding explains: please report it."
)
# The widest gap, in nats, that rounding of logits can bridge. bfloat16 holds a logit of 16 to 32 in steps of 1/8.
_ROUNDING_NATS = {"float32": 1e-3}
_ROUNDING_NATS_HALF = 0.5
NEXT = (
    ("wedlm chat", "a conversation, coloured by forward"),
    ('wedlm generate "Why is the sky blue?"', "one answer, with its figures"),
    ("wedlm generate --help", "every option, e.g. your own --model"),
)
_INDENT = (0, 0, 1, 2)
Piece = tuple[str, int]  # text, and the forward that made it final


@command
def demo(model: ModelOptions, engine: Annotated[EngineOptions, Only(*USUAL)]) -> None:
    """Answer three prompts in three decoding modes, and show what each forward did.

    \b
    Examples:
    wedlm demo
    wedlm demo --dtype float32

    The first run fetches the embedded model (93 MB). On two CPU cores the rest takes less than a minute.
    """
    run_demo(load_llm(model, engine), model.model)


def run_demo(llm: "LLM", name: str) -> None:
    """Three prompts in three modes, one table each, and the best answer coloured by forward."""
    _introduce(llm, name)
    answers: list[tuple[GenerationOutput, list[Piece]]] = []
    gaps: list[float] = []
    for number, prompt in enumerate(PROMPTS, 1):
        with status(f"Prompt {number} of {len(PROMPTS)} ..."):
            results = {mode: _answer(llm, prompt, mode) for mode in MODES}
        outputs = {mode: output for mode, (output, _) in results.items()}
        answers.append(results["verified"])
        gaps += _gap(outputs["autoregressive"], outputs["verified"])
        out.print(Text(f"> {prompt}", style="bold"))
        out.print(Padding(_shown(outputs["verified"]), _INDENT, expand=False))
        out.print(Padding(_table(outputs), _INDENT, expand=False))
    output, pieces = max(answers, key=lambda answer: _ratio(answer[0]))
    how = "a colour for each forward" if has_colours() else "a bar between forwards"
    out.print(
        f"The texts above are verified decoding's (auto, the default, gives the same), cut at {MAX_TOKENS} tokens. "
        f"Once more the one with the most tokens a forward ({_ratio(output):.2f}, p_cache {_p_cache(output):.2f}), "
        f"{how}:"
    )
    out.print(Padding(by_step(pieces), _INDENT, expand=False))
    if gaps:
        tie = max(gaps) <= _ROUNDING_NATS.get(_dtype(llm), _ROUNDING_NATS_HALF)
        out.print((ROUNDING if tie else FAULT).format(dtype=_dtype(llm), gap=max(gaps)) + "\n", style="yellow")
    out.print((ADAPTED if llm.model_config.is_wedlm else UNADAPTED) + "\n", style="yellow")
    out.print(Group(Text("Next:"), _pairs(NEXT, "bold")))


def _introduce(llm: "LLM", name: str) -> None:
    model = "SmolLM2-135M-Instruct" if name in ("demo", "demo-base") else name
    weights = llm.engine.config.options.quantization or _dtype(llm)
    kind = "adapted to WeDLM" if llm.model_config.is_wedlm else "AR checkpoint, not adapted"
    out.print(Text.assemble((model, "bold"), f" ({kind}), {weights} on {llm.device}\n"))
    out.print(_pairs(tuple(MODES.items()), "bold"))
    out.print(
        "p_cache is tokens kept per row run: rows cost time, too. tok/s is one run on this machine, prompt cached.\n",
        style="dim",
    )


def _answer(llm: "LLM", prompt: str, mode: str) -> tuple["GenerationOutput", list[Piece]]:
    from wedlm import SamplingParams

    ids = llm.chat_prompt([{"role": "user", "content": prompt}])
    # The prompt is cached and the kernels are warm before time is taken, alike for all modes.
    llm.generate(ids, SamplingParams(decoding=mode, max_tokens=1))  # type: ignore[arg-type]
    params = SamplingParams(decoding=mode, max_tokens=MAX_TOKENS, logprobs=2)  # type: ignore[arg-type]
    pieces, output = [], None
    for piece in llm.generate_stream(ids, params):
        pieces.append((piece.text, piece.step))
        output = piece.output
    assert output is not None
    return output, pieces


def _table(outputs: dict[str, "GenerationOutput"]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("mode", "tokens", "forwards", "tokens/forward", "p_cache", "tok/s", "AR's text?"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    expected = outputs["autoregressive"].token_ids
    for mode, output in outputs.items():
        stats = output.stats
        assert stats is not None
        table.add_row(
            mode,
            str(stats.num_tokens),
            str(stats.num_forwards),
            f"{stats.tokens_per_forward:.2f}",
            f"{stats.p_cache:.2f}",
            f"{stats.tokens_per_second:.0f}",
            "yes" if output.token_ids == expected else "no",
        )
    return table


def _gap(ar: "GenerationOutput", verified: "GenerationOutput") -> list[float]:
    """How far apart, in nats, AR's two best tokens were where the texts part; empty if they do not."""
    assert ar.top_logprobs is not None
    for own, other, ((_, best), (_, second)) in zip(ar.token_ids, verified.token_ids, ar.top_logprobs, strict=False):
        if own != other:
            return [best - second]
    return []


def _pairs(rows: tuple[tuple[str, str], ...], style: str) -> Padding:
    table = Table.grid(padding=(0, 2))
    for left, right in rows:
        table.add_row(Text(left, style=style, no_wrap=True), right)
    return Padding(table, _INDENT, expand=False)


def _shown(output: "GenerationOutput") -> Text:
    return Text((output.text.strip() or "(no text)") + (" ..." if output.finish_reason == "length" else ""))


def _ratio(output: "GenerationOutput") -> float:
    assert output.stats is not None
    return output.stats.tokens_per_forward


def _p_cache(output: "GenerationOutput") -> float:
    assert output.stats is not None
    return output.stats.p_cache


def _dtype(llm: "LLM") -> str:
    return str(llm.blueprint.dtype).removeprefix("torch.")
