# SPDX-License-Identifier: Apache-2.0
"""``wedlm train``, also as ``accelerate launch -m wedlm.train``: takes arguments and returns an exit code.

Its options are the fields of ``TrainConfig``, which need pydantic and are read as YAML, so this command reads its
options itself.
"""

import os
import sys
from pathlib import Path

import typer

from wedlm.extras import install_extras
from wedlm.train.optional_deps import ALWAYS, is_missing, require

FAILED, INTERRUPTED = 1, 130
_USAGE = """\
Train a WeDLM from an AR checkpoint, train one further, or fine-tune with the AR loss alone.

wedlm train CONFIG.yaml [--KEY VALUE ...]    train, or continue from the latest checkpoint under output_dir
wedlm train --KEY VALUE ...                  the same without a file
wedlm train --plot DIR [DIR ...]             draw the curves of runs to the first DIR/curves.png
wedlm train --data alpaca --download         fetch the set of the original's example to data/alpaca_cleaned_sft.jsonl
accelerate launch -m wedlm.train CONFIG.yaml on several devices; --config_file for FSDP2, DeepSpeed

Values are read as YAML: --train_data '[a.jsonl, {path: b.jsonl, repeat: 2}]'. docs/training.md explains the keys.

Keys (default):
"""


def train(ctx: typer.Context) -> None:
    """Adapt an AR checkpoint to WeDLM, or fine-tune: CONFIG.yaml --key value ..."""
    raise typer.Exit(main(ctx.args))


def main(arguments: list[str]) -> int:
    """Do what the arguments say. Faults of the input, the disk or the numbers are one sentence on standard error.

    If there are several processes, only the first on each machine prints.
    """
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        _run(arguments, speaks)
    except KeyboardInterrupt:
        return _fail("stopped; the same command continues from the latest checkpoint", speaks, INTERRUPTED)
    except (ValueError, OSError, FloatingPointError) as error:  # CheckpointError is a ValueError
        return _fail(str(error), speaks)
    except RuntimeError as error:
        from wedlm.model.errors import DemoModelError  # slow: it imports torch

        if not isinstance(error, DemoModelError):
            raise
        return _fail(str(error), speaks)
    return 0


def _fail(sentence: str, speaks: bool, code: int = FAILED) -> int:
    if speaks:
        print(sentence, file=sys.stderr)
    return code


def _run(arguments: list[str], speaks: bool) -> None:
    if not arguments or {"--help", "-h"} & set(arguments):
        if speaks:
            print(_USAGE + _keys(), end="")
        return
    for package in ALWAYS:
        require(package)
    from wedlm.train.config import load_config, parse_overrides

    if arguments[0] == "--plot":
        from wedlm.train.plot import draw_curves

        print(draw_curves([Path(name) for name in arguments[1:]]))
        return
    if arguments[0] == "--data":
        if arguments[1:] != ["alpaca", "--download"]:
            raise ValueError(f"the arguments are {' '.join(arguments)}; expected --data alpaca --download")
        from wedlm.train.alpaca import download

        print("{}: {:,} conversations".format(*download()))
        return
    if arguments[0] == "--config":  # as the original's script has it
        arguments = arguments[1:]
        if not arguments or arguments[0].startswith("--"):
            raise ValueError("--config has no value; expected --config FILE")
    path, rest = (None, arguments) if arguments[0].startswith("--") else (arguments[0], arguments[1:])
    config = load_config(path, parse_overrides(rest))
    from wedlm.train.trainer import Trainer

    result = Trainer(config).run()
    if os.environ.get("RANK", "0") == "0":
        print(result)
    _leave()


def _leave() -> None:
    """Disconnect the processes in order; without this torch complains as they end."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _keys() -> str:
    if any(map(is_missing, ALWAYS)):
        return f"They are shown here once the packages of training are installed: {install_extras('train')}\n"
    from wedlm.train.config import TrainConfig

    lines = []
    for name, field in TrainConfig.model_fields.items():
        default = "" if field.is_required() else f" ({'none' if field.default is None else field.default})"
        lines.append(f"--{name}{default}\n    {' '.join((field.description or '').split())}\n")
    return "".join(lines)
