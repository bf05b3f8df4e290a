# SPDX-License-Identifier: Apache-2.0
"""What a client may send. Fields without effect are in ``neutral.py``."""

from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import AfterValidator, Field

from wedlm.algorithm.params import Decoding, NextToken, Remasking
from wedlm.engine.sampling_params import MAX_BIASES, MAX_GRAMMAR_CHARACTERS, MAX_LOGPROBS, SamplingParams
from wedlm.server.grammars import answer_or_calls_grammar, choice_grammar, regex_grammar
from wedlm.server.messages import Message
from wedlm.server.neutral import Place
from wedlm.server.tool_forms import HERMES, ToolForm
from wedlm.server.tool_schemas import MAX_TOOLS, NamedChoice, ResponseFormat, Schema, Strict, Tool, few
from wedlm.server.tools import call_schema

MAX_STOPS, MAX_STOP_LENGTH, MAX_STOP_TOKENS, MAX_MESSAGES = 16, 256, 64, 4096
MAX_PROMPTS, MAX_CHOICE_TEXTS = 1024, 1024
# Log-probabilities that an answer may have: the tokens' own and their alternatives, 60 bytes each.
MAX_LOGPROB_ENTRIES = 2**18
# What the server itself passes to the template, or to its renderer.
_RESERVED_VARIABLES = {"self", "messages", "tools", "add_generation_prompt", "allow_control_tokens"}
# What fields expect, where pydantic's own words would not tell a user.
EXPECTED = {
    "model": "the name of a model that GET /v1/models lists",
    "messages": f"a list of 1 to {MAX_MESSAGES} messages",
    "role": "system, developer, user, assistant or tool",
    "content": 'a string or a list of {"type": "text", "text": ...}',
    "type": '"text" in a content part, "function" in a tool, or a response_format\'s text, json_object or json_schema',
    "response_format": '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {...}}',
    "json_schema": '{"name": ..., "schema": {...}} with the type json_schema, and nothing with others',
    "tools": f'a list of at most {MAX_TOOLS} of {{"type": "function", "function": {{"name": ...}}}}',
    "tool_choice": '"none", "auto", "required" or {"type": "function", "function": {"name": ...}}',
    "tool_call_id": "the id of the call that a message of the role tool answers",
    "top_logprobs": f"an integer from 0 to {MAX_LOGPROBS}",
    "logit_bias": f"at most {MAX_BIASES} token ids with numbers from -100 to 100",
    "name": "1 to 64 of the characters a-z, A-Z, 0-9, _ and -",
    "prompt": f"a string, a list of strings, a list of token ids, or a list of such lists, at most {MAX_PROMPTS}",
    "stop": f"a string or a list of at most {MAX_STOPS}, each of 1 to {MAX_STOP_LENGTH} characters",
    "reasoning_effort": "none, minimal, low, medium, high, xhigh or max",
    "guided_choice": f"a list of 1 to {MAX_CHOICE_TEXTS} strings that are not empty",
    "input": "a string or a list of items: messages, function_call, function_call_output, reasoning, item_reference",
    "max_tokens": "an integer of at least 1",
    "stop_token_ids": f"a list of at most {MAX_STOP_TOKENS} token ids",
}


def _no_reserved_names(variables: dict[str, Any]) -> dict[str, Any]:
    taken = [name for name in variables if name in _RESERVED_VARIABLES]
    if taken:
        raise ValueError(f"variables of the chat template, and {taken[0]} in a field of its own")
    return variables


