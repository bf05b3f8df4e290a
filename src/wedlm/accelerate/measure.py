# SPDX-License-Identifier: Apache-2.0
"""Stage 4: measure what the adapter gains on held-out prompts, and whether the text stays the same.

The parts run one after another, and each is on disk once it is done, so that a run that was stopped continues after the
last finished part.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from wedlm import LLM, SamplingParams
from wedlm.engine.adaptive.fixed_rows import CountedRows
from wedlm.engine.factory import eager_reason, release_memory
from wedlm.engine.outputs import GenerationOutput, Totals
from wedlm.engine.resolve_options import read_device, read_dtype
from wedlm.model.formats.checkpoint import open_checkpoint
from wedlm.model.formats.save import write_whole
from wedlm.native import NativeTransformer

Values = dict[str, Any]
Progress = Callable[[str, int, int], None]
Encode = Callable[[LLM], list[list[int]]]

# However unsure a masked row is, it is drafted, and no draft comes from the text so far.
MASKED_ROWS_ALONE: dict[str, Any] = {"wedlm_draft_entropy": 1e9, "wedlm_lookup_drafts": 0}
SPEED_MODES, BASE_MODES = ("autoregressive", "verified", "auto"), ("autoregressive", "auto")
_SPEED_PROMPTS, _SPEED_ROUNDS, _SPEED_TOKENS = 6, 3, 96


def same_arithmetic(model: str, adapter: Path, options: Mapping[str, Any]) -> Values:
    """Options under which base and adapter run the same arithmetic, one that is exact whatever runs together.

    The user's options take precedence. Otherwise a GPU uses its deterministic kernels, unless it computes in float32 or
    without kernels; a CPU that runs the adapter natively uses the engine's defaults, and any other CPU float32.
    """
    device = read_device(options["device"])
    if device.type == "cuda":
        config = open_checkpoint(model).config
        dtype = read_dtype(options["dtype"], device) or getattr(torch, config.dtype)
        on_kernels = eager_reason(None, device, config) is None
        return {**options, "deterministic": True} if on_kernels and dtype != torch.float32 else dict(options)
    by_itself = options["dtype"] == "auto" and options["quantization"] == "auto"
    if by_itself and not isinstance(LLM(model, adapter=str(adapter), **options).model, NativeTransformer):
        return {**options, "dtype": "float32", "quantization": "none"}
    return dict(options)


class Measurement:
    """The parts measured so far, kept in one JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: dict[str, Values] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def part(self, name: str, measure: Callable[[], Values]) -> Values:
        """The result of a part; measures and keeps it if it does not exist yet."""
        if name not in self.parts:
            began = time.perf_counter()
            values = measure()
            self.parts[name] = values | {"seconds": round(time.perf_counter() - began, 1)}
            with write_whole(self.path) as temporary:
                temporary.write_text(json.dumps(self.parts) + "\n", encoding="utf-8")
        return self.parts[name]

    def lacks(self, *names: str) -> bool:
        return any(name not in self.parts for name in names)


def answer_all(
    llm: LLM, prompts: Sequence[list[int]], params: SamplingParams, progress: Callable[[int], None]
) -> Values:
    """Answer all prompts together. Gives the ids of each answer, its number of forwards, whether it ended, and tokens
    per forward and per row."""
    outputs: dict[int, GenerationOutput] = {}
    progress(0)
    for place, output in llm.generate_each(prompts, params):
        outputs[place] = output
        progress(len(outputs))
    found = [outputs[place] for place in range(len(prompts))]
    totals = Totals.of(found)
    return {
        "token_ids": [output.token_ids for output in found],
        "ended": [output.finish_reason == "stop" for output in found],
        "forwards": [output.stats.num_forwards for output in found if output.stats is not None],
        "tokens_per_forward": totals.tokens_per_forward,
        "p_cache": totals.p_cache,
    }


def drafted(llm: LLM, prompts: Sequence[list[int]], params: SamplingParams, progress: Callable[[int], None]) -> Values:
    """Run ``answer_all`` with verified decoding that drafts every masked row, however uncertain. Also gives the share
    of drafts accepted by depth, with the number of trials. ``params`` are for auto decoding with a fixed number of
    rows."""
    rows = params.wedlm_window_size or llm.engine.config.window_size("auto")
    controller = llm.engine.controller
    before, controller.draft_budget = controller.draft_budget, (counted := CountedRows(rows))
    try:
        values = answer_all(llm, prompts, params, progress)
    finally:
        controller.draft_budget = before
    return {**values, "trials": counted.trials, "shares": counted.shares}


