# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint in fewer bits: as a directory in eight bits, or as a GGUF file."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from wedlm.model.config import QUANTIZATION_CONFIG
from wedlm.model.formats.checkpoint import WEIGHTS_FILE, open_checkpoint
from wedlm.model.formats.gguf_write import GGUF_TYPES, write_gguf
from wedlm.model.formats.int8_rows import write_int8
from wedlm.model.formats.resolve import locate
from wedlm.model.formats.save import write_whole
from wedlm.model.formats.tokenizer import load_tokenizer
from wedlm.model.init_checkpoint import check_output, copy_companions, remove_checkpoint

FORMS = ("int8", "gguf")
DEFAULT_TYPE = "q8_0"


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What was written: ``form`` for users, and the bytes of the weights before (in their type) and after."""

    path: Path
    form: str
    num_bytes: int


def quantize_checkpoint(
    source: str | Path,
    output: str | Path,
    *,
    to: str | None = None,
    type: str | None = None,
    force: bool = False,
) -> QuantizeResult:
    """Write ``source`` (anything that ``load_model`` takes) in fewer bits to ``output``.

    ``to`` "int8" writes a directory that ``LLM`` loads like any other; "gguf" a file of ``type`` (``GGUF_TYPES``;
    default q8_0), also for llama.cpp; None decides by the name of ``output``. ``force`` lets it replace what is there.
    Raises ValueError, with nothing written.
    """
    output = Path(output).expanduser()
    if to is None:
        to = "gguf" if output.suffix == ".gguf" else "int8"
    if to not in FORMS:
        raise ValueError(f"to is {to!r}; expected one of {', '.join(FORMS)}")
    if to == "int8" and type is not None:
        raise ValueError(f"type is {type!r}, which is a type of GGUF files; expected --to gguf, or none")
    type = (type or DEFAULT_TYPE).lower()
    if type not in GGUF_TYPES:
        raise ValueError(f"type is {type!r}; expected one of {', '.join(GGUF_TYPES)}")
    return _write_gguf(source, output, type, force) if to == "gguf" else _write_int8(source, output, force)


def _write_gguf(source: str | Path, output: Path, type: str, force: bool) -> QuantizeResult:
    origin = locate(source)
    if output.is_dir() or output.suffix != ".gguf":
        raise ValueError(f"{output} is not the name of a GGUF file; expected one that ends in .gguf")
    if output.exists() and output.samefile(origin):
        raise ValueError(f"{output} is the source itself; expected another file to write to")
    if output.exists() and not force:
        raise ValueError(f"{output} exists; expected a new file, or --force (force=True)")
    checkpoint, tokenizer = open_checkpoint(source), load_tokenizer(source)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(output, checkpoint, tokenizer, type, Path(str(source)).stem)
    return QuantizeResult(output, f"GGUF, {type.upper()}", output.stat().st_size)


def _write_int8(source: str | Path, output: Path, force: bool) -> QuantizeResult:
    origin = locate(source)
    check_output(output, origin, force)
    checkpoint, tokenizer = open_checkpoint(source), load_tokenizer(source)
    remove_checkpoint(output)
    copy_companions(origin, tokenizer, output)
    weights = output / WEIGHTS_FILE
    write_int8(weights, checkpoint.tensors(), checkpoint.shapes, torch.float32, {"format": "pt"})
    values = checkpoint.config.to_hf() | {"quantization_config": QUANTIZATION_CONFIG}
    with write_whole(output / "config.json") as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return QuantizeResult(output, "int8, one scale for each output", weights.stat().st_size)
