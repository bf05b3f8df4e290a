# SPDX-License-Identifier: Apache-2.0
"""Write a WeDLM checkpoint so that vLLM decodes it by streaming: ``python -m wedlm_vllm.convert CHECKPOINT OUT``."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wedlm.algorithm.params import NEXT_TOKENS, DecodeParams
from wedlm.bench.vllm import as_autoregressive
from wedlm.model import CheckpointError, DemoModelError, load_model, load_tokenizer, save_model
from wedlm.model.formats.checkpoint import with_end_tokens
from wedlm.model.formats.save import write_whole
from wedlm_vllm import ARCHITECTURES
from wedlm_vllm.settings import StreamingSettings


def convert(checkpoint: str | Path, output: str | Path, dtype: str | None = None, **given: Any) -> StreamingSettings:
    """Write weights, tokenizer and a ``config.json`` that names the plug-in's model and ``StreamingSettings``.

    ``checkpoint``: whatever ``wedlm.load_model`` reads, "demo" included. ``dtype``: of the weights; None keeps theirs.
    ``given``: fields of ``StreamingSettings``; what is not given is the checkpoint's, or as in our engine. Raises
    ValueError, with nothing written, for a checkpoint that cannot stream or a directory that is not empty.
    """
    import torch

    output = Path(output).expanduser()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists; expected a new or empty directory")
    model, config = load_model(checkpoint, None if dtype is None else getattr(torch, dtype))
    if not config.is_wedlm or config.mask_token_id is None:
        raise ValueError(f"{checkpoint} was never adapted to WeDLM, or sees by blocks; expected one that streams")
    window = given.get("window_size", DecodeParams.window_size)
    settings = StreamingSettings(
        **{
            "num_rows": 2 * window,
            "entropy_threshold": config.default_entropy_threshold,
            "next_token": config.default_next_token,
            "mask_token_id": config.mask_token_id,
            **given,
        }
    )
    tokenizer = load_tokenizer(checkpoint)
    config = as_autoregressive(with_end_tokens(config, tokenizer.end_token_ids()))
    config = dataclasses.replace(
        config,
        decoding="streaming",
        next_token=settings.next_token,
        entropy_threshold=settings.entropy_threshold or None,
    )
    output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(output)
    ends = {"eos_token_id": list(config.eos_token_ids), "bos_token_id": config.bos_token_id}
    _write_json(output / "generation_config.json", ends)
    save_model(model, config, output)
    values = json.loads((output / "config.json").read_text(encoding="utf-8"))
    values |= {"architectures": [ARCHITECTURES[config.model_type]], **settings.to_hf()}
    _write_json(output / "config.json", values)
    return settings


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with write_whole(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wedlm_vllm.convert", description=__doc__)
    parser.add_argument("checkpoint", help="directory, .gguf file, hub id, or demo")
    parser.add_argument("output", type=Path, help="new directory")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")
    add_settings(parser)
    given = vars(parser.parse_args(arguments))
    checkpoint, output, dtype = (given.pop(name) for name in ("checkpoint", "output", "dtype"))
    try:
        settings = convert(checkpoint, output, dtype, **given)
    except (ValueError, OSError, CheckpointError, DemoModelError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{output}: {settings}\nServe it: vllm serve {output}")
    return 0


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Options for fields of ``StreamingSettings``; only what was given is in the result."""
    absent = argparse.SUPPRESS
    parser.add_argument("--window-size", type=int, default=absent, help="W; default: 16")
    parser.add_argument("--num-rows", type=int, default=absent, help="rows of a step, W + 1 to 2W; default: 2W")
    parser.add_argument(
        "--entropy-threshold", type=_threshold, default=absent, help="τ in nats, or none; default: the checkpoint's"
    )
    parser.add_argument("--pos-penalty", type=float, default=absent, help="λ in nats; default: 0.02")
    parser.add_argument("--next-token", choices=NEXT_TOKENS, default=absent, help="default: the checkpoint's")


def _threshold(text: str) -> float | None:
    return None if text == "none" else float(text)


if __name__ == "__main__":
    sys.exit(main())