def speed(
    llm: LLM, prompts: Sequence[list[int]], params: Mapping[str, SamplingParams], progress: Callable[[int], None]
) -> Values:
    """Tokens a second of one stream in each mode: the median over rounds in which the modes take turns, and all rounds.

    A discarded round comes first, in which costs are measured, graphs captured and memory touched for the first time.
    """
    chosen = list(prompts[:_SPEED_PROMPTS])
    rates: dict[str, list[float]] = {mode: [] for mode in params}
    forwards: dict[str, float] = {}
    for number in range(1 + _SPEED_ROUNDS):
        for mode in list(params)[:: 1 if number % 2 == 0 else -1]:
            began, outputs = time.perf_counter(), []
            for prompt in chosen:
                llm.engine.pool.reset_prefix_cache()
                outputs += llm.generate([prompt], params[mode], progress=False)
            took, totals = time.perf_counter() - began, Totals.of(outputs)
            forwards[mode] = totals.tokens_per_forward
            if number:
                rates[mode].append(totals.num_tokens / took)
                progress(sum(map(len, rates.values())))
    medians = {mode: statistics.median(found) for mode, found in rates.items()}
    return {"tok_per_s": medians, "rounds": rates, "tokens_per_forward": forwards, "prompts": len(chosen)}


class Measurer:
    """Measures a base and its adapter on the same prompts. ``rows`` is the largest number of rows of a step."""

    def __init__(self, kept: Measurement, max_tokens: int, rows: int, progress: Progress) -> None:
        self.kept, self.max_tokens, self.rows, self._progress = kept, max_tokens, rows, progress

    def params(self, mode: str, **options: Any) -> SamplingParams:
        limits = {"temperature": 0.0, "max_tokens": self.max_tokens, "wedlm_window_size": self.rows}
        return SamplingParams(**{**limits, "decoding": mode, **options})

    def run(self, model: str, adapter: Path, encode: Encode, mask_token_id: int, options: Values) -> None:
        """Measure all missing parts. ``encode`` turns prompts into an engine's token ids; ``options`` are the
        user's."""
        exact = self.kept.part("options", lambda: {"engine": same_arithmetic(model, adapter, options)})["engine"]
        if self.kept.lacks("base_ar", "before"):
            self._base(LLM(model, mask_token_id=mask_token_id, **exact), encode)
            release_memory()
        if self.kept.lacks("after_ar", "after", "speed"):
            self._adapter(LLM(model, adapter=str(adapter), **exact), encode)
            release_memory()
        if self.kept.lacks("base_speed"):
            # As users run it: perhaps in another arithmetic, and with drafts from the text alone.
            self._speed("base_speed", LLM(model, **options), encode, BASE_MODES, "the base by itself")
            release_memory()

    def _base(self, llm: LLM, encode: Encode) -> None:
        self._texts("base", llm, encode(llm), "base_ar", "before")

    def _adapter(self, llm: LLM, encode: Encode) -> None:
        self._texts("adapter", llm, encode(llm), "after_ar", "after")
        self._speed("speed", llm, encode, SPEED_MODES, "one stream")

    def _speed(self, part: str, llm: LLM, encode: Encode, names: Sequence[str], what: str) -> None:
        modes = {mode: self.params(mode, max_tokens=min(self.max_tokens, _SPEED_TOKENS)) for mode in names}
        told = self._told(f"tokens a second, {what}", len(names) * _SPEED_ROUNDS)
        self.kept.part(part, lambda: {**speed(llm, encode(llm), modes, told), "engine": llm.describe()})

    def _texts(self, who: str, llm: LLM, encoded: list[list[int]], ar: str, verified: str) -> None:
        told = self._told(f"{who}, AR", len(encoded))
        plain, every = self.params("autoregressive"), self.params("auto", **MASKED_ROWS_ALONE)
        self.kept.part(ar, lambda: {**answer_all(llm, encoded, plain, told), "engine": llm.describe()})
        told = self._told(f"{who}, verified", len(encoded))
        self.kept.part(verified, lambda: drafted(llm, encoded, every, told))

    def _told(self, what: str, total: int) -> Callable[[int], None]:
        return lambda done: self._progress(what, done, total)


def same_texts(parts: Mapping[str, Mapping[str, Any]], name: str) -> int:
    """How many answers of a part equal the base's, token for token."""
    return sum(a == b for a, b in zip(parts["base_ar"]["token_ids"], parts[name]["token_ids"], strict=True))
