# SPDX-License-Identifier: Apache-2.0
"""The command ``wedlm``. torch is imported only once a command needs it, so that --help answers at once."""

import os
import sys
from importlib import import_module
from typing import Annotated

import typer

from wedlm import __version__

# Command -> module of this package and its function. None of the modules imports torch until its function runs.
COMMANDS = {
    "generate": "generate:generate",
    "chat": "chat:chat",
    "demo": "demo:demo",
    "init": "init:init",
    "quantize": "quantize:quantize",
    "serve": "serve:serve",
    "deploy": "deploy:deploy",
    "bench": "bench:bench",
    "report": "report:report",
    "compare": "compare:compare",
    "eval": "eval:evaluate",
    "train": "train:train",
    "accelerate": "accelerate:accelerate",
    "doctor": "doctor:doctor",
}

# \b keeps the line breaks of a paragraph.
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="""Causal diffusion language models: several tokens a forward under the plain causal mask.

\b
Decoding modes (--decoding):
[b]auto[/b]            verified, with as many rows as pay under the load; AR's text; mostly the default
[b]verified[/b]        drafts tokens and checks them in the same forward; AR's text
[b]streaming[/b]       fills positions as they become certain; the default of the paper's checkpoints
[b]block[/b]           fills one block of positions completely, then the next
[b]autoregressive[/b]  one token a forward; the baseline

\b
Examples:
wedlm demo
wedlm chat --system "Answer in one sentence."
wedlm generate "What is a prime number?" --max-tokens 64
wedlm serve
wedlm deploy ray --replicas 4
wedlm train config.yaml
wedlm accelerate ./my-model --output ./faster
wedlm eval --tasks gsm8k --data-dir ./data
wedlm bench --threads 2
wedlm doctor
wedlm COMMAND --help""",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"wedlm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Takes its help text from the app."""


for _name, _place in COMMANDS.items():
    _module, _function = _place.split(":")
    _own = _name == "train"  # reads its options itself
    app.command(
        _name,
        add_help_option=not _own,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True} if _own else None,
    )(getattr(import_module(f"{__name__}.{_module}"), _function))


def main() -> None:
    """Entry point."""
    _open_standard_streams()
    app()


def _open_standard_streams() -> None:
    """Make a standard stream that the caller closed an empty one. Python has None for it, and the next file that is
    opened would take its number."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)  # or it would be closed again in the processes that we start
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8"))
