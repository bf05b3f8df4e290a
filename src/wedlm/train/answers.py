# SPDX-License-Identifier: Apache-2.0
"""A model's own answers to the prompts of a chat file, as training data (self-distillation).

Training on the model's own text makes that text easier to predict for its masked rows, and keeps its AR head where it
was; continuations of text do the same for text.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wedlm.engine.llm import LLM
from wedlm.engine.outputs import GenerationOutput
from wedlm.engine.sampling_params import SamplingParams
from wedlm.model import Tokenizer
from wedlm.model.formats.save import write_json_lines
from wedlm.train.sources import read_samples


@dataclass(frozen=True)
class AnswerSettings:
    """``temperature`` 0 takes the most likely token. Answers that do not end within ``max_tokens`` are left out, unless
    ``keep_cut`` is set, which marks them as unfinished; continuations are kept either way."""

    max_prompt_tokens: int = 512
    max_tokens: int = 256
    temperature: float = 0.0
    num_samples: int = 1
    seed: int = 0
    keep_cut: bool = False

    def params(self, number: int) -> SamplingParams:
        """How prompt ``number`` is answered: each has a seed of its own."""
        return SamplingParams(
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            seed=self.seed + number,
            decoding="autoregressive",
        )


def usable_text(answer: str, ended: bool) -> str:
    """The part of an answer that can be trained on. An answer that a limit cut (``ended`` False) may stop within a
    character, whose beginning is removed. "" if the answer is empty or has no whole characters."""
    text = answer if ended else answer.rstrip("\N{REPLACEMENT CHARACTER}")
    return text if text.strip() and "\N{REPLACEMENT CHARACTER}" not in text else ""


def with_reply(messages: Sequence[dict[str, Any]], reply: str, ended: bool) -> dict[str, Any]:
    """The conversation as a line of training data; ``ended`` False if the reply was about to continue."""
    line: dict[str, Any] = {"messages": [*messages, {"role": "assistant", "content": reply}]}
    return line if ended else {**line, "unfinished": True}


def write_answers(
    llm: LLM, source: str | Path, target: str | Path, settings: AnswerSettings, part: tuple[int, int] = (0, 1)
) -> tuple[int, int]:
    """Answer the first question of each conversation in ``source``, and write {"messages"} lines to ``target``, in the
    order of the questions.

    Returns (answers written, answers left out because they did not end or were empty). Prompts that are too long, and
    lines of plain text, are skipped. ``part`` (i, n): every n-th prompt from the i-th on, for n processes.
    """
    asked = list(_questions(source, llm.tokenizer, settings))[part[0] :: part[1]]
    asked = [pair for pair in asked for _ in range(settings.num_samples)]
    lines = []
    for (messages, _), output in zip(asked, _outputs(llm, [ids for _, ids in asked], settings), strict=True):
        ended = output.finish_reason == "stop"
        text = usable_text(output.text, ended) if ended or settings.keep_cut else ""
        if text:
            lines.append(with_reply(messages, text, ended))
    write_json_lines(Path(target), lines)
    return len(lines), len(asked) - len(lines)


def write_continuations(
    llm: LLM,
    source: str | Path,
    target: str | Path,
    settings: AnswerSettings,
    every: int = 1,
    num_prompt_tokens: int = 24,
) -> int:
    """Continue the beginning of every ``every``-th paragraph in ``source``, and write {"text"} lines to ``target``.

    A paragraph is 200 or more characters between empty lines, of a text or of a conversation's first message. Returns
    how many were written.
    """
    texts = (sample.text or sample.messages[0]["content"] for sample in read_samples(source, skip_bad=False))  # type: ignore[index]
    paragraphs = [part for text in texts for part in text.split("\n\n") if len(part) >= 200][::every]
    prompts = [llm.tokenizer.encode(part, False)[:num_prompt_tokens] for part in paragraphs]
    pairs = zip(prompts, _outputs(llm, prompts, settings), strict=True)
    continued = (llm.tokenizer.decode([*prompt, *output.token_ids]) for prompt, output in pairs)
    write_json_lines(Path(target), ({"text": text} for text in continued))
    return len(prompts)


def _outputs(llm: LLM, prompts: Sequence[list[int]], settings: AnswerSettings) -> list[GenerationOutput]:
    """The answers in the order of the prompts."""
    found = dict(llm.generate_each(prompts, [settings.params(number) for number in range(len(prompts))]))
    return [found[place] for place in range(len(prompts))]


def _questions(
    source: str | Path, tokenizer: Tokenizer, settings: AnswerSettings
) -> Iterator[tuple[list[dict[str, str]], list[int]]]:
    """(messages before the first reply, the prompt's ids) of each conversation."""
    for sample in read_samples(source, skip_bad=False):
        if not sample.messages:
            continue
        first = next(i for i, message in enumerate(sample.messages) if message["role"] == "assistant")
        messages = list(sample.messages[:first])
        if not messages:
            continue
        ids = tokenizer.encode_chat(messages)
        if len(ids) <= settings.max_prompt_tokens:
            yield messages, ids
