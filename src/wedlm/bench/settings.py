# SPDX-License-Identifier: Apache-2.0
"""What a run measures, and how much: the options of ``wedlm bench`` with the device's defaults."""

from dataclasses import dataclass, field, replace
from typing import Any

from wedlm.algorithm.params import DECODINGS, Decoding
from wedlm.engine.sampling_params import SamplingParams

PARTS = {
    "latency": "one stream: time to the first token, time between tokens, tok/s",
    "throughput": "tok/s of complete answers by batch",
    "serving": "arrivals at random times, prompts of mixed lengths: first token, time between tokens, tok/s",
    "steps": "milliseconds a step by batch and rows",
    "accept": "auto decoding with drafts accepted at given rates, by batch",
    "pairs": "auto against AR, interleaved: nothing accepted, counting, mixed arrivals",
    "prefill": "tokens a second of a long prompt",
    "host": "work of the host in a step, by what it does",
    "contexts": "milliseconds a step by length of the context",
    "scenarios": "the paper's four scenarios, in every mode (needs a checkpoint)",
}
# Beside llama.cpp.
LLAMACPP_PARTS = {
    "step": "milliseconds of a step at context 256 by rows; llama.cpp's single row",
    "chat": "tok/s of 20 chats of five kinds, one stream, prompts included",
    "streams": "tok/s of 4 and 16 chats at once",
    "prompt": "tok/s of a long prompt",
    "cold": "milliseconds of a step of one row, weights not in any cache",
    "busy": "milliseconds of a step of one row while another program computes",
}
DEFAULT_PARTS = ("latency", "throughput", "serving")
# All of them, the most telling first, for runs whose time is limited.
PRIORITY = ("scenarios", "steps", "accept", "prefill", "contexts", "host", "serving", "pairs", "latency", "throughput")
MODES: tuple[Decoding, ...] = ("autoregressive", "verified", "streaming", "block", "auto")
AR_TEXT: tuple[Decoding, ...] = ("autoregressive", "verified", "auto")


@dataclass(frozen=True)
class Workload:
    """How much is measured. Lengths are in tokens."""

    batches: tuple[int, ...]
    runs: int
    pairs: int
    steps: int  # of a measurement with a fixed batch
    warm_steps: int  # before it
    answer: int  # most tokens of an answer
    prompt: int | None  # of a prompt; None: as long as the question is (not for random weights)
    requests: int  # that arrive
    contexts: tuple[int, ...]
    long_prompt: int
    chats: int = 4  # of each kind, beside llama.cpp

    @classmethod
    def beside_llamacpp(cls) -> "Workload":
        """The workload beside llama.cpp on a CPU: some minutes for each part, with 4 and 16 streams."""
        return replace(cls.of(False, False), batches=(1, 4, 16), runs=5, steps=32, answer=64)

    def quick(self) -> "Workload":
        """A short workload, to see that everything works and roughly what comes out."""
        steps, answer, requests = min(self.steps, 8), min(self.answer, 24), min(self.requests, 4)
        return replace(self, runs=1, pairs=2, steps=steps, answer=answer, requests=requests, chats=1)

    @classmethod
    def of(cls, on_gpu: bool, random_weights: bool) -> "Workload":
        """The defaults, which take minutes on either kind of device."""
        if on_gpu:
            prompt = 512 if random_weights else None
            return cls((1, 8, 32, 64, 128), 3, 10, 60, 5, 128, prompt, 96, (512, 4096, 16384, 32000), 8192)
        prompt = 64 if random_weights else None
        return cls((1, 4), 3, 10, 16, 3, 48, prompt, 8, (128, 512), 1024)


