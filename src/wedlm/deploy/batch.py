# SPDX-License-Identifier: Apache-2.0
"""Millions of prompts over Ray's workers: answers in the prompts' order, each exactly once, in one file that grows.

The file is the state. One process writes it, in order and whole lines alone, so that its first n lines are the answers
of the first n prompts whenever that process or a worker ends; who starts the same job once more goes on behind them.
Ray Data is not used: it neither keeps the order of a file nor goes on where it stopped.
"""

import fcntl
import hashlib
import json
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from wedlm.cluster import Share, join_ray, plain_errors

if TYPE_CHECKING:
    from wedlm.engine.llm import LLM
    from wedlm.engine.outputs import GenerationOutput
    from wedlm.engine.sampling_params import SamplingParams

PART = 256  # prompts that a worker gets at once: few enough to be lost with it, enough that their end costs little
_QUEUED = 2  # parts that a worker has: one at work, and one so that it never waits for this process
_AHEAD = 4  # parts by worker that may be finished before the one whose turn it is
_MOST_ENDS = 3  # of workers with the same part; the prompts are tried one by one then, and then given up one by one
_MOST_IN_A_ROW = 3 * _MOST_ENDS  # ends of workers with nothing answered in between
_LOOK_S = 0.5  # how often the wait for an answer looks whether to stop


@dataclass(frozen=True)
class BatchJob:
    """What a worker needs to know. ``options``: of ``LLM``, apart from the device; ``chat`` None: if the model has a
    template."""

    model: str
    options: dict[str, Any]
    params: "SamplingParams"
    chat: bool | None

    def identity(self, prompts: Sequence[str]) -> dict[str, Any]:
        """What must be the same for a job that goes on."""
        digest = hashlib.sha256()
        for prompt in prompts:
            digest.update(json.dumps(prompt).encode() + b"\n")
        mine = {**asdict(self), "prompts": f"{len(prompts)}, sha256 {digest.hexdigest()}"}
        return json.loads(json.dumps(mine))


class BatchWorker:
    """One model in a process of its own."""

    def __init__(self, job: BatchJob, share: Share) -> None:
        self._job, self._share = job, share

    @cached_property
    def _llm(self) -> "LLM":
        """Not loaded by the constructor, since only a call's errors come back as they are."""
        import torch

        from wedlm.engine.llm import LLM

        if not self._share.num_gpus:
            torch.set_num_threads(self._share.num_cpus)
        return LLM(self._job.model, **{**self._job.options, "device": self._share.device})

    def load(self) -> int:
        """Load the model; the process' id."""
        _ = self._llm
        return os.getpid()

    def answer(self, prompts: Sequence[str]) -> list[str]:
        """A JSON object for each prompt, in their order; a prompt that is refused says why."""
        return [_line(*one) for one in zip(prompts, self._outputs(prompts), strict=True)]

    def _outputs(self, prompts: Sequence[str]) -> "list[GenerationOutput]":
        llm, chat = self._llm, self._job.chat
        if chat is None:
            chat = llm.tokenizer.has_chat_template
        outputs: list[GenerationOutput | None] = [None] * len(prompts)
        encoded: dict[int, Any] = {}
        for index, prompt in enumerate(prompts):
            try:
                encoded[index] = llm.chat_prompt([{"role": "user", "content": prompt}]) if chat else prompt
            except ValueError as error:
                outputs[index] = _refused(str(error))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a prompt that is refused says so in its line
                answers = llm.generate(list(encoded.values()), self._job.params, progress=False) if encoded else []
        except ValueError as error:  # all of them are refused
            if len(prompts) == 1:
                return [_refused(str(error))]
            return [self._outputs([prompt])[0] for prompt in prompts]
        for index, output in zip(encoded, answers, strict=True):
            outputs[index] = output
        return [output for output in outputs if output is not None]


def _refused(reason: str) -> "GenerationOutput":
    from wedlm.engine.outputs import GenerationOutput

    return GenerationOutput("", [], None, "error", error=reason)


def _line(prompt: str, output: "GenerationOutput") -> str:
    return json.dumps(output.record(prompt), ensure_ascii=False)


@dataclass
class _Part:
    """Prompts from one on, and how many workers ended with it."""

    start: int
    prompts: Sequence[str]
    num_ends: int = 0


