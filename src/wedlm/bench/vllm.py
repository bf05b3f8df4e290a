# SPDX-License-Identifier: Apache-2.0
"""vLLM's AR decoding on the same weights, in separate processes that end before our engine is made.

It runs in our type of weights; if that is FP8, also in bfloat16; and on a checkpoint also with its own speculation from
n-grams, which needs no other weights.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from wedlm.bench.prompts import Prompts
from wedlm.bench.settings import Settings
from wedlm.bench.shapes import shape_config
from wedlm.bench.stats import TableRow
from wedlm.engine import resolve_options
from wedlm.model import ModelConfig, load_model, load_tokenizer, save_model

# Over several GPUs these all-reduces of its, and a fusion that its compiler makes (``vllm_worker.py``), may use NVLink
# multicast, which not every machine lets a program have.
_NO_MULTICAST = {"VLLM_ALLREDUCE_USE_SYMM_MEM": "0", "VLLM_ALLREDUCE_USE_FLASHINFER": "0"}
_NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4}
_MEASURABLE = ("latency", "throughput", "serving", "steps", "prefill")
_TIMEOUT_S = 900.0
_SHOWN_CHARACTERS = 400


def check_vllm() -> None:
    """Raises ValueError if vLLM is not installed."""
    if find_spec("vllm") is None:
        raise ValueError("--against is vllm, which is not installed here; expected an environment with it")


def measure_vllm(settings: Settings, timeout_s: float | None) -> dict[str, Any]:
    """Rows by part, for those of our parts that vLLM can run, and ``versions``. ``error`` is added if vLLM failed or
    took too long, besides the parts that it had finished. The same follows for each of ``variants``, under its name."""
    others = variants(settings)
    each = (timeout_s or _TIMEOUT_S) / (1 + len(others))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        task = _task(settings, directory)
        found = _run(task, directory, each)
        for other, changes in others.items():
            found[other] = _run({**task, **changes}, directory, each)
    return found


def variants(settings: Settings) -> dict[str, dict[str, Any]]:
    """What else vLLM is measured as: changes to the task, by name."""
    found: dict[str, dict[str, Any]] = {}
    if settings.engine.get("quantization") == "fp8":
        found["bfloat16"] = {"quantization": None, "parts": ["steps", "prefill"]}
    if settings.model is not None:
        parts = [part for part in ("latency", "throughput") if part in settings.parts]
        found |= {"ngram": {"speculation": _NGRAM, "parts": parts}} if parts else {}
    return found


def _run(values: dict[str, Any], directory: Path, timeout_s: float) -> dict[str, Any]:
    """Run one process and return what it found."""
    task, found, log = (directory / file for file in ("task.json", "found.json", "log.txt"))
    found.unlink(missing_ok=True)
    task.write_text(json.dumps(values))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "wedlm.bench.vllm_worker", str(task), str(found)],
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "VLLM_LOGGING_LEVEL": "WARNING", **_NO_MULTICAST},
        )  # fmt: skip
        try:
            code = process.wait(timeout_s)
            error = None if code == 0 else f"vLLM's process ended with code {code}: {_last_words(log)}"
        except subprocess.TimeoutExpired:
            error = f"vLLM took longer than {timeout_s:.0f} s"
        finally:
            _end_all(process)
    rows: dict[str, Any] = json.loads(found.read_text()) if found.exists() else {}
    return rows if error is None else {**rows, "error": error}


def _end_all(process: "subprocess.Popen[bytes]") -> None:
    """End the process and its children, because vLLM's engine is a process, too, and holds the GPU's memory."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["(no output)"])[-1][-_SHOWN_CHARACTERS:]


def _task(settings: Settings, directory: Path) -> dict[str, Any]:
    """Everything the worker needs; the weights are in ``directory`` or where they were."""
    workload = settings.workload
    dtype = resolve_options.read_dtype(settings.dtype, resolve_options.read_device(settings.device))
    if settings.shape is not None:
        config, model, dtype = shape_config(settings.shape), directory, dtype or torch.bfloat16
        (directory / "config.json").write_text(json.dumps(config.to_hf()))
        prompts = Prompts(None, config.vocab_size, config.max_length)
    else:
        assert settings.model is not None
        weights, config = load_model(settings.model, dtype)
        dtype, model = weights.model.embed_tokens.weight.dtype, directory
        save_model(weights, as_autoregressive(config), directory)
        prompts = Prompts(load_tokenizer(settings.model), config.vocab_size, config.max_length)
    everything = prompts.arrivals(workload.requests, workload.answer, float("inf"))
    spaced = prompts.arrivals(workload.requests, workload.answer, 1.0)  # one a second; the worker sets the rate
    largest = prompts.batch(max(workload.batches), workload.prompt, workload.answer)
    return {
        "model": str(model),
        "load_format": "auto" if settings.shape is None else "dummy",
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": settings.engine.get("quantization"),
        "tensor_parallel_size": settings.engine.get("tensor_parallel_size", 1),
        "speculation": None,
        "max_model_len": min(config.max_length, max(workload.long_prompt + 16, 4096)),
        "max_num_seqs": max(workload.batches),
        "ignore_eos": settings.shape is not None,
        "eos_token_ids": list(config.eos_token_ids),
        "parts": [part for part in _MEASURABLE if part in settings.parts or part == "steps"],
        "batches": workload.batches,
        "runs": workload.runs,
        "steps": 2 * workload.steps,
        "answer": workload.answer,
        "prompts": [one.prompt for one in largest],
        "arrivals": [asdict(replace(one, at_s=spaced[i].at_s)) for i, one in enumerate(everything)],
        "rate": settings.rate,
        "long_prompt": prompts.of(0, min(workload.long_prompt, config.max_length - 2)),
    }


def as_autoregressive(config: ModelConfig) -> ModelConfig:
    """The same weights under a name that AR engines know."""
    if config.model_type != "wedlm":
        return config
    known = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    return replace(config, model_type=known)


def rows_of(found: dict[str, Any]) -> dict[str, Sequence[TableRow]]:
    """The rows in the result of ``measure_vllm``."""
    return {part: rows for part, rows in found.items() if part in _MEASURABLE}
