# SPDX-License-Identifier: Apache-2.0
"""``wedlm chat``: a conversation in the terminal."""

import dataclasses
from typing import get_type_hints

from rich.console import Console
from rich.text import Text

from wedlm import LLM, GenerationOutput, SamplingParams
from wedlm.cli import parse_threshold, print_stream, stats_line

HELP = """\
/clear             forget the conversation
/set NAME VALUE    change an option of the next answers, e.g. /set decoding verified, /set temperature 0.7
/params            show the options
/stats             figures of the last answer
/exit              leave (so does Ctrl-D)
Ctrl-C stops an answer; what was said of it stays in the conversation."""


class ChatSession:
    """History, options and the loop. ``out`` gets the conversation, ``err`` everything about it."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None, out: Console, err: Console) -> None:
        self.llm, self.params, self.out, self.err = llm, params, out, err
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.opening)
        self.last: GenerationOutput | None = None

    def run(self) -> None:
        """Read lines until the end of input."""
        self._note("Tokens of one colour became final in one forward. /help lists the commands.")
        while True:
            try:
                line = self.out.input(Text("> ", style="bold")).strip()
            except (EOFError, KeyboardInterrupt):
                self.out.print()
                return
            if line in ("/exit", "/quit"):
                return
            try:
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self._answer(line)
            except ValueError as error:
                self.err.print(Text(f"error: {error}", style="red"))

    def _answer(self, text: str) -> None:
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.llm.chat_prompt(messages)
        shown: list[str] = []
        self.last = print_stream(self.llm, prompt, self.params, coloured=True, shown=shown)
        self.messages = [*messages, {"role": "assistant", "content": "".join(shown)}]
        self._stats()

    def _command(self, line: str) -> None:
        name, *words = line.split()
        if name == "/help":
            self._note(HELP)
        elif name == "/clear":
            self.messages = list(self.opening)
            self._note("The conversation is empty.")
        elif name == "/stats":
            self._stats()
        elif name == "/params":
            self._note("\n".join(f"{key} = {value}" for key, value in dataclasses.asdict(self.params).items()))
        elif name == "/set" and len(words) == 2:
            self._set(*words)
        elif name == "/set":
            raise ValueError(f"{line!r} has {len(words)} words after /set; expected a name and a value")
        else:
            raise ValueError(f"{name} is no command; /help lists them")

    def _set(self, name: str, value: str) -> None:
        hints = get_type_hints(SamplingParams)
        full = name if name in hints else f"wedlm_{name}"
        if full not in hints:
            raise ValueError(f"{name} is no option; /params lists them")
        self.params = dataclasses.replace(self.params, **{full: _parse(full, value)})  # type: ignore[arg-type]
        self._note(f"{full} = {getattr(self.params, full)}")

    def _stats(self) -> None:
        if self.last is not None and self.last.stats is not None:
            self._note(stats_line(self.last.stats))

    def _note(self, text: str) -> None:
        self.err.print(Text(text, style="dim"))


def _parse(name: str, value: str) -> object:
    """The value as the option's type; SamplingParams then checks it."""
    if name in ("decoding", "stop"):
        return None if value == "none" else value
    if value == "none":
        return None
    if value in ("true", "false"):
        return value == "true"
    if name == "wedlm_entropy_threshold":
        return parse_threshold(value)
    try:
        return int(value)
    except ValueError:
        try:
            return float(value)
        except ValueError:
            raise ValueError(f"{name} is {value!r}; expected a number, true, false or none") from None