class Batch:
    """A job on ``num_workers`` workers. ValueError if the file belongs to another job or process, or Ray has too few
    devices. ``num_done``: answers that the file has. ``loaded``: the processes of workers that can answer."""

    def __init__(
        self,
        job: BatchJob,
        prompts: Sequence[str],
        output: Path,
        share: Share,
        num_workers: int,
        part_size: int = PART,
    ) -> None:
        self._job, self._prompts, self._output, self._share = job, prompts, output, share
        self._num_workers, self._part_size = num_workers, part_size
        self._workers: list[Any] = []
        self.loaded: dict[Any, int] = {}
        self.num_done = self.num_refused = self.num_replaced = 0

    def run(self, stop: Callable[[], bool] = lambda: False, wrote: Callable[[int], None] = lambda _: None) -> None:
        """Until all prompts are answered, or ``stop`` says so. ``wrote(num_done)`` is called after each part.

        What a worker raised, as it raised it; ChildProcessError if workers keep ending.
        """
        with _lines_of(self._output, self._job.identity(self._prompts)) as (file, self.num_done):
            wrote(self.num_done)
            if self.num_done == len(self._prompts):
                return
            self._ray = join_ray()
            self._share.check(self._num_workers, "--num-workers")
            actor = self._ray.remote(BatchWorker).options(**self._share.needs)
            self._actor: Callable[[], Any] = lambda: actor.remote(self._job, self._share)
            self._flying: dict[Any, tuple[Any, _Part | None]] = {}  # what was asked for, of whom; None: to load
            try:
                for _ in range(self._num_workers):
                    self._start()
                self._spread(file, stop, wrote)
            finally:
                for worker in self._workers:
                    self._ray.kill(worker)

    def _start(self) -> None:
        """One more worker; it gets parts once it has loaded the model, so that none waits for that."""
        worker = self._actor()
        self._workers.append(worker)
        self._flying[worker.load.remote()] = worker, None

    def _spread(self, file: BinaryIO, stop: Callable[[], bool], wrote: Callable[[int], None]) -> None:
        starts = range(self.num_done, len(self._prompts), self._part_size)
        self._waiting = deque(_Part(one, self._prompts[one : one + self._part_size]) for one in starts)
        finished: dict[int, list[str]] = {}
        in_a_row = 0
        while self.num_done < len(self._prompts) and not stop():
            self._hand_out()
            done, _ = self._ray.wait(list(self._flying), num_returns=1, timeout=_LOOK_S)
            for answer in done:
                if answer not in self._flying:
                    continue  # its worker ended, and the part is in the queue again
                worker, part = self._flying[answer]
                result, error = self._result(answer)
                if result is None:
                    in_a_row += 1
                    if in_a_row >= _MOST_IN_A_ROW:
                        message = f"workers ended {in_a_row} times in a row and answered nothing: {error}"
                        raise ChildProcessError(message)
                    self._replace(worker, finished)
                    continue
                del self._flying[answer]
                if part is None:
                    self.loaded[worker] = result
                else:
                    in_a_row = 0
                    finished[part.start] = result
            before = self.num_done
            while self.num_done in finished:
                lines = finished.pop(self.num_done)
                file.write("".join(line + "\n" for line in lines).encode())
                self.num_done += len(lines)
                self.num_refused += sum(json.loads(line)["finish_reason"] == "error" for line in lines)
            if self.num_done > before:
                file.flush()
                os.fsync(file.fileno())
                wrote(self.num_done)

    def _hand_out(self) -> None:
        """Parts to workers that have few, unless that would run too far ahead of what is written."""
        load = dict.fromkeys(self.loaded, 0)
        for worker, part in self._flying.values():
            if part is not None:
                load[worker] += 1
        last = self.num_done + _AHEAD * self._num_workers * self._part_size
        while load and self._waiting and self._waiting[0].start < last:
            worker = min(load, key=lambda one: load[one])
            if load[worker] >= _QUEUED:
                return
            part = self._waiting.popleft()
            self._flying[worker.answer.remote(part.prompts)] = worker, part
            load[worker] += 1

    def _result(self, answer: Any) -> tuple[Any, str]:
        """What the worker gave; or None, and why it ended."""
        from ray.exceptions import RayActorError

        try:
            with plain_errors():
                return self._ray.get(answer), ""
        except RayActorError as error:
            return None, str(error)

    def _replace(self, ended: Any, finished: dict[int, list[str]]) -> None:
        """Start a worker in place of one that ended; its parts go to the head of the queue."""
        self._ray.kill(ended)  # nothing, unless Ray had only lost it
        self._workers.remove(ended)
        self.loaded.pop(ended, None)
        lost = [part for worker, part in self._flying.values() if worker is ended and part is not None]
        self._flying = {answer: one for answer, one in self._flying.items() if one[0] is not ended}
        self._start()
        self.num_replaced += 1
        if not lost:
            return
        part, *back = sorted(lost, key=lambda one: one.start)  # it was at work at the first alone
        part.num_ends += 1
        if part.num_ends < _MOST_ENDS:
            back.append(part)
        elif len(part.prompts) > 1:
            back += [_Part(part.start + i, [prompt]) for i, prompt in enumerate(part.prompts)]
        else:
            output = _refused(f"the worker ended at this prompt, {part.num_ends} times")
            finished[part.start] = [_line(part.prompts[0], output)]
        self._waiting.extendleft(sorted(back, key=lambda one: one.start, reverse=True))


@contextmanager
def _lines_of(path: Path, identity: dict[str, Any]) -> Iterator[tuple[BinaryIO, int]]:
    """The file of a job, held alone, to append to; and how many whole lines it has. What follows the last one is cut
    off. ValueError if it is another job's."""
    beside = path.with_name(path.name + ".job")
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"--output is {path}, which another process writes to; expected another file") from None
        file.seek(0)
        num_lines = size = 0
        for line in file:
            if line.endswith(b"\n"):
                num_lines, size = num_lines + 1, size + len(line)
        if beside.is_file():
            _check_same(path, json.loads(beside.read_text(encoding="utf-8")), identity)
        elif size or file.tell():
            raise ValueError(f"--output is {path}, which has content of something else; expected a new file")
        else:
            whole = beside.with_name(beside.name + ".new")
            whole.write_text(json.dumps(identity, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            whole.replace(beside)
        file.truncate(size)
        yield file, num_lines


def _check_same(path: Path, theirs: Any, ours: dict[str, Any]) -> None:
    """ValueError naming the first thing in which two jobs differ."""
    for name, value in ours.items():
        other = theirs.get(name) if isinstance(theirs, dict) else None
        if isinstance(value, dict) and isinstance(other, dict):
            _check_same(path, other, value)
        if value != other:
            raise ValueError(
                f"{name} is {value!r} and {path} was begun with {other!r}; expected the same, or another --output"
            )
