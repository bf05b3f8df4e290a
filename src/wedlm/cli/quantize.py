# SPDX-License-Identifier: Apache-2.0
"""``wedlm quantize``: writes a checkpoint in fewer bits."""

from pathlib import Path
from typing import Annotated

import typer

from wedlm.cli.options import command
from wedlm.cli.terminal import note, out, status


@command
def quantize(
    source: Annotated[str, typer.Argument(help="Checkpoint directory, .gguf file, hub id, 'demo' or 'demo-base'.")],
    output: Annotated[Path, typer.Argument(help="Directory, or .gguf file, to write.")],
    to: Annotated[
        str | None, typer.Option(help="int8 (a directory) or gguf; default: gguf if the output ends in .gguf.")
    ] = None,
    type: Annotated[
        str | None,
        typer.Option(
            help="Type of a GGUF file: f32, f16, bf16, q8_0 (the default), q4_0, q4_1, q5_0, q5_1, q4_k, q5_k, q6_k or "
            "q4_k_m, a mixture."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write a checkpoint in fewer bits, to save disk and memory, or as GGUF for llama.cpp.

    \b
    Examples:
    wedlm quantize ./my-wedlm ./my-wedlm-int8
    wedlm quantize ./my-wedlm my-wedlm.gguf --type q4_k_m
    """
    run_quantize(source, output, to, type, force)


def run_quantize(source: str, output: Path, to: str | None, type: str | None, force: bool) -> None:
    """Write the checkpoint and say what it is. Raises ValueError."""
    with status("Loading torch ..."):
        from wedlm.model.formats.resolve import locate
        from wedlm.model.quantize_checkpoint import quantize_checkpoint
    locate(source)  # outside the status line: a download shows its own progress
    with status(f"Writing {output} from {source} ..."):
        made = quantize_checkpoint(source, output, to=to, type=type, force=force)
    out.print(str(made.path), markup=False, soft_wrap=True)
    note(f"{made.form}; {made.num_bytes / 1e6:,.0f} MB")
