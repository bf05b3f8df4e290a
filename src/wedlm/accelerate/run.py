# SPDX-License-Identifier: Apache-2.0
"""The stages of a run, in their order. Each leaves its result under the output directory, and a second start
continues after the stages that are done:

prompts/      the prompts to train on, and those held out
answers/      the model's own answers, one per line as they end; then the training data
training/     the trainer's directory, with its checkpoints
adapter/      the result
measurement/  the parts measured so far
report.html, report.md
"""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from wedlm import LLM, SamplingParams
from wedlm.accelerate.answers import answer_prompts, write_training_data
from wedlm.accelerate.measure import Measurement, Measurer
from wedlm.accelerate.prompts import encode_prompt, make_prompts, read_prompts
from wedlm.accelerate.report import Facts, machine_name, write_report
from wedlm.accelerate.settings import ADAPTER, DECIDES, Settings, check_unchanged, decisions
from wedlm.accelerate.training import copy_adapter, num_processes, train, training_config
from wedlm.engine.factory import release_memory
from wedlm.engine.resolve_options import read_device
from wedlm.model import load_tokenizer
from wedlm.model.formats.checkpoint import open_checkpoint
from wedlm.model.formats.save import write_whole
from wedlm.model.init_checkpoint import check_mask_token_id, choose_mask_token_id
from wedlm.train.config import TrainConfig

_STATE = "run.json"
_GPU_SEQUENCES = 256  # answers at once there; on a CPU the engine's default


class Teller(Protocol):
    """Shows the user how a run progresses."""

    def stage(self, number: int, text: str) -> None:
        """A stage begins; ``number`` is 1 to 5."""

    def progress(self, what: str, done: int, total: int, speed: str = "") -> None:
        """Report how much of a part is done."""

    def finish(self) -> None:
        """A part has ended, and reports no more progress."""

    def note(self, text: str) -> None:
        """Show a sentence."""


