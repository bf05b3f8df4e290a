# SPDX-License-Identifier: Apache-2.0
"""Where the host's time in a step goes: each stage has a clock, and waiting for the device is separate."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from wedlm.bench.stats import Figures
from wedlm.engine.engine import Engine
from wedlm.engine.execution.native_step import NativeStep
from wedlm.engine.execution.pending import DeviceStepResults

_STAGES = ("schedule", "rows", "launch", "replay", "fetch", "read", "deliver")


class _Clock:
    """Seconds by stage; the time of a stage inside another counts once."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                self.seconds[stage] = self.seconds.get(stage, 0.0) + took - self._inner.pop()
                self._inner[-1] += took

        return call


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of an object or a class inside the block."""
    held = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if held:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def host_work(engine: Engine, num_steps: int) -> Figures:
    """Milliseconds per step (medians). ``host_ms`` is everything except waiting for the device, which means an event's
    ``synchronize`` on a GPU and the model's forward on a CPU. Then come its stages, and the step as a whole."""
    per_step: list[dict[str, float]] = []
    for _ in range(num_steps):
        clock = _Clock()
        with ExitStack() as stack:
            for owner, name, stage in _stages(engine):
                stack.enter_context(_replaced(owner, name, clock.timed(stage, getattr(owner, name))))
            start = time.perf_counter()
            engine.step()
            took = time.perf_counter() - start
        seconds = {stage: clock.seconds.get(stage, 0.0) for stage in ("wait", *_STAGES)}
        others = {"host": took - seconds["wait"], "other": took - sum(seconds.values()), "step": took}
        per_step.append({**seconds, **others})
    order = ("host", *_STAGES, "other", "wait", "step")
    return {f"{stage}_ms": 1e3 * statistics.median(one[stage] for one in per_step) for stage in order}


def _stages(engine: Engine) -> list[tuple[Any, str, str]]:
    """(owner, method, stage) of each part of a step."""
    device = engine.runner.device
    wait: tuple[Any, str] = (engine.runner.eager, "model")
    if device.type == "cuda":
        wait = torch.cuda.Event, "synchronize"
    elif isinstance(step := engine.runner.executors[0], NativeStep):
        wait = step.decoder, "run"
    return [
        (DeviceStepResults, "__init__", "fetch"),
        (DeviceStepResults, "wait", "read"),
        *([(torch.cuda.CUDAGraph, "replay", "replay")] if device.type == "cuda" else []),
        (engine.scheduler, "schedule", "schedule"),
        (engine.scheduler, "rows_beside_prompts", "schedule"),
        (engine.controller, "set_row_budgets", "rows"),
        (engine.controller, "observe", "rows"),
        (engine.runner, "launch", "launch"),
        (engine.runner, "run", "launch"),
        (engine, "process", "deliver"),
        (*wait, "wait"),
    ]
