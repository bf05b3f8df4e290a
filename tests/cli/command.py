# SPDX-License-Identifier: Apache-2.0
"""Running ``wedlm`` in this process."""

import json
import sys

from typer.testing import CliRunner, Result

from wedlm import LLM, SamplingParams
from wedlm.cli import app

FAST = ["--device", "cpu", "--threads", "1"]
WEDLM = [sys.executable, "-c", "from wedlm.cli import main; main()"]


def wedlm(*words: str, stdin: str | bytes = "") -> Result:
    return CliRunner().invoke(app, words, input=stdin)


def generate(model: str, *words: str, stdin: str | bytes = "") -> Result:
    return wedlm("generate", "--model", model, *FAST, *words, stdin=stdin)


def records(result: Result) -> list[dict]:
    assert result.exit_code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.split("\n") if line]


def expected(model: str, prompt: str, chat: bool, **params) -> str:
    llm = LLM(model, device="cpu")
    ids = llm.chat_prompt([{"role": "user", "content": prompt}]) if chat else prompt
    return llm.generate(ids, SamplingParams(**params))[0].text
