# SPDX-License-Identifier: Apache-2.0
"""``wedlm init``: makes a WeDLM directory from an AR checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from wedlm.cli.options import command
from wedlm.cli.terminal import note, out, status


@command
def init(
    source: Annotated[str, typer.Argument(help="AR checkpoint: directory, .gguf file, hub id, or 'demo-base'.")],
    output: Annotated[Path, typer.Argument(help="Directory to write.")],
    mask_token_id: Annotated[int | None, typer.Option(help="Mask token; default: one that text never needs.")] = None,
    block_size: Annotated[int, typer.Option(help="Noise block of training, in tokens.")] = 32,
    force: Annotated[bool, typer.Option("--force", help="Write into a directory that is not empty.")] = False,
) -> None:
    """Make a WeDLM directory, ready for training, from an AR checkpoint.

    \b
    Examples:
    wedlm init demo-base ./my-wedlm
    wedlm init ./my-ar-model ./my-wedlm --block-size 32
    """
    run_init(source, output, mask_token_id, block_size, force)


def run_init(source: str, output: Path, mask_token_id: int | None, block_size: int, force: bool) -> None:
    """Make the directory and say what it contains. Raises ValueError."""
    with status("Loading torch ..."):
        from wedlm.model.formats.resolve import locate
        from wedlm.model.init_checkpoint import init_checkpoint
    locate(source)  # outside the status line: a download shows its own progress
    with status(f"Making {output} from {source} ..."):
        made = init_checkpoint(source, output, mask_token_id=mask_token_id, block_size=block_size, force=force)
    config, token = made.config, made.mask_token
    out.print(str(made.directory), markup=False, soft_wrap=True)
    note(
        f"{config.model_type}, {config.num_layers} layers, {config.dtype}; block size {config.block_size}; "
        f"mask token {config.mask_token_id}, " + ("an id that text does not use" if token is None else repr(token))
    )
    note("Its masked rows are not trained yet: next comes `wedlm train`.")
