# SPDX-License-Identifier: Apache-2.0
"""Print an answer on the terminal as it comes, with a line of figures."""

from typing import TYPE_CHECKING

from wedlm.cli.terminal import PALETTE, Interrupt, WrappedText, note, write

if TYPE_CHECKING:
    from wedlm import LLM, GenerationOutput, SamplingParams
    from wedlm.engine.request import RequestStats


def stream_answer(
    llm: "LLM", prompt: str | list[int], params: "SamplingParams", interrupt: Interrupt, coloured: bool
) -> "GenerationOutput":
    """Print an answer as it becomes final, and its figures. Ctrl-C ends it; the text so far stays."""
    output, last, shown = None, "\n", WrappedText()
    for piece in llm.generate_stream(prompt, params):
        shown.write(piece.text, PALETTE[piece.step % len(PALETTE)] if coloured else "")
        output, last = piece.output, piece.text[-1:] or last
        if interrupt.asked:
            llm.abort()
    shown.end()
    assert output is not None, "the last piece of a stream carries the output"
    if last != "\n":
        write("\n")
    assert output.stats is not None
    note(("stopped; " if output.finish_reason == "abort" else "") + stats_line(output.stats))
    return output


def stats_line(stats: "RequestStats") -> str:
    """One line of figures, which always gives p_cache next to tokens per forward."""
    return (
        f"{stats.decoding}: {stats.num_tokens} tokens / {stats.num_forwards} forwards = "
        f"{stats.tokens_per_forward:.2f}, p_cache {stats.p_cache:.2f}, {stats.tokens_per_second:.0f} tok/s"
    )
