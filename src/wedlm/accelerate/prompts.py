# SPDX-License-Identifier: Apache-2.0
"""Stage 1: choose the prompts, write them to files, and hold some of them out for the measurement.

A prompt is either the messages of a conversation up to where the model speaks, or a text that the model continues. A
line of a file is {"messages": [...]} or {"text": ...}.
"""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from wedlm.accelerate.mixture import mixture
from wedlm.accelerate.settings import Settings
from wedlm.model import Tokenizer
from wedlm.model.formats.save import write_json_lines
from wedlm.train.answers import with_reply
from wedlm.train.sources import numbered_lines, read_samples

Prompt = dict[str, Any]

DEFAULT_PROMPTS = 2000
_BEGINNING = 32  # tokens of a plain text that the model continues


def make_prompts(
    settings: Settings, tokenizer: Tokenizer, longest: int, training: Path, held_out: Path
) -> tuple[int, int, int]:
    """Write the prompts to two files of JSON lines. Gives the numbers of (training prompts, held-out prompts, prompts
    left out because they are too long). ``longest`` is the model's length, in which a prompt must leave room for an
    answer.

    The user's prompts are shuffled, each taken once, and the first ``held_out`` of them, at most a quarter, are held
    out. Raises ValueError.
    """
    most = min(settings.max_prompt_tokens, longest - settings.max_tokens)
    if most < 1:
        raise ValueError(f"--max-tokens is {settings.max_tokens}; expected less than the model's length, {longest}")

    def fitting(prompts: Iterable[Prompt]) -> list[Prompt]:
        return [one for one in prompts if len(encode_prompt(one, tokenizer)) <= most]

    if settings.prompts or settings.data:
        given = {json.dumps(one, ensure_ascii=False): one for one in _given(settings, tokenizer)}
        found = fitting(given.values())
        too_long = len(given) - len(found)
        random.Random(settings.seed).shuffle(found)
        found = found[: settings.num_prompts]
        kept = min(settings.held_out, len(found) // 4)
        learnt, measured = found[kept:], found[:kept]
    else:
        made = mixture(settings.num_prompts or DEFAULT_PROMPTS, settings.held_out, settings.seed)
        learnt, measured = (fitting(_asked(text, tokenizer) for text in texts) for texts in made)
        too_long = sum(map(len, made)) - len(learnt) - len(measured)
    if not (learnt and measured):
        raise ValueError(
            f"there are {len(learnt) + len(measured)} different prompts of at most {most} tokens; expected at least 4, "
            "one of which is held out"
        )
    write_json_lines(training, learnt)
    write_json_lines(held_out, measured)
    return len(learnt), len(measured), too_long


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """The token ids after which the model writes."""
    if "messages" in prompt:
        return tokenizer.encode_chat(prompt["messages"])
    return tokenizer.encode(prompt["text"], True)


def with_answer(prompt: Prompt, answer: str, ended: bool) -> dict[str, Any]:
    """The prompt and the answer as a line of training data. ``ended`` is False if the model was about to say more."""
    if "messages" not in prompt:
        return {"text": prompt["text"] + answer}
    return with_reply(prompt["messages"], answer, ended)


def read_prompts(path: Path) -> list[Prompt]:
    """Read a file that ``make_prompts`` wrote."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def _asked(text: str, tokenizer: Tokenizer) -> Prompt:
    """Turn a user's words into a prompt: a message if the model has a chat template, else plain text."""
    if tokenizer.has_chat_template:
        return {"messages": [{"role": "user", "content": text}]}
    return {"text": text}


def _given(settings: Settings, tokenizer: Tokenizer) -> Iterator[Prompt]:
    for path in settings.prompts:
        for text in _lines_of(path):
            yield _asked(text, tokenizer)
    for path in settings.data:
        for sample in read_samples(path, skip_bad=False):
            if sample.text is not None:
                ids = tokenizer.encode(sample.text, False)[:_BEGINNING]
                yield {"text": tokenizer.decode(ids)}
            elif sample.messages is not None and tokenizer.has_chat_template:
                roles = [message["role"] for message in sample.messages]
                yield {"messages": list(sample.messages[: roles.index("assistant")])}
            else:
                raise ValueError(
                    f"{sample.origin} is a conversation, but {settings.model} has no chat template; expected plain "
                    'text, {"text": ...}, or a model with one'
                )


def _lines_of(path: Path) -> Iterator[str]:
    """The prompts of a file. From JSON lines it takes the string or its "prompt", from any other file each non-empty
    line."""
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.xz")):
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise ValueError(f"{path} cannot be read: {reason}; expected a file of prompts, one per line") from error
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ValueError(f"{path} is empty; expected a prompt on each line")
        yield from found
        return
    for number, raw in numbered_lines(path):
        if not raw.strip():
            continue
        try:
            value = json.loads(raw.decode("utf-8"))
        except ValueError as error:
            raise ValueError(
                f'{path} line {number} is not valid JSON; expected a string or {{"prompt": ...}}'
            ) from error
        text = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'{path} line {number} has no prompt; expected a string or {{"prompt": "..."}}')
        yield text
