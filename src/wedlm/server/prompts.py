# SPDX-License-Identifier: Apache-2.0
"""Turn a checked conversation into the token ids of its prompt."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wedlm.engine.llm import LLM
from wedlm.server.config import ServerConfig
from wedlm.server.protocol import ChatRequest
from wedlm.server.readers import THINK
from wedlm.server.tool_forms import FORMS, form_of
from wedlm.server.tool_schemas import Tool
from wedlm.server.tools import TemplateTraits, for_template, in_plain_words, without_system


@dataclass(frozen=True, slots=True)
class Prompt:
    """``thinks``: the prompt has opened the model's reasoning, so the answer begins inside it."""

    token_ids: list[int]
    thinks: bool


class Prompts:
    """Turns conversations into prompts of one model; for several threads."""

    def __init__(self, llm: LLM, config: ServerConfig) -> None:
        self._llm, templates = llm, llm.tokenizer.chat_templates
        template = templates.get("tool_use", templates.get("default", ""))
        self.traits = TemplateTraits.of(llm.tokenizer)
        self.tool_form = form_of(template) if config.tool_parser == "auto" else FORMS[config.tool_parser]
        parser = config.reasoning_parser
        self.reasons = parser == "think" or (parser == "auto" and THINK[1] in template)

    @property
    def max_model_len(self) -> int:
        return self._llm.engine.config.max_model_len

    @property
    def vocab_size(self) -> int:
        return self._llm.engine.config.vocab_size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Encode a text. Raises ValueError if it is not valid Unicode."""
        return self._llm.tokenizer.encode(text, add_special_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        return self._llm.tokenizer.decode(ids, skip_special_tokens=False)

    def of(self, body: ChatRequest, tools: Sequence[Tool]) -> Prompt:
        """The prompt of a conversation, with tools through the chat template if it supports them, otherwise in plain
        words. Raises ValueError if the template refuses the conversation, or if the last message cannot be continued.
        """
        messages: list[dict[str, Any]] = [message.for_template() for message in body.messages]
        concerned = tools or any(message["role"] == "tool" or "tool_calls" in message for message in messages)
        variables: dict[str, Any] = body.template_variables
        if concerned and self.traits.takes_tools:
            variables = {**variables, "tools": for_template(tools) or None}
        elif concerned:
            messages = in_plain_words(messages, tools, self.tool_form)
        if not self.traits.takes_system:
            messages = without_system(messages)
        continues = bool(body.continue_final_message)
        if continues and body.add_generation_prompt:
            raise ValueError("continue_final_message is true and so is add_generation_prompt; expected one of them")
        prompt = self._llm.tokenizer.chat_prompt(
            messages,
            not continues and body.add_generation_prompt is not False,
            allow_control_tokens=self._llm.allow_control_tokens,
            **variables,
        )
        end = _end_of_last(messages[-1], prompt.text) if continues else len(prompt.text)
        pieces = self._llm.tokenizer.encode_batch(prompt.pieces(0, end), add_special_tokens=False)
        thinks = self.reasons and not continues and prompt.text.rstrip().endswith(THINK[0])
        return Prompt([token for ids in pieces for token in ids], thinks)


def _end_of_last(message: dict[str, Any], text: str) -> int:
    """Where the content of the last message ends in the prompt's text."""
    content = message["content"]
    if message["role"] != "assistant" or not content.strip():
        raise ValueError("continue_final_message is true; expected a last message of the assistant, with content")
    for written in (content, content.rstrip(), content.strip()):
        start = text.rfind(written)
        if start >= 0:
            return start + len(written)
    raise ValueError("continue_final_message is true, and the chat template changes the last message; expected another")