TemplateVariables: TypeAlias = Annotated[Schema, AfterValidator(_no_reserved_names)]
# fail_fast: pydantic makes an error of each wrong entry, for each member of a union, and only one is ever shown.
Strings: TypeAlias = Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True)]
GrammarText: TypeAlias = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARACTERS)]
Choices: TypeAlias = Annotated[
    list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICE_TEXTS, fail_fast=True)
]
TokenIds: TypeAlias = Annotated[list[int], Field(fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class StreamOptions(Strict):
    """``include_usage``: one more chunk with the figures of all choices, before the end. ``continuous_usage_stats``:
    each chunk has the figures of its choice so far."""

    places: ClassVar[tuple[Place, ...]] = ("stream_options",)
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class StructuredOutputs(Strict):
    """The form of the answer, as other servers name it: exactly one of these."""

    json_: Annotated[Schema | str | None, Field(alias="json")] = None
    json_object: bool | None = None
    regex: GrammarText | None = None
    choice: Choices | None = None
    grammar: GrammarText | None = None


class Generation(Strict):
    """What both kinds of request share. None means the default, except for ``wedlm_entropy_threshold``."""

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
    min_p: float | None = None
    repetition_penalty: float | None = None
    include_stop_str_in_output: bool | None = None
    cache_salt: str | None = None
    priority: int | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: GrammarText | None = None
    guided_choice: Choices | None = None
    guided_grammar: GrammarText | None = None
    min_tokens: int | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_TOKENS)] | None = None
    ignore_eos: bool | None = None
    decoding: Decoding | None = None
    wedlm_window_size: int | None = None
    remasking_strategy: Remasking | None = None
    confidence_threshold: float | None = None
    denoising_steps: int | None = None
    wedlm_entropy_threshold: float | None = None
    wedlm_pos_penalty_factor: float | None = None
    wedlm_next_token: NextToken | None = None
    wedlm_draft_entropy: float | None = None
    wedlm_lookup_drafts: int | None = None
    wedlm_trace: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], few(MAX_BIASES)] | None = None

    @property
    def streams(self) -> bool:
        return bool(self.stream)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def counts_always(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)

    def sampling_params(self, default_max_tokens: int, form: ToolForm | None = None) -> SamplingParams:
        """The engine's parameters, for a model that writes calls in ``form``. Raises ValueError if the engine refuses
        one. OpenAI's default temperature is 1, and here ours is, too; the limit of tokens may have the old name or the
        new one."""
        names = (
            "presence_penalty",
            "frequency_penalty",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "include_stop_str_in_output",
            "cache_salt",
            "priority",
            "min_tokens",
            "ignore_eos",
            "seed",
            "stop",
            "stop_token_ids",
            "decoding",
            "remasking_strategy",
            "confidence_threshold",
            "denoising_steps",
        )
        ours = ("window_size", "pos_penalty_factor", "next_token", "draft_entropy", "lookup_drafts")
        asked = (*names, *(f"wedlm_{name}" for name in ours))
        given = {name: getattr(self, name) for name in asked if getattr(self, name) is not None}
        if "wedlm_entropy_threshold" in self.model_fields_set:
            given["wedlm_entropy_threshold"] = self.wedlm_entropy_threshold
        if self.logit_bias:
            given["logit_bias"] = {_token_id(key): bias for key, bias in self.logit_bias.items()}
        temperature = 1.0 if self.temperature is None else self.temperature
        limit = self.token_limit
        max_tokens = default_max_tokens if limit is None else limit
        _, schema, grammar = self.form_of_answer(HERMES if form is None else form)
        given |= {"logprobs": self.num_logprobs, "json_schema": schema, "grammar": grammar}
        return SamplingParams(temperature=temperature, max_tokens=max_tokens, **given)

    @property
    def token_limit(self) -> int | None:
        raise NotImplementedError

    @property
    def num_logprobs(self) -> int | None:
        """How many alternatives to report with each token's log-probability; None reports not even that."""
        raise NotImplementedError

    def form_of_answer(self, tool_form: ToolForm) -> tuple[str, dict[str, Any] | str | None, str | None]:
        """The field that says what the text must be, and the JSON schema or the grammar; neither if the text is free.
        Raises ValueError if fields contradict each other."""
        asked = self.forms_asked_for()
        if len(asked) > 1:
            names = " and ".join(name for name, *_ in asked)
            raise ValueError(f"{asked[0][0]} is set with another form of the answer ({names}); expected one of them")
        return asked[0] if asked else ("response_format", None, None)

    def forms_asked_for(self) -> list[tuple[str, dict[str, Any] | str | None, str | None]]:
        """Like ``form_of_answer``, for each field that is set."""
        found: list[tuple[str, dict[str, Any] | str | None, str | None]] = []
        other = self.structured_outputs or StructuredOutputs()
        for name, schema in (("guided_json", self.guided_json), ("structured_outputs", other.json_)):
            if schema is not None:
                found.append((name, schema, None))
        if other.json_object:
            found.append(("structured_outputs", {"type": "object"}, None))
        for name, regex in (("guided_regex", self.guided_regex), ("structured_outputs", other.regex)):
            if regex is not None:
                found.append((name, None, regex_grammar(regex)))
        for name, texts in (("guided_choice", self.guided_choice), ("structured_outputs", other.choice)):
            if texts is not None:
                found.append((name, None, choice_grammar(texts)))
        for name, grammar in (("guided_grammar", self.guided_grammar), ("structured_outputs", other.grammar)):
            if grammar is not None:
                found.append((name, None, grammar))
        return found


