# SPDX-License-Identifier: Apache-2.0
"""Fields that clients send and that this server does not support. Values that ask for nothing are accepted.

The table is the check, and ``python -m wedlm.server.neutral docs/server.md`` writes it into the documentation.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Place = Literal[
    "request",
    "chat",
    "completion",
    "stream_options",
    "message",
    "part",
    "tool",
    "call",
    "responses",
    "item",
    "reasoning",
    "anthropic",
    "block",
    "thinking",
    "ollama",
    "ollama_options",
]
ANYTHING = None  # no value can change an answer
_WHERE = {
    "request": "a request",
    "chat": "a chat",
    "completion": "a completion",
    "stream_options": "`stream_options`",
    "message": "a message",
    "part": "a content part",
    "tool": "a tool or its function",
    "call": "a call in a message",
    "responses": "/v1/responses",
    "item": "an item of its input",
    "reasoning": "its `reasoning`",
    "anthropic": "/v1/messages",
    "block": "a block of a message there",
    "thinking": "its `thinking`",
    "ollama": "/api/chat, /api/generate",
    "ollama_options": "`options` there",
}
_EMPTY: tuple[Any, ...] = ("", [], {})
_TEXT_ONLY = "only text is supported"
_OLD_TOOLS = "the old form of tools is not supported; expected tools and tool_choice"
_SPECIAL_TOKENS = "special tokens are added to a text that is continued, and not to a chat"
_NO_SUFFIX = "text after the answer is for /v1/completions; expected nothing"
_NOT_SAMPLED = "this way of sampling is not supported; expected temperature, top_p, top_k or min_p"


@dataclass(frozen=True, slots=True)
class Neutral:
    """Fields of one kind. Besides null, ``values`` are accepted; anything else gets a 400 that says ``otherwise``."""

    place: Place
    names: str  # between spaces
    values: tuple[Any, ...] | None
    otherwise: str = ""


TABLE = (
    Neutral("request", "user metadata safety_identifier store service_tier request_id rid session_id", ANYTHING),
    Neutral("request", "prompt_cache_key prompt_cache_retention cache_prompt keep_alive id_slot", ANYTHING),
    Neutral("request", "provider usage prediction guided_decoding_backend", ANYTHING),
    Neutral("request", "spaces_between_special_tokens length_penalty early_stopping", ANYTHING),
    Neutral("request", "xtc_threshold dry_base dry_allowed_length dry_penalty_last_n dry_sequence_breakers", ANYTHING),
    Neutral("request", "mirostat_tau mirostat_eta dynatemp_exponent stream_reasoning", ANYTHING),
    Neutral("request", "skip_special_tokens", (True,), "answers do not contain control tokens"),
    Neutral("request", "use_beam_search", (False,), "searching with beams is not supported"),
    Neutral("request", "mirostat xtc_probability dry_multiplier dynatemp_range top_a", (0,), _NOT_SAMPLED),
    Neutral("request", "typical_p typ_p tfs_z", (1,), _NOT_SAMPLED),
    Neutral("request", "top_n_sigma", (0, -1), _NOT_SAMPLED),
    Neutral("request", "no_repeat_ngram_size", (0,), "expected repetition_penalty or frequency_penalty"),
    Neutral("request", "allowed_token_ids", (), "expected logit_bias or a grammar"),
    Neutral("request", "bad_words logits_processors", ([],), "expected logit_bias or a grammar"),
    Neutral("request", "truncate_prompt_tokens", (), "prompts are not cut"),
    Neutral("request", "watermark", (False,), "text is not marked"),
    Neutral(
        "request", "return_tokens_as_token_ids return_token_ids", (False,), "expected stream, whose chunks have ids"
    ),
    Neutral("request", "kv_transfer_params", (), "there is one engine"),
    Neutral("request", "lora_path lora_adapter lora_request", (), "expected model to name an adapter"),
    Neutral("chat", "echo", (False,), "expected it in a completion"),
    Neutral("chat", "suffix", ("",), _NO_SUFFIX),
    Neutral("chat", "add_special_tokens", (False,), _SPECIAL_TOKENS),
    Neutral("chat", "prompt_logprobs", (), "expected it in a completion"),
    Neutral("chat", "documents", ([],), "documents are not supported; expected them in a message"),
    Neutral("chat", "separate_reasoning include_reasoning", (True,), "reasoning stands apart from the content"),
    Neutral("chat", "functions", ([],), _OLD_TOOLS),
    Neutral("chat", "function_call", ("none", "auto"), _OLD_TOOLS),
    Neutral("chat", "modalities", (["text"],), f'{_TEXT_ONLY}; expected nothing or ["text"]'),
    Neutral("chat", "audio", (), _TEXT_ONLY),
    Neutral("chat", "verbosity", ("medium",), "grades of verbosity are not supported"),
    Neutral("chat", "web_search_options", (), "searches are not supported"),
    Neutral("completion", "add_special_tokens", (True,), _SPECIAL_TOKENS),
    Neutral("stream_options", "include_obfuscation", ANYTHING),
    Neutral("message", "annotations parsed cache_control id reasoning_details thinking_blocks", ANYTHING),
    Neutral("message", "provider_specific_fields", ANYTHING),
    Neutral("message", "refusal", ("",), "expected content"),
    Neutral("message", "audio", (), _TEXT_ONLY),
    Neutral("message", "function_call", (), _OLD_TOOLS),
    Neutral("message", "prefix partial", (False,), "expected continue_final_message in the request"),
    Neutral("part", "annotations cache_control logprobs", ANYTHING),
    Neutral("tool", "cache_control eager_input_streaming input_examples allowed_callers", ANYTHING),
    Neutral("call", "index parsed_arguments cache_control provider_specific_fields", ANYTHING),
    Neutral("responses", "max_tool_calls prompt_cache_options", ANYTHING),
    Neutral("responses", "include", ([], ["reasoning.encrypted_content"]), "answers have nothing to include"),
    Neutral("responses", "truncation", ("disabled", "auto"), "a conversation that is too long is refused"),
    Neutral("responses", "top_logprobs", (0,), "expected /v1/chat/completions, which has them"),
    Neutral("responses", "background", (False,), "answers are given at once"),
    Neutral("responses", "conversation prompt", (), "expected input, or previous_response_id"),
    Neutral("item", "id status phase annotations logprobs encrypted_content cache_control", ANYTHING),
    Neutral("reasoning", "summary generate_summary context", ANYTHING),
    Neutral("anthropic", "betas inference_geo priority", ANYTHING),
    Neutral("block", "cache_control citations caller", ANYTHING),
    Neutral("thinking", "budget_tokens display", ANYTHING),
    Neutral("ollama", "context priority", ANYTHING),
    Neutral("ollama", "truncate shift", ANYTHING),
    Neutral("ollama", "suffix", ("",), _NO_SUFFIX),
    Neutral("ollama", "template", ("",), "expected raw, with a prompt that has all of it"),
    Neutral("ollama_options", "num_ctx num_batch num_gpu main_gpu num_thread num_keep numa use_mmap", ANYTHING),
    Neutral(
        "ollama_options", "use_mlock low_vram vocab_only f16_kv logits_all repeat_last_n penalize_newline", ANYTHING
    ),
    Neutral("ollama_options", "mirostat_tau mirostat_eta", ANYTHING),
    Neutral("ollama_options", "mirostat", (0,), _NOT_SAMPLED),
    Neutral("ollama_options", "tfs_z typical_p", (1,), _NOT_SAMPLED),
)
_BY_PLACE: dict[str, dict[str, Neutral]] = {
    place: {name: entry for entry in TABLE if entry.place == place for name in entry.names.split()} for place in _WHERE
}
# What the refusal of a field says; the same sentence wherever it stands.
UNSUPPORTED = {name: entry.otherwise for entry in TABLE if entry.otherwise for name in entry.names.split()}


def without_neutral(places: Iterable[Place], body: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """``body`` without those fields, apart from ``known`` ones, that ask for nothing: by the table, or by an empty
    value if the table does not have the field."""
    kept = set(known)
    return {name: value for name, value in body.items() if name in kept or not _asks_for_nothing(places, name, value)}


def _asks_for_nothing(places: Iterable[Place], name: str, value: Any) -> bool:
    if value is None:
        return True
    for place in places:
        entry = _BY_PLACE[place].get(name)
        if entry is not None:
            return entry.values is ANYTHING or _among(value, entry.values)
    return _among(value, _EMPTY)


def _among(value: Any, values: Iterable[Any]) -> bool:
    """Membership as in JSON; Python takes False for 0 and True for 1."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values)


def described(places: Iterable[Place]) -> dict[str, dict[str, str]]:
    """The table's fields at these places, for the OpenAPI document."""
    return {
        name: {"description": "Has no effect" if entry.values is ANYTHING else f"Accepted: {_shown(entry)}"}
        for place in places
        for name, entry in _BY_PLACE[place].items()
    }


def table() -> str:
    """In Markdown."""
    rows = ["| in | field | accepted | anything else |", "| --- | --- | --- | --- |"]
    for entry in TABLE:
        names = ", ".join(f"`{name}`" for name in entry.names.split())
        refusal = f"400: {entry.otherwise}" if entry.otherwise else ""
        rows.append(f"| {_WHERE[entry.place]} | {names} | {_shown(entry)} | {refusal} |")
    return "\n".join(rows) + "\n"


def _shown(entry: Neutral) -> str:
    if entry.values is ANYTHING:
        return "anything"
    return ", ".join(["null", *(f"`{json.dumps(value)}`" for value in entry.values)])


BEGIN, END = "<!-- written by python -m wedlm.server.neutral docs/server.md -->\n", "<!-- to here -->\n"


def written(page: str) -> str:
    """The page with the present table."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
