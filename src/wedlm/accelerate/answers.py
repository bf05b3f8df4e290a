# SPDX-License-Identifier: Apache-2.0
"""Stage 2: our engine writes the model's own greedy answers, and each is on disk as soon as it ends."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wedlm import LLM, SamplingParams
from wedlm.accelerate.prompts import Prompt, encode_prompt, with_answer
from wedlm.model.formats.save import read_whole_lines, write_json_lines
from wedlm.train.answers import usable_text


@dataclass(frozen=True)
class AnswerCounts:
    """Counts of answers. ``cut``: written answers that did not end within the limit. ``unusable``: answers that are
    empty or contain an incomplete character."""

    written: int
    cut: int
    unusable: int
    tokens: int


def read_log(path: Path) -> dict[int, dict[str, Any]]:
    """Read the answers that exist already, by their prompt's number. If a kill cut the last line, it is removed."""
    if not path.is_file():
        return {}
    records = (json.loads(line) for line in read_whole_lines(path))
    return {record["prompt"]: record for record in records}


def answer_prompts(
    llm: LLM, prompts: Sequence[Prompt], params: SamplingParams, log: Path, progress: Callable[[int, int, int], None]
) -> None:
    """Append the missing answers to ``log``. ``progress`` gets (answers so far, answers in all, tokens of
    this call)."""
    there = read_log(log)
    missing = [number for number in range(len(prompts)) if number not in there]
    tokens, count = 0, len(there)
    progress(count, len(prompts), 0)
    with log.open("a", encoding="utf-8") as file:
        asked = [encode_prompt(prompts[number], llm.tokenizer) for number in missing]
        for place, output in llm.generate_each(asked, params):
            record = {
                "prompt": missing[place],
                "answer": output.text,
                "tokens": len(output.token_ids),
                "ended": output.finish_reason == "stop",
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            tokens, count = tokens + len(output.token_ids), count + 1
            progress(count, len(prompts), tokens)


def write_training_data(prompts: Sequence[Prompt], log: Path, target: Path) -> AnswerCounts:
    """Write the prompts with their answers as training data, in the prompts' order. Raises ValueError if no answer is
    usable."""
    there = read_log(log)
    lines, cut, unusable, tokens = [], 0, 0, 0
    for number, prompt in enumerate(prompts):
        record = there[number]
        ended = record["ended"]
        answer = usable_text(record["answer"], ended)
        if not answer:
            unusable += 1
            continue
        cut, tokens = cut + (not ended), tokens + record["tokens"]
        lines.append(with_answer(prompt, answer, ended))
    if not lines:
        raise ValueError(
            f"none of the {len(prompts)} answers can be trained on: all are empty or contain incomplete characters; "
            "expected other prompts"
        )
    write_json_lines(target, lines)
    return AnswerCounts(len(lines), cut, unusable, tokens)
