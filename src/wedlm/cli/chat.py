# SPDX-License-Identifier: Apache-2.0
"""``wedlm chat``: a conversation in the terminal."""

import dataclasses
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from wedlm.cli.answer import stats_line, stream_answer
from wedlm.cli.line_input import message_reader, without_echo
from wedlm.cli.loading import load_llm
from wedlm.cli.options import (
    FIELDS,
    PROMPT,
    USUAL,
    Decoding,
    EngineOptions,
    MaxTokens,
    ModelOptions,
    Only,
    SamplingOptions,
    WindowOptions,
    command,
    option,
    parse_threshold,
    sampling_params,
    values_of,
)
from wedlm.cli.terminal import Interrupt, check_text, has_colours, note

if TYPE_CHECKING:
    from wedlm import LLM, GenerationOutput, SamplingParams

HELP = """\
/set NAME VALUE    change an option, e.g. /set decoding verified, /set seed none
/set               show all options
/stats             figures of the last answer
/clear             forget the conversation
/exit              leave (so do Ctrl-D, and Ctrl-C twice)
Enter sends, Alt-Enter begins a line; a paste is one message. The arrows go through earlier messages.
Ctrl-C empties the line; during an answer it stops that, and what was said of it stays in the conversation."""
# Of no use in a conversation, or nothing that a line can say.
_NOT_HERE = {"logprobs", "logit_bias", "stop_token_ids", "json_schema", "grammar"}
_OPTIONS = {name: field for name, field in FIELDS.items() if name not in _NOT_HERE}


@dataclass(frozen=True, kw_only=True)
class _Answer(SamplingOptions):
    max_tokens: MaxTokens = 512


@command
def chat(
    *,
    system: Annotated[str | None, option("System message of the conversation.", PROMPT)] = None,
    history: Annotated[bool, option("Keep messages for the arrow keys of later conversations.", PROMPT)] = True,
    decoding: Decoding = None,
    window: WindowOptions,
    answer: _Answer,
    model: ModelOptions,
    engine: Annotated[EngineOptions, Only(*USUAL)],
) -> None:
    """Talk to a model; tokens that one forward made final share a colour.

    \b
    Examples:
    wedlm chat
    wedlm chat --decoding autoregressive --system "Answer in one sentence."

    Ctrl-C stops an answer; /help lists the commands, such as /set decoding verified.
    """
    params = sampling_params({"decoding": decoding} | values_of(window, answer))
    ChatSession(load_llm(model, engine), params, system, history).run()


class ChatSession:
    """History, options and the loop. Answers go to standard output, everything else to standard error."""

    def __init__(self, llm: "LLM", params: "SamplingParams", system: str | None, keeps_history: bool = False) -> None:
        if not llm.tokenizer.has_chat_template:
            raise ValueError("this model has no chat template; expected an instruct model, or use `wedlm generate`")
        check_text("system", system or "")
        self.llm, self.params = llm, params
        self.opening = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.opening)
        self.last: GenerationOutput | None = None
        self._read = message_reader(keeps_history)

    def run(self) -> None:
        """Read and answer messages until the end of input, /exit, or Ctrl-C twice on an empty line."""
        colours = "Tokens of one colour became final in one forward. " if has_colours() else ""
        note(f"{colours}/help lists the commands.")
        warned = False
        while True:
            try:
                line = self._read()
            except EOFError:
                return
            except KeyboardInterrupt:
                if warned:
                    return
                warned = True
                note("To leave, press Ctrl-C again or Ctrl-D; /help lists the commands.")
                continue
            warned = False
            if line in ("/exit", "/quit"):
                return
            try:
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self._answer(line)
            except ValueError as error:
                note(f"error: {error}", "red")

    def _answer(self, text: str) -> None:
        check_text("the line", text)
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self.llm.chat_prompt(messages)
        longest = self.llm.engine.config.max_model_len
        if len(prompt) >= longest:
            raise ValueError(
                f"the conversation has {len(prompt)} tokens; expected fewer than {longest}, the model's length: "
                "/clear begins a new one"
            )
        with Interrupt() as interrupt, without_echo():
            self.last = stream_answer(self.llm, prompt, self.params, interrupt, coloured=True)
        self.messages = [*messages, {"role": "assistant", "content": self.last.text}]

    def _command(self, line: str) -> None:
        name, *words = line.split(maxsplit=2)
        if name == "/help":
            note(HELP)
        elif name == "/clear":
            self.messages = list(self.opening)
            note("The conversation is empty.")
        elif name == "/stats":
            stats = None if self.last is None else self.last.stats
            note("There is no answer yet." if stats is None else stats_line(stats))
        elif name == "/set" and len(words) == 2:
            self._set(*words)
        elif name == "/set" and not words:
            note("\n".join(f"{option} = {self._shown(option)}" for option in _OPTIONS))
        elif name == "/set":
            raise ValueError(f"{line!r} gives no value; expected /set NAME VALUE, e.g. /set temperature 0.7")
        else:
            raise ValueError(f"{name} is not a command; /help lists the commands")

    def _set(self, name: str, value: str) -> None:
        option = name.replace("-", "_")
        if option not in _OPTIONS:
            raise ValueError(f"{name} is not an option; expected one of {', '.join(_OPTIONS)}")
        self.params = dataclasses.replace(self.params, **{_OPTIONS[option]: _parse(option, value)})  # type: ignore[arg-type]
        note(f"{option} = {self._shown(option)}")

    def _shown(self, option: str) -> str:
        value = getattr(self.params, _OPTIONS[option])
        if option == "decoding" and value is None:
            return f"none (the model's: {self.llm.engine.config.decoding})"
        return "none" if value is None or value == () else str(value)


def _parse(option: str, value: str) -> object:
    """Convert the value to a type that SamplingParams can check."""
    if value.lower() == "none":
        return None
    if option in ("decoding", "next_token", "remasking_strategy", "stop"):
        return value
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if option == "entropy_threshold":
        return parse_threshold(value)
    for number in (int, float):
        with suppress(ValueError):
            return number(value)
    raise ValueError(f"{option} is {value!r}; expected a number, true, false or none")
