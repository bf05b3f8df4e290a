# SPDX-License-Identifier: Apache-2.0
"""vLLM's ``POST /tokenize`` and ``/detokenize``; they also read llama.cpp's ``content``."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from wedlm.server.converters.base import chat_request
from wedlm.server.neutral import Place
from wedlm.server.protocol import MAX_MESSAGES, TemplateVariables, TokenIds
from wedlm.server.tool_schemas import MAX_TOOLS, Strict, Tool

if TYPE_CHECKING:  # the process that parses bodies imports this file, and must not load torch
    from wedlm.server.prompts import Prompts


class TokenizeRequest(Strict):
    """A text, or a conversation in the form of its prompt."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    return_token_strs: bool | None = None

    def answer(self, prompts: "Prompts") -> dict[str, Any]:
        """Runs in a thread. Raises ValueError or ApiError."""
        given = [name for name in ("prompt", "content", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"prompt is given with {given or 'nothing'}; expected one of prompt, content and messages")
        if self.messages is not None:
            names = ("messages", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
            fields = {name: getattr(self, name) for name in names}
            tools = [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
            body = chat_request({**fields, "tools": tools, "model": ""})
            ids = prompts.of(body, body.offered_tools).token_ids
        else:
            text = self.prompt if self.prompt is not None else self.content
            ids = prompts.encode(text or "", self.add_special_tokens is not False)
        found: dict[str, Any] = {"count": len(ids), "max_model_len": prompts.max_model_len, "tokens": ids}
        if self.return_token_strs:
            found["token_strs"] = [prompts.decode([token]) for token in ids]
        return found


class DetokenizeRequest(Strict):
    """Token ids."""

    places: ClassVar[tuple[Place, ...]] = ()
    model: str | None = None
    tokens: TokenIds

    def answer(self, prompts: "Prompts") -> dict[str, Any]:
        """Runs in a thread. Raises ValueError for an id that the model does not have."""
        if any(not 0 <= token < prompts.vocab_size for token in self.tokens):
            raise ValueError(f"tokens has an id that is not a token; expected ids from 0 to {prompts.vocab_size - 1}")
        text = prompts.decode(self.tokens)
        return {"prompt": text, "content": text}
