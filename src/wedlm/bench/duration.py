# SPDX-License-Identifier: Apache-2.0
"""How long a run will take, announced before it begins. The estimate is right to a factor of two, without captures and
compilation."""

from collections.abc import Callable

from wedlm.bench.prompts import Arrival
from wedlm.bench.settings import LLAMACPP_PARTS, Settings
from wedlm.bench.target import Target

_PROMPT_TOKENS_A_STEP = 20  # of a prompt, in the time of a step
_SEQUENCES = 8  # more, in a step of twice the time
_AUTO_WARM = 60
# Steps of one row, in engines of both kinds, that one run of a part beside llama.cpp takes at the usual workload.
_LLAMACPP_STEPS = {"step": 600, "chat": 7000, "streams": 3500, "prompt": 2500, "cold": 600, "busy": 900}
_LLAMACPP_START_STEPS = 1500  # until its servers are up, once a part


def step_seconds(target: Target) -> float:
    """Seconds of an AR step of one stream, measured now."""
    from wedlm.bench.loop import Loop
    from wedlm.engine.sampling_params import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=8, decoding="autoregressive", ignore_eos=True)
    prompt = target.prompts.of(0, 16)
    for _ in range(2):  # the first one warms up
        figures = Loop(target).serve([Arrival(0.0, prompt, 8)], params)
    return figures["seconds"] / 8


def expected_seconds(settings: Settings, step_s: float) -> float:
    """Expected seconds of all parts, given the length of a step of one row."""
    workload = settings.workload
    if settings.against == "llamacpp":
        share = {"chat": workload.chats * workload.answer / 256, "streams": workload.answer / 64}
        counted = sum(
            _LLAMACPP_START_STEPS + _LLAMACPP_STEPS[part] * share.get(part, workload.steps / 32) * (workload.runs + 1)
            for part in settings.parts
            if part in LLAMACPP_PARTS
        )
        return counted * step_s
    runs, modes, answer = workload.runs + 1, len(settings.modes), workload.answer
    fixed = workload.steps + workload.warm_steps
    batches = sum(1 + batch / _SEQUENCES for batch in workload.batches)
    steps: dict[str, Callable[[], float]] = {
        "latency": lambda: runs * modes * answer,
        "throughput": lambda: runs * modes * answer * batches,
        "serving": lambda: (runs * modes + 2) * workload.requests * answer / 2,
        "prefill": lambda: runs * 2 * workload.long_prompt / _PROMPT_TOKENS_A_STEP,
        "scenarios": lambda: runs * modes * answer * 4,
        "steps": lambda: runs * fixed * 3 * batches,
        "accept": lambda: (len(settings.curves) + 3) * batches * (_AUTO_WARM + runs * workload.steps),
        "host": lambda: runs * fixed * 6 * (1 + workload.batches[-1] / _SEQUENCES) / 2,
        "contexts": lambda: runs * 2 * sum(fixed + length / _PROMPT_TOKENS_A_STEP for length in workload.contexts),
        "pairs": lambda: (workload.pairs + 1) * 2 * answer * 3 * batches,
    }
    return step_s * sum(steps[part]() for part in settings.parts)


def in_words(seconds: float) -> str:
    """The duration in words, at least half a minute."""
    return (
        f"about {max(0.5, round(2 * seconds / 60) / 2):g} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
    )
