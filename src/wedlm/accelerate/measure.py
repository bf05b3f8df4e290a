# SPDX-License-Identifier: Apache-2.0
"""Stage 4: what the adapter gains on prompts that it never saw, and whether the text stays.

Parts are measured one after another and each is on the disk once it is done, so that a run that was cut goes on behind
the last one.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from wedlm import LLM, SamplingParams
from wedlm.accelerate.answers import each_answer
from wedlm.engine.adaptive.fixed_rows import CountedRows
from wedlm.engine.outputs import GenerationOutput
from wedlm.model.formats.save import write_whole
from wedlm.native import NativeTransformer

Values = dict[str, Any]
Progress = Callable[[str, int, int], None]
Encode = Callable[[LLM], list[list[int]]]

SPEED_MODES = ("autoregressive", "verified", "auto")
_SPEED_PROMPTS, _SPEED_ROUNDS, _SPEED_TOKENS = 6, 3, 96


def same_arithmetic(model: str, adapter: Path, options: Mapping[str, Any]) -> Values:
    """Options under which base and adapter run the same arithmetic, exact whatever runs together.

    Those of the user count. On a CPU that runs the adapter natively these are the engine's defaults; elsewhere on a
    CPU float32, and on a GPU its deterministic kernels, unless it computes in float32 anyway.
    """
    chosen = dict(options)
    by_itself = options["dtype"] == "auto" and options["quantization"] == "auto"
    llm = LLM(model, adapter=str(adapter), **options)
    native, device, dtype = isinstance(llm.model, NativeTransformer), llm.device, llm.blueprint.dtype
    on_kernels = llm.blueprint.packed is not None
    del llm
    release()
    if device.type == "cpu" and not native and by_itself:
        chosen |= {"dtype": "float32", "quantization": "none"}
    elif device.type == "cuda" and on_kernels and dtype != torch.float32:
        chosen["deterministic"] = True
    return chosen


def release() -> None:
    """Give an engine's memory back before the next one is built."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Measurement:
    """The parts measured so far, in one JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts: dict[str, Values] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def part(self, name: str, measure: Callable[[], Values]) -> Values:
        """What was measured, or is measured now and kept."""
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
    """All prompts together: the ids of each answer, how many were cut, and tokens by forwards and by rows."""
    outputs: dict[int, GenerationOutput] = {}

    def done(place: int, output: GenerationOutput) -> None:
        outputs[place] = output
        progress(len(outputs))

    progress(0)
    each_answer(llm, prompts, params, done)
    stats = [output.stats for output in outputs.values() if output.stats is not None]
    tokens, forwards, rows = (
        sum(getattr(one, f"num_{what}") for one in stats) for what in ("tokens", "forwards", "rows")
    )
    return {
        "token_ids": [outputs[place].token_ids for place in range(len(prompts))],
        "cut": sum(output.finish_reason == "length" for output in outputs.values()),
        "tokens": tokens,
        "forwards": forwards,
        "tokens_per_forward": tokens / max(1, forwards),
        "p_cache": tokens / max(1, rows),
    }


def acceptance(
    llm: LLM, prompts: Sequence[list[int]], params: SamplingParams, progress: Callable[[int], None]
) -> Values:
    """Shares of drafts that verification accepts, by depth, every masked row drafted; tokens a step."""
    rows = params.wedlm_window_size or llm.engine.config.options.wedlm_window_size
    controller = llm.engine.controller
    before, controller.draft_budget = controller.draft_budget, (counted := CountedRows(rows))
    try:
        answer_all(llm, prompts, params, progress)
    finally:
        controller.draft_budget = before
    return {
        "trials": counted.trials,
        "shares": counted.shares,
        "tokens_per_step": counted.tokens / max(1, counted.steps),
    }


def speed(
    llm: LLM, prompts: Sequence[list[int]], params: Mapping[str, SamplingParams], progress: Callable[[int], None]
) -> Values:
    """Tokens a second of one stream, for each mode: the median of rounds in which modes take turns, and all rounds."""
    chosen = list(prompts[:_SPEED_PROMPTS])
    rates: dict[str, list[float]] = {mode: [] for mode in params}
    for mode in params:
        llm.generate(chosen[:1], params[mode], progress=False)  # costs, captures and first touches
    for number in range(_SPEED_ROUNDS):
        for mode in list(params)[:: 1 if number % 2 == 0 else -1]:
            tokens, began = 0, time.perf_counter()
            for prompt in chosen:
                llm.engine.pool.reset_prefix_cache()
                tokens += len(llm.generate([prompt], params[mode], progress=False)[0].token_ids)
            rates[mode].append(tokens / (time.perf_counter() - began))
            progress(sum(map(len, rates.values())))
    medians = {mode: statistics.median(found) for mode, found in rates.items()}
    return {"tok_per_s": medians, "rounds": rates, "prompts": len(chosen)}


class Measurer:
    """Measures a base and its adapter on the same prompts. ``rows``: most rows of a step."""

    def __init__(self, kept: Measurement, max_tokens: int, rows: int, progress: Progress) -> None:
        self.kept, self.max_tokens, self.rows, self._progress = kept, max_tokens, rows, progress

    def params(self, mode: str, **options: Any) -> SamplingParams:
        limits = {"temperature": 0.0, "max_tokens": self.max_tokens, "wedlm_window_size": self.rows}
        return SamplingParams(**{**limits, "decoding": mode, **options})

    def run(self, model: str, adapter: Path, encode: Encode, mask_token_id: int, options: Values) -> None:
        """Everything that is not there yet. ``encode`` gives an engine's prompts, ``options`` are the user's."""
        exact = self.kept.part("options", lambda: {"engine": same_arithmetic(model, adapter, options)})["engine"]
        if self.kept.lacks("base_ar", "before_verified", "before_depth"):
            self._base(LLM(model, mask_token_id=mask_token_id, **exact), encode)
            release()
        if self.kept.lacks("after_ar", "after_verified", "after_depth", "speed"):
            self._adapter(LLM(model, adapter=str(adapter), **exact), encode)
            release()
        if exact != options and self.kept.lacks("default_speed"):
            # What the base does as users run it, which may be another arithmetic.
            self._speed("default_speed", LLM(model, **options), encode, SPEED_MODES[:1], "the base by itself")
            release()

    def _base(self, llm: LLM, encode: Encode) -> None:
        self._texts("base", llm, encode(llm), "base_ar", "before")

    def _adapter(self, llm: LLM, encode: Encode) -> None:
        self._texts("adapter", llm, encode(llm), "after_ar", "after")
        self._speed("speed", llm, encode, SPEED_MODES, "one stream")

    def _speed(self, part: str, llm: LLM, encode: Encode, names: Sequence[str], what: str) -> None:
        modes = {mode: self.params(mode, max_tokens=min(self.max_tokens, _SPEED_TOKENS)) for mode in names}
        told = self._told(f"tokens a second, {what}", len(names) * _SPEED_ROUNDS)
        self.kept.part(part, lambda: {**speed(llm, encode(llm), modes, told), "engine": llm.describe()})

    def _texts(self, who: str, llm: LLM, encoded: list[list[int]], ar: str, when: str) -> None:
        total = len(encoded)
        told = self._told(f"{who}: AR", total)
        self.kept.part(
            ar, lambda: {**answer_all(llm, encoded, self.params("autoregressive"), told), "engine": llm.describe()}
        )
        told = self._told(f"{who}: verified", total)
        self.kept.part(f"{when}_verified", lambda: answer_all(llm, encoded, self.params("verified"), told))
        told = self._told(f"{who}: acceptance", total)
        every = self.params("auto", wedlm_draft_entropy=1e9)
        self.kept.part(f"{when}_depth", lambda: acceptance(llm, encoded, every, told))

    def _told(self, what: str, total: int) -> Callable[[int], None]:
        return lambda done: self._progress(what, done, total)


def same_texts(parts: Mapping[str, Mapping[str, Any]], name: str) -> int:
    """How many answers of a part are the base's, token for token."""
    return sum(a == b for a, b in zip(parts["base_ar"]["token_ids"], parts[name]["token_ids"], strict=True))
