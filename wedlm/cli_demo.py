# SPDX-License-Identifier: Apache-2.0
"""``wedlm demo``: the embedded model answers in every mode, and the figures say honestly what each mode did."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from wedlm import LLM, GenerationOutput, SamplingParams
from wedlm.cli import PALETTE

PROMPTS = (
    "What is the capital of France, and what is it known for? Answer in two sentences.",
    "Write a Python function that returns the larger of two numbers.",
    "Count from 1 to 20, separated by commas.",
)
MODES = {
    "autoregressive": "one token a forward; the baseline",
    "verified": "drafts from masked rows, checked by the AR head in the same forward: AR's text, in fewer forwards",
    "streaming": "fills the masked positions of a sliding window as soon as they are certain (the paper's mode)",
    "block": "fills one block of positions completely, then the next (what other diffusion models do)",
}
UNADAPTED = (
    "This is the original AR checkpoint: its masked rows were never trained. So drafts are seldom accepted and "
    "verified decoding gains little, and the text of streaming and block decoding means nothing yet. Exactness does "
    "not depend on that: verified text is AR's text with any weights."
)

ROUNDING = (
    "Verified text left AR's text above where two tokens were nearly equally probable: {dtype} rounds the same row "
    "differently in batches of 1 and of 16 rows. With --dtype float32 such ties are all but gone."
)


def run_demo(llm: LLM, out: Console) -> None:
    """Three prompts, four modes, one table, one answer coloured by forward."""
    config = llm.model_config
    kind = "adapted to WeDLM" if config.is_wedlm else "an AR checkpoint, not adapted"
    dtype = str(llm.model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    out.print(f"[b]SmolLM2-135M-Instruct[/b] ({kind}), {dtype} on {llm.device}\n")
    for name, meaning in MODES.items():
        out.print(Text.assemble((f"  {name:15}", "bold"), meaning))
    out.print()
    llm.chat([{"role": "user", "content": "Hi"}], SamplingParams(max_tokens=2))  # the first forward warms up kernels
    shown: GenerationOutput | None = None
    differs = False
    for prompt in PROMPTS:
        outputs = {
            mode: llm.chat([{"role": "user", "content": prompt}], SamplingParams(decoding=mode, max_tokens=48))[0]  # type: ignore[arg-type]
            for mode in MODES
        }
        out.print(Text(f"> {prompt}", style="bold"))
        out.print(Text(outputs["verified"].text.strip() + "\n"))
        out.print(_table(outputs), "\n")
        shown = shown or outputs["verified"]
        differs |= outputs["verified"].token_ids != outputs["autoregressive"].token_ids
    if differs:
        out.print(Text(ROUNDING.format(dtype=dtype) + "\n", style="yellow"))
    if not config.is_wedlm:
        out.print(Text(UNADAPTED + "\n", style="yellow"))
    assert shown is not None
    out.print("The first answer once more; tokens of one colour became final in one forward (verified):")
    out.print(coloured(llm, shown), "\n")
    out.print(
        'Next: [b]wedlm chat[/b], [b]wedlm generate "your prompt"[/b], [b]wedlm --help[/b], examples/quickstart.ipynb'
    )


def _table(outputs: dict[str, GenerationOutput]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
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


def coloured(llm: LLM, output: GenerationOutput) -> Text:
    """The answer, tokens coloured by the forward that made them final."""
    text = Text()
    done = ""
    for index, step in enumerate(output.token_steps):
        whole = llm.tokenizer.decode(output.token_ids[: index + 1])
        if whole.startswith(done) and not whole.endswith("\ufffd"):
            text.append(whole[len(done) :], style=PALETTE[step % len(PALETTE)])
            done = whole
    return text