# Those that other APIs take from here, beside their own.
SHARED_FIELDS = tuple(name for name in Generation.model_fields if name not in ("model", "n", "stream_options"))


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdecimal() and len(key) < 10) or str(int(key)) != key:
        raise ValueError(f"logit_bias has the key {key[:80]!r}; expected token ids")
    return int(key)


class CompletionRequest(Generation):
    """The body of POST /v1/completions."""

    places: ClassVar[tuple[Place, ...]] = ("completion", "request")
    best_of: Annotated[int, Field(ge=1)] | None = None
    prompt: str | Strings | TokenIds | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True)]
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def token_limit(self) -> int | None:
        """The limit of tokens. 0 asks for the prompt alone; the engine makes at least one."""
        return 1 if self.only_prompt else self.max_tokens

    @property
    def only_prompt(self) -> bool:
        """Whether to generate nothing."""
        return self.max_tokens == 0 and bool(self.echo)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def num_prompt_logprobs(self) -> int | None:
        """How many alternatives to report for each token of the prompt; None reports not even its own
        log-probability."""
        asked = [] if self.prompt_logprobs is None else [self.prompt_logprobs]
        asked += [self.logprobs] if self.echo and self.logprobs is not None else []
        return max(asked, default=None)

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt."""
        if isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int):
            return list(self.prompt)
        return [self.prompt]  # type: ignore[list-item]


class ChatRequest(Generation):
    """The body of POST /v1/chat/completions."""

    places: ClassVar[tuple[Place, ...]] = ("chat", "request")
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None

    @property
    def token_limit(self) -> int | None:
        """The limit, by the old name or the new one. Raises ValueError if they differ."""
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            other = self.max_completion_tokens
            raise ValueError(f"max_tokens is {self.max_tokens} and max_completion_tokens {other}; expected one of them")
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Raises ValueError if alternatives are requested without log-probabilities."""
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs is {self.top_logprobs}; expected logprobs to be true with it")
        return (self.top_logprobs or 0) if self.logprobs else None

    def forms_asked_for(self) -> list[tuple[str, dict[str, Any] | str | None, str | None]]:
        schema = None if self.response_format is None else self.response_format.schema_of_answer
        found = super().forms_asked_for()
        return found if schema is None else [("response_format", schema, None), *found]

    def form_of_answer(self, tool_form: ToolForm) -> tuple[str, dict[str, Any] | str | None, str | None]:
        """A forced call, or else what the other fields say; with tools that may be called, that or calls."""
        offered = self.offered_tools
        if self.forces_call:
            return "tools", call_schema(offered), None
        name, schema, grammar = super().form_of_answer(tool_form)
        if not offered or (schema is None and grammar is None):
            return name, schema, grammar
        if schema is None:
            raise ValueError(f"{name} is a grammar while tools may be called; expected a JSON schema, or no tools")
        several = self.parallel_tool_calls is not False
        return name, None, answer_or_calls_grammar(schema, call_schema(offered), tool_form, several)

    @property
    def forces_call(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedChoice)

    @property
    def template_variables(self) -> dict[str, Any]:
        """What the chat template gets besides the conversation."""
        effort = self.reasoning_effort
        thinking = {} if effort is None else {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        return {**thinking, **(self.chat_template_kwargs or {})}

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that may be called. Raises ValueError if names repeat, or if one must be called and there
        is none."""
        tools = [] if self.tools is None or self.tool_choice == "none" else self.tools
        names = [tool.function.name for tool in tools]
        if len(set(names)) < len(names):
            raise ValueError(
                f"tools has two functions of one name, {max(names, key=names.count)}; expected one of each"
            )
        if isinstance(self.tool_choice, NamedChoice):
            name = self.tool_choice.function.name
            tools = [tool for tool in tools if tool.function.name == name]
            if not tools:
                raise ValueError(f"tool_choice names the function {name}; expected one of tools")
        if self.tool_choice == "required" and not tools:
            raise ValueError("tool_choice is required; expected tools with it")
        return tools


class LoadAdapterRequest(Strict):
    """The body of POST /v1/load_lora_adapter. ``lora_path`` is relative to the server's folder of adapters."""

    lora_name: Annotated[str, Field(min_length=1, max_length=256)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    base_model_name: str | None = None


class UnloadAdapterRequest(Strict):
    """The body of POST /v1/unload_lora_adapter."""

    lora_name: Annotated[str, Field(max_length=256)]
    lora_int_id: int | None = None  # vLLM's number of it, which changes nothing