class Run:
    """One run. Its constructor finds everything that can be wrong with the options (ValueError)."""

    def __init__(self, settings: Settings, teller: Teller) -> None:
        self.settings, self.teller, self.output = settings, teller, settings.output
        self.device = read_device(settings.engine.device)
        self.state = self._read_state()
        self.wanted = {stage: decisions(settings, stage) for stage in DECIDES}
        self.wanted["prompts"]["content"] = [_digest(path) for path in (*settings.prompts, *settings.data)]
        for stage, made in self.state.items():
            check_unchanged(stage, made["options"], self.wanted[stage], self.output)
        self.tokenizer = load_tokenizer(settings.model)
        self.config = open_checkpoint(settings.model).config
        if self.config.is_wedlm:
            raise ValueError(f"{settings.model} is a WeDLM checkpoint already; expected an AR checkpoint")
        self.mask_token_id = self._mask_token_id()
        self.training_config()
        settings.output.mkdir(parents=True, exist_ok=True)

    def run(self) -> Path:
        """Run all unfinished stages and return the report's path."""
        for stage, begin in (
            ("prompts", self._prompts),
            ("answers", self._answers),
            ("training", self._training),
            ("measurement", self._measurement),
        ):
            if not self.state.get(stage, {}).get("done"):
                with self._begun(stage):
                    begin()
        self.teller.stage(5, "report")
        return write_report(self.facts())

    def path(self, *parts: str) -> Path:
        """A path in the output directory; its folder is created."""
        path = self.output.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def adapter(self) -> Path:
        return self.output / ADAPTER

    def facts(self) -> Facts:
        """Collect what the report says, once everything is measured."""
        parts = Measurement(self.path("measurement", "parts.json")).parts
        return Facts(self.settings, self.state, parts, machine_name(self.device), self.mask_token_id)

    def training_config(self) -> TrainConfig:
        """Make the trainer's configuration. Raises ValueError."""
        places = self.output / "answers" / "training.jsonl", self.output / "training"
        return training_config(self.settings, *places, self.mask_token_id, self.config.max_length, self.device)

    def _prompts(self) -> None:
        self.teller.stage(1, "prompts")
        training, held_out, too_long = make_prompts(
            self.settings,
            self.tokenizer,
            self.config.max_length,
            self.path("prompts", "training.jsonl"),
            self.path("prompts", "held_out.jsonl"),
        )
        self._result("prompts", training=training, held_out=held_out, too_long=too_long)
        self.teller.note(f"{training:,} prompts to train on, {held_out} held out; {too_long} were too long")

    def _answers(self) -> None:
        prompts = read_prompts(self.path("prompts", "training.jsonl"))
        self.teller.stage(2, f"the model's own answers to {len(prompts):,} prompts")
        log = self.path("answers", "answers.jsonl")
        self._answer(prompts, log)
        release_memory()
        counts = write_training_data(prompts, log, self.path("answers", "training.jsonl"))
        self._result("answers", **vars(counts))
        self.teller.note(
            f"{counts.written:,} answers, {counts.tokens:,} tokens; {counts.cut} did not end within "
            f"{self.settings.max_tokens} tokens; {counts.unusable} empty ones were left out"
        )

    def _answer(self, prompts: list[dict[str, Any]], log: Path) -> None:
        options = self.settings.engine_options
        if self.device.type == "cuda":
            options["max_num_seqs"] = _GPU_SEQUENCES
        llm = LLM(self.settings.model, **options)
        self.teller.note(llm.describe())
        params = SamplingParams(temperature=0.0, max_tokens=self.settings.max_tokens, decoding="autoregressive")
        began = time.perf_counter()

        def told(done: int, total: int, tokens: int) -> None:
            speed = f"{tokens / (time.perf_counter() - began):,.0f} tok/s" if tokens else ""
            self.teller.progress("answers", done, total, speed)

        answer_prompts(llm, prompts, params, log, told)
        self.teller.finish()

    def _training(self) -> None:
        config = self.training_config()
        processes = num_processes(self.settings, self.device)
        where = f"{processes} processes" if processes > 1 else str(self.device)
        self.teller.stage(3, f"training of a LoRA of rank {config.lora_rank} for masked rows, on {where}")
        copy_adapter(train(config, self.path("training.yaml"), self.device, processes), self.adapter)

    def _measurement(self) -> None:
        prompts = read_prompts(self.path("prompts", "held_out.jsonl"))
        self.teller.stage(4, f"measurement on {len(prompts)} held-out prompts, before and after")
        kept = Measurement(self.path("measurement", "parts.json"))
        measurer = Measurer(kept, self.settings.max_tokens, self.settings.rows, self.teller.progress)

        def encode(llm: LLM) -> list[list[int]]:
            return [encode_prompt(prompt, llm.tokenizer) for prompt in prompts]

        measurer.run(self.settings.model, self.adapter, encode, self.mask_token_id, self.settings.engine_options)
        self.teller.finish()

    def _mask_token_id(self) -> int:
        """The mask token that ``wedlm init`` would choose."""
        asked = self.settings.mask_token_id
        if asked is None:
            asked = self.config.mask_token_id
        if asked is None:
            asked = choose_mask_token_id(self.config, self.tokenizer)
        check_mask_token_id(asked, self.config, self.tokenizer)
        return asked

    def _read_state(self) -> dict[str, dict[str, Any]]:
        path = self.output / _STATE
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        if self.output.is_dir() and any(self.output.iterdir()):
            raise ValueError(f"{self.output} is not empty and holds no run; expected a new directory, or that of a run")
        return {}

    def _write_state(self) -> None:
        with write_whole(self.output / _STATE) as temporary:
            temporary.write_text(json.dumps(self.state, indent=1) + "\n", encoding="utf-8")

    def _result(self, stage: str, **values: Any) -> None:
        self.state[stage]["result"] = values

    @contextmanager
    def _begun(self, stage: str) -> Iterator[None]:
        """Wrap a stage. Its options are on disk before it begins, and its seconds once it ends or is interrupted,
        except by a kill."""
        made = self.state.setdefault(stage, {"options": self.wanted[stage], "seconds": 0.0, "done": False})
        self._write_state()
        began = time.perf_counter()
        try:
            yield
            made["done"] = True
        finally:
            made["seconds"] = round(made["seconds"] + time.perf_counter() - began, 1)
            self._write_state()


def _digest(path: Path) -> str:
    """A digest that changes with the file. Raises ValueError if the file cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}; expected a file of prompts") from error
