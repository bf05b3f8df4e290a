# SPDX-License-Identifier: Apache-2.0
"""``wedlm demo``: the embedded model answers in four modes, and the figures say honestly what each mode did."""

import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from wedlm.cli.loading import load_llm
from wedlm.cli.options import USUAL, EngineOptions, ModelOptions, Only, command
from wedlm.cli.terminal import by_step, has_colours, note, out, status
from wedlm.machine import busy_notice, peak_memory_bytes

if TYPE_CHECKING:
    from wedlm import LLM, GenerationOutput, SamplingParams
    from wedlm.engine.request import RequestStats

PROMPTS = (
    "What is the capital of France, and what is it known for? Answer in two sentences.",
    "Write a Python function that returns the larger of two numbers.",
    "A baker sells 12 loaves in the morning and twice as many in the afternoon. How many does she sell in all?",
    "Count from 1 to 30. Write only the numbers, with commas between them.",
)
MAX_TOKENS, RUNS = 48, 5
ENOUGH_S = 20.0  # of one prompt: no further run begins after that, so that slow machines end, too
# The window of streaming that keeps most of the embedded model's accuracy, and costs the fewest rows.
STREAMING_WINDOW = 4
MODES = {
    "autoregressive": "one token a forward: the baseline",
    "verified": "masked rows draft tokens, the AR head checks them in the same forward: AR's text, token for token",
    "auto": "the default: verified, with as many rows as pay on this machine; AR's text, too",
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
UNTOUCHED = (
    "The model before adaptation, its weights untouched, in {weights}, with an adapter that masked rows alone meet "
    "(--model demo-base --adapter demo-masked): AR {autoregressive.speed:.0f} tok/s; verified "
    "{verified.speed:.0f} tok/s at {verified.tokens_per_forward:.2f} tokens a forward (p_cache {verified.p_cache:.2f}),"
    " AR's text on {verified.num_same} of {of} prompts; auto {auto.speed:.0f} tok/s, on {auto.num_same}."
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
    """Answer four prompts in four decoding modes, and show how fast each one is.

    \b
    Examples:
    wedlm demo
    wedlm demo --dtype float32

    The first run fetches the embedded model (93 MB). On two CPU cores the rest takes less than a minute.
    """
    with status("Loading torch ..."):
        import wedlm.engine.llm  # noqa: F401
    before = peak_memory_bytes()
    llm = load_llm(model, engine)
    run_demo(llm, model.model)
    peak = peak_memory_bytes()
    if model.model == "demo" and engine.adapter is None:
        del llm
        show_untouched(load_llm(replace(model, model="demo-base"), replace(engine, adapter="demo-masked")))
    out.print(Group(Text("Next:"), _pairs(NEXT, "bold")))
    note(f"Peak memory {peak / 1e9:.2f} GB, of which Python and torch take {before / 1e9:.2f} GB.")


@dataclass
class Answers:
    """The answers to one prompt in one mode. ``seconds`` has each run's time from the request to the last token."""

    output: "GenerationOutput"
    pieces: list[Piece]
    seconds: list[float] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def run_demo(llm: "LLM", name: str) -> None:
    """Answer the prompts in all modes, with a table for each and one for all, and the best answer coloured by
    forward."""
    _introduce(llm, name)
    answers: list[dict[str, Answers]] = []
    gaps: list[float] = []
    for number, prompt in enumerate(PROMPTS, 1):
        with status(f"Prompt {number} of {len(PROMPTS)}, {RUNS} times in each mode ..."):
            ids = llm.chat_prompt([{"role": "user", "content": prompt}])
            found = _ask(llm, ids)
            gaps += _parting(llm, ids, found)
        answers.append(found)
        out.print(Text(f"> {prompt}", style="bold"))
        out.print(Padding(_shown(found["verified"].output), _INDENT, expand=False))
        out.print(Padding(_table([found]), _INDENT, expand=False))
    out.print(Text("All prompts together", style="bold"))
    out.print(Padding(_table(answers), _INDENT, expand=False))
    best = max((found["verified"] for found in answers), key=lambda answer: _stats(answer.output).tokens_per_forward)
    output, pieces = best.output, best.pieces
    how = "a colour for each forward" if has_colours() else "a bar between forwards"
    stats = _stats(output)
    out.print(
        f"The texts above are verified decoding's (auto, the default, gives the same), cut at {MAX_TOKENS} tokens. "
        f"Once more the one with the most tokens a forward ({stats.tokens_per_forward:.2f}, p_cache "
        f"{stats.p_cache:.2f}), {how}:"
    )
    out.print(Padding(by_step(pieces), _INDENT, expand=False))
    _explain(llm, gaps)
    out.print((ADAPTED if llm.model_config.is_wedlm else UNADAPTED) + "\n", style="yellow")


def show_untouched(llm: "LLM") -> None:
    """Say in one sentence what verified and auto decoding gain over AR on the prompts."""
    answers: list[dict[str, Answers]] = []
    gaps: list[float] = []
    for number, prompt in enumerate(PROMPTS, 1):
        with status(f"Prompt {number} of {len(PROMPTS)}, with the model before adaptation ..."):
            ids = llm.chat_prompt([{"role": "user", "content": prompt}])
            answers.append(_ask(llm, ids, ("autoregressive", "verified", "auto"), runs=2))
            gaps += _parting(llm, ids, answers[-1])
    figures = {mode: _figures(answers, mode) for mode in answers[0]}
    out.print(UNTOUCHED.format(weights=llm.blueprint.formats.weights, of=len(answers), **figures), style="yellow")
    _explain(llm, gaps)
    out.print()


def _introduce(llm: "LLM", name: str) -> None:
    model = "SmolLM2-135M-Instruct" if name in ("demo", "demo-base") else name
    weights = llm.blueprint.formats.weights
    kind = "adapted to WeDLM" if llm.model_config.is_wedlm else "AR checkpoint, not adapted"
    out.print(Text.assemble((model, "bold"), f" ({kind}), weights in {weights}, on {llm.device}\n"))
    out.print(_pairs(tuple(MODES.items()), "bold"))
    out.print(
        "p_cache is tokens kept per row run: rows cost time, too. tok/s is the median of up to "
        f"{RUNS} runs, modes in turn, prompt cached.\n",
        style="dim",
    )
    busy = busy_notice()
    if busy is not None:
        out.print(busy + "\n", style="yellow")


def _ask(llm: "LLM", ids: list[int], modes: Iterable[str] = MODES, runs: int = RUNS) -> dict[str, Answers]:
    """The answers by mode. Modes take turns in each run, so that the machine's drift affects all of them alike."""
    # The first answer is not timed: the prompt is cached then, and auto has learnt what steps cost.
    found = {mode: _first(llm, ids, _params(mode)) for mode in modes}
    start = time.perf_counter()
    for number in range(runs):
        if number and time.perf_counter() - start > ENOUGH_S:
            break
        for mode, answers in found.items():
            (output,) = llm.generate(ids, _params(mode))
            stats = _stats(output)
            answers.seconds.append(stats.num_tokens / stats.tokens_per_second)
    return found


def _params(mode: str, logprobs: int | None = None) -> "SamplingParams":
    from wedlm import SamplingParams

    window = STREAMING_WINDOW if mode == "streaming" else None
    return SamplingParams(decoding=mode, max_tokens=MAX_TOKENS, logprobs=logprobs, wedlm_window_size=window)  # type: ignore[arg-type]


def _first(llm: "LLM", ids: list[int], params: "SamplingParams") -> Answers:
    pieces, output = [], None
    for piece in llm.generate_stream(ids, params):
        pieces.append((piece.text, piece.step))
        output = piece.output
    assert output is not None
    return Answers(output, pieces)


@dataclass(frozen=True)
class Figures:
    """Figures of one mode over all prompts. ``speed``: tokens a second; ``num_same``: how many texts equal AR's."""

    speed: float
    tokens_per_forward: float
    p_cache: float
    num_same: int


def _figures(prompts: list[dict[str, Answers]], mode: str) -> Figures:
    from wedlm.engine.outputs import Totals

    totals = Totals.of(found[mode].output for found in prompts)
    speed = totals.num_tokens / sum(found[mode].median_s for found in prompts)
    same = sum(found[mode].output.token_ids == found["autoregressive"].output.token_ids for found in prompts)
    return Figures(speed, totals.tokens_per_forward, totals.p_cache, same)


def _table(prompts: list[dict[str, Answers]]) -> Table:
    """A line for each mode: tokens a second over all prompts, what they cost, whether the texts equal AR's."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("mode", "tok/s", "x AR", "tokens/forward", "p_cache", "AR's text?"):
        table.add_column(name, justify="left" if name == "mode" else "right")
    base = _figures(prompts, "autoregressive").speed
    for mode in MODES:
        of = _figures(prompts, mode)
        table.add_row(
            mode,
            f"{of.speed:.0f}",
            f"{of.speed / base:.2f}",
            f"{of.tokens_per_forward:.2f}",
            f"{of.p_cache:.2f}",
            ("yes" if of.num_same else "no") if len(prompts) == 1 else f"{of.num_same} of {len(prompts)}",
        )
    return table


def _parting(llm: "LLM", ids: list[int], found: dict[str, Answers]) -> list[float]:
    """How far apart AR's two best tokens were where verified text differs from AR's (``_gap``)."""
    verified = found["verified"].output
    if verified.token_ids == found["autoregressive"].output.token_ids:
        return []
    return _gap(llm.generate(ids, _params("autoregressive", logprobs=2))[0], verified)


def _explain(llm: "LLM", gaps: list[float]) -> None:
    """Explain why verified text differs from AR's, if it does."""
    if gaps:
        tie = max(gaps) <= _ROUNDING_NATS.get(_dtype(llm), _ROUNDING_NATS_HALF)
        out.print((ROUNDING if tie else FAULT).format(dtype=_dtype(llm), gap=max(gaps)) + "\n", style="yellow")


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


def _stats(output: "GenerationOutput") -> "RequestStats":
    assert output.stats is not None
    return output.stats


def _dtype(llm: "LLM") -> str:
    return str(llm.blueprint.dtype).removeprefix("torch.")