@dataclass(frozen=True)
class Settings:
    """The settings of one run. It measures ``shape`` (random weights) or ``model`` (a checkpoint). ``curves`` are rates
    by depth."""

    parts: tuple[str, ...]
    modes: tuple[Decoding, ...]
    workload: Workload
    shape: str | None = None
    model: str | None = None
    adapter: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    decoding: dict[str, Any] = field(default_factory=dict)  # wedlm_* of SamplingParams
    curves: tuple[tuple[float, ...], ...] = ()
    rate: float | None = None  # requests a second; None: 0.7 of what AR (vLLM's, if measured) can serve
    against: str | None = None
    llama_server: str | None = None  # a program instead of the wheel's
    gguf: tuple[str, ...] = ()  # what llama.cpp runs; empty: the demo model's base in several kinds
    engine: dict[str, Any] = field(default_factory=dict)  # options of the engine that were given
    budget_s: float | None = None

    @property
    def most_rows(self) -> int:
        """The rows of a step in which all windows of the largest batch fit."""
        window = self.decoding.get("wedlm_window_size") or 16
        wide = 2 if {"streaming", "block"} & {*self.modes} else 1
        return wide * window * max(self.workload.batches)

    def params(self, mode: str, max_tokens: int, **more: Any) -> SamplingParams:
        """Parameters at temperature 0. Random weights never end an answer."""
        values = {**self.decoding, "ignore_eos": self.shape is not None, **more}
        return SamplingParams(decoding=mode, max_tokens=max_tokens, **values)  # type: ignore[arg-type]


def check_against(name: str | None, only_llamacpp: dict[str, Any], model: str | None) -> None:
    """Raises ValueError for an unknown peer, for an option that only llama.cpp has, or for a model without a file for
    llama.cpp."""
    if name not in (None, "vllm", "llamacpp"):
        raise ValueError(f"--against is {name!r}; expected vllm or llamacpp")
    for option, value in only_llamacpp.items():
        if value and name != "llamacpp":
            raise ValueError(f"{option} is given without --against llamacpp; expected both")
    if name == "llamacpp" and model not in (None, "demo", "demo-base") and not only_llamacpp["--gguf"]:
        raise ValueError(f"--model is {model}, and --gguf is missing; expected the file of it that llama.cpp can run")


def read_parts(names: list[str], shape: str | None, against: str | None = None) -> tuple[str, ...]:
    """The parts in the order given. "all" means every part that the target has, the most telling first. Beside
    llama.cpp there are different parts, and all of them are the default."""
    if against == "llamacpp":
        for name in names:
            if name not in ("all", *LLAMACPP_PARTS):
                known = ", ".join(LLAMACPP_PARTS)
                raise ValueError(f"the part is {name!r}; expected, with llama.cpp, all or some of {known}")
        return tuple(LLAMACPP_PARTS if "all" in names else dict.fromkeys(names)) or tuple(LLAMACPP_PARTS)
    if names == ["all"]:
        return tuple(part for part in PRIORITY if part != "scenarios" or shape is None)
    for name in names:
        if name not in PARTS:
            raise ValueError(f"the part is {name!r}; expected all or some of {', '.join(PARTS)}")
    if "scenarios" in names and shape is not None:
        raise ValueError(
            "scenarios is given with --shape, whose random weights give no meaningful text; expected --model"
        )
    return tuple(dict.fromkeys(names)) or DEFAULT_PARTS


def read_modes(text: str | None, shape: str | None) -> tuple[Decoding, ...]:
    """The modes; by default all of them, or for random weights those with AR's text, because streaming and block
    decoding would fill one position per step."""
    usual = MODES if shape is None else AR_TEXT
    names = usual if text is None else tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in DECODINGS:
            raise ValueError(f"--modes contains {name!r}; expected some of {', '.join(DECODINGS)}")
    return tuple(dict.fromkeys(names))  # type: ignore[arg-type]


def read_numbers(name: str, text: str, low: float, high: float) -> tuple[float, ...]:
    """Numbers separated by commas, each from ``low`` to ``high``."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(low <= number <= high for number in numbers):
        raise ValueError(f"{name} is {text!r}; expected numbers from {low:g} to {high:g} with commas between")
    return numbers


def change_workload(workload: Workload, options: dict[str, Any]) -> Workload:
    """``workload`` with the options that are not None; each must be at least 1."""
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        for number in value if isinstance(value, tuple) else (value,):
            if number < 1 or number != int(number):
                raise ValueError(f"--{name.replace('_', '-')} has {number:g}; expected integers of at least 1")
    whole: dict[str, Any] = {k: tuple(map(int, v)) if isinstance(v, tuple) else int(v) for k, v in given.items()}
    return replace(workload, **whole)
