# SPDX-License-Identifier: Apache-2.0
"""What a client may send. A field that has no effect here may only have the value that asks for nothing."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from wedlm.algorithm.params import Decoding
from wedlm.engine.sampling_params import SamplingParams

MAX_STOPS, MAX_STOP_LENGTH, MAX_STOP_TOKENS, MAX_MESSAGES = 16, 256, 64, 4096
_NO_LOGPROBS = "log-probabilities are not supported"
_NO_PENALTIES = "penalties are not supported; expected 0"
_NO_TOOLS = "tools are not supported"
_NO_MEDIA = "text alone is supported"
_NO_BIAS = "biases are not supported; expected nothing or {}"
# Fields that are refused, and what the refusal says.
UNSUPPORTED = {
    "logprobs": _NO_LOGPROBS,
    "top_logprobs": _NO_LOGPROBS,
    "logit_bias": _NO_BIAS,
    "presence_penalty": _NO_PENALTIES,
    "frequency_penalty": _NO_PENALTIES,
    "repetition_penalty": _NO_PENALTIES,
    "response_format": 'constrained output is not supported; expected nothing or {"type": "text"}',
    "tools": _NO_TOOLS,
    "tool_choice": _NO_TOOLS,
    "tool_calls": _NO_TOOLS,
    "tool_call_id": _NO_TOOLS,
    "functions": _NO_TOOLS,
    "function_call": _NO_TOOLS,
    "best_of": "choosing among several texts is not supported; expected nothing or 1",
    "echo": "repeating the prompt is not supported; expected nothing or false",
    "suffix": "text after the answer is not supported; expected nothing",
    "audio": _NO_MEDIA,
    "modalities": f'{_NO_MEDIA}; expected nothing or ["text"]',
    "prediction": "predicted outputs are not supported",
    "reasoning_effort": "grades of reasoning are not supported",
    "verbosity": "grades of verbosity are not supported",
    "web_search_options": "searches are not supported",
    "store": "answers are not stored; expected nothing or false",
    "service_tier": 'there is one tier; expected nothing, "auto" or "default"',
}
# What fields expect, where pydantic's own words would not tell a user.
EXPECTED = {
    "model": "the name of a model that GET /v1/models lists",
    "messages": f"a list of 1 to {MAX_MESSAGES} messages",
    "role": "system, developer, user or assistant",
    "content": 'a string or a list of {"type": "text", "text": ...}',
    "type": '"text", the only type that is supported',
    "prompt": "a string, a list of strings, a list of token ids, or a list of such lists",
    "stop": f"a string or a list of at most {MAX_STOPS}, each of 1 to {MAX_STOP_LENGTH} characters",
    "stop_token_ids": f"a list of at most {MAX_STOP_TOKENS} token ids",
}


class _Strict(BaseModel):
    """Nothing unknown, nothing converted: "5" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True)


Nothing: TypeAlias = None
Zero = Annotated[float, Field(ge=0, le=0)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class StreamOptions(_Strict):
    """``include_usage``: one more chunk with the figures of all choices, before the end."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class TextFormat(_Strict):
    """The only ``response_format``."""

    type: Literal["text"]


class TextPart(_Strict):
    """The only kind of content part."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a conversation; ``name`` goes to the chat template, which may use it or not."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    # What OpenAI's answers have, and clients send back.
    refusal: Nothing = None
    audio: Nothing = None
    function_call: Nothing = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def for_template(self) -> dict[str, str]:
        """Plain text; "developer" is OpenAI's newer word for "system", which templates know."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": "system" if self.role == "developer" else self.role, "content": content, **named}


class _Generation(_Strict):
    """What both kinds of request share. None means the default, save for ``wedlm_entropy_threshold``."""

    model: str
    n: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Ours and other engines' additions.
    top_k: int | None = None
    min_tokens: int | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_TOKENS)] | None = None
    ignore_eos: bool | None = None
    decoding: Decoding | None = None
    wedlm_window_size: int | None = None
    wedlm_entropy_threshold: float | None = None
    wedlm_pos_penalty_factor: float | None = None
    wedlm_draft_entropy: float | None = None
    wedlm_trace: bool | None = None
    # Accepted because clients send them and they ask for nothing that could be missed.
    user: str | None = None
    # Must ask for nothing.
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def streams(self) -> bool:
        return bool(self.stream)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling_params(self, default_max_tokens: int) -> SamplingParams:
        """The engine's parameters; ValueError where it refuses one. OpenAI's default temperature is 1, and so is ours
        here; the limit of tokens may be given by the old name or the new one."""
        names = ("top_p", "top_k", "min_tokens", "ignore_eos", "seed", "stop", "stop_token_ids", "decoding")
        ours = ("wedlm_window_size", "wedlm_pos_penalty_factor", "wedlm_draft_entropy")
        given = {name: getattr(self, name) for name in (*names, *ours) if getattr(self, name) is not None}
        if "wedlm_entropy_threshold" in self.model_fields_set:
            given["wedlm_entropy_threshold"] = self.wedlm_entropy_threshold
        temperature = 1.0 if self.temperature is None else self.temperature
        limit = self.token_limit
        max_tokens = default_max_tokens if limit is None else limit
        return SamplingParams(temperature=temperature, max_tokens=max_tokens, **given)

    @property
    def token_limit(self) -> int | None:
        raise NotImplementedError


class CompletionRequest(_Generation):
    """The body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = None
    logprobs: Nothing = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: Literal[False] | None = None
    suffix: Nothing = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt."""
        if isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int):
            return list(self.prompt)
        return [self.prompt]  # type: ignore[list-item]


class ChatRequest(_Generation):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    parallel_tool_calls: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    audio: Nothing = None
    prediction: Nothing = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
