# SPDX-License-Identifier: Apache-2.0
"""Prompts of the LoRA of masked rows: what the base answers, and what is held out.

    python masked_prompts.py DATA_DIR EVAL_DIR NUMBERS OUT_DIR

NUMBERS is the ``gsm8k_numbers.jsonl`` of ``prompts.py``. ``first.jsonl.gz`` and ``more.jsonl.gz`` are to be answered by
the base model; the answers to the first suffice for short runs. ``eval_*.jsonl.gz`` are 200 held-out prompts each of
code, chat and summaries, and GSM8K's test questions.
"""

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path

from wedlm.train.sources import numbered_lines

ABOUT = [
    "What is {x}?",
    "Explain {x} in simple words.",
    "Tell me about {x}.",
    "Write a short paragraph about {x}.",
    "What should I know about {x}?",
    "Give an overview of {x}.",
    "Can you explain {x} with an example?",
    "List the most important facts about {x}.",
    "Why does {x} matter?",
    "How would you teach {x} to a beginner?",
]
SUMMARISE = [
    "Summarize this text in a few sentences.\n\n{x}",
    "Summarize the following text.\n\n{x}",
    "Please write a short summary of this passage:\n\n{x}",
    "{x}\n\nSummarize the text above.",
    "What are the main points of this text?\n\n{x}",
    "In one sentence, what does this text say?\n\n{x}",
    "TL;DR of the following:\n\n{x}",
    "Read the passage and summarize it in your own words.\n\n{x}",
]
COMPLETE = "Complete this Python function.\n\n```python\n{x}```"
HEADING = re.compile(r"^#+ ([A-Z][\w ,’'-]{5,60})$", re.MULTILINE)
USUAL_HEADINGS = re.compile(r"Learning Objectives|Chapter|Section|Exercises|Summary|Solution|Review|Key |Answer|Check")
HELD_OUT = 200


def read(path: Path) -> list:
    return [json.loads(line) for _, line in numbered_lines(path)]


def first_questions(path: Path) -> list[str]:
    """What the conversations of a file begin with, each once."""
    rows = [row if isinstance(row, list) else row["messages"] for row in read(path)]
    return list(dict.fromkeys(row[0]["content"] for row in rows if row[0]["role"] == "user"))


def filled(templates: list[str], texts: Iterable[str], rng: random.Random) -> list[str]:
    return [rng.choice(templates).format(x=text) for text in texts]


def write(prompts: Iterable[str], path: Path) -> None:
    unanswered = {"role": "assistant", "content": "(to come)"}  # a file of conversations needs one
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for prompt in prompts:
            messages = [{"role": "user", "content": prompt}, unanswered]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def books(data: Path, rng: random.Random) -> tuple[list[str], list[str]]:
    """(headings, paragraphs) of OpenStax's books and Python's documentation, each once, in a random order."""
    texts = [row["text"] for name in ("openstax_text", "python_docs_text") for row in read(data / f"{name}.jsonl.xz")]
    headings = {heading for text in texts for heading in HEADING.findall(text) if not USUAL_HEADINGS.search(heading)}
    paragraphs = {
        part for text in texts for part in text.split("\n\n") if 400 <= len(part) <= 1200 and part[0] not in "#-|"
    }
    found = sorted(headings), sorted(paragraphs)
    for one in found:
        rng.shuffle(one)
    return found


def main(data: Path, held_out: Path, numbers: Path, out: Path) -> None:
    rng = random.Random(20)
    out.mkdir(parents=True, exist_ok=True)
    dolly = first_questions(data / "dolly_subset.jsonl.gz")
    rng.shuffle(dolly)
    short = [question for question in dolly if len(question) < 300]
    chat = first_questions(data / "openassistant_sample.jsonl.gz")[: HELD_OUT // 2]
    chat += short[: HELD_OUT - len(chat)]
    functions = [COMPLETE.format(x=row["prompt"]) for row in read(held_out / "humaneval.jsonl.gz")]
    tasks = [
        "\n".join([row["text"], "Your code should pass these tests:", *row["test_list"]])
        for row in read(held_out / "mbpp_test.jsonl.gz")
    ]
    passages = {
        row["query"].removeprefix("Passage: ").partition("\nQuestion:")[0]
        for row in read(held_out / "boolq_val.jsonl.gz")
    }
    passages = sorted(passage for passage in passages if 400 <= len(passage) <= 1200)
    rng.shuffle(passages)
    write((row["question"] for row in read(held_out / "gsm8k_test.jsonl.gz")), out / "eval_gsm8k.jsonl.gz")
    write(chat, out / "eval_chat.jsonl.gz")
    write(functions[: HELD_OUT // 2] + tasks[: HELD_OUT // 2], out / "eval_code.jsonl.gz")
    write((SUMMARISE[0].format(x=text) for text in passages[:HELD_OUT]), out / "eval_summaries.jsonl.gz")

    headings, paragraphs = books(data, rng)
    changed = first_questions(numbers)
    rng.shuffle(changed)
    code = ("mbpp_train", "gpteacher_codegen", "thealgorithms_python", "python_puzzles", "exercism_python")
    exercises = first_questions(data / "openstax_exercises.jsonl.gz")
    rng.shuffle(exercises)
    asked, summarised = len(headings) * 2 // 3, 4000  # of the first prompts
    first = [
        *first_questions(data / "gsm8k_train.jsonl.gz"),
        *changed[:7000],
        *first_questions(data / "math_train.jsonl.gz")[::2],
        *(question for name in code for question in first_questions(data / f"{name}.jsonl.gz")),
        *(question for question in dolly if question not in set(chat)),
        *first_questions(data / "gpteacher_roleplay.jsonl.gz"),
        *filled(ABOUT, headings[:asked], rng),
        *filled(SUMMARISE, paragraphs[:summarised], rng),
    ]
    more = [
        *changed[7000:20000],
        *first_questions(data / "math_train.jsonl.gz")[1::2],
        *exercises[:3000],
        *filled(ABOUT, headings[asked:], rng),
        *filled(SUMMARISE, paragraphs[summarised : 2 * summarised], rng),
    ]
    for name, prompts in (("first", first), ("more", more)):
        prompts = [prompt for prompt in dict.fromkeys(prompts) if prompt.strip()]
        rng.shuffle(prompts)
        write(prompts, out / f"{name}.jsonl.gz")
        print(f"{name}: {len(prompts)} prompts")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for argument in ("data", "held_out", "numbers", "out"):
        parser.add_argument(argument, type=Path)
    main(**vars(parser.parse_args()))
