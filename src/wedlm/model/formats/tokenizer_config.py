# SPDX-License-Identifier: Apache-2.0
"""Files next to ``tokenizer.json``: names of special tokens, further added tokens and chat templates.

They are read as in transformers: ``special_tokens_map.json`` takes precedence over ``tokenizer_config.json``, and
``added_tokens.json`` is read, unless that has an ``added_tokens_decoder``; template files take precedence over
templates there.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from wedlm.model.errors import CheckpointError, reading
from wedlm.model.formats.json_file import read_json_object

_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
TEMPLATE_FILE, TEMPLATE_FOLDER = "chat_template.jinja", "additional_chat_templates"
_MAX_TEMPLATES = 100


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """``tokenizer_config.json``, with the content of the two older files if it has no ``added_tokens_decoder``."""
    path = directory / "tokenizer_config.json"
    config = read_json_object(path) if path.is_file() else {}
    if "added_tokens_decoder" in config:
        return config
    old = {name: directory / f"{name}.json" for name in ("special_tokens_map", "added_tokens")}
    if old["special_tokens_map"].is_file():
        config |= read_json_object(old["special_tokens_map"])
    if old["added_tokens"].is_file():
        named = set(special_tokens(config).values())
        config["added_tokens_decoder"] = {
            str(token_id): {"content": text, "special": text in named, "normalized": text not in named}
            for text, token_id in read_json_object(old["added_tokens"]).items()
        }
    return config


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Names to text; a token is written as its text or as an object with ``content``."""
    names = [*_NAMES, *sorted(key for key in config if key.endswith("_token") and key not in _NAMES)]
    texts: dict[str, str] = {}
    for name in names:
        token = config.get(name)
        if name not in _NAMES and not isinstance(token, str):
            continue  # add_bos_token and the like
        text = token.get("content") if isinstance(token, dict) else token
        if (text and not isinstance(text, str)) or (isinstance(token, dict) and not text):
            raise ValueError(f"{name} is {token!r}; expected a token's text, or an object with content")
        if text:
            texts[name] = text
    return texts


def add_missing_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Add the tokens of ``added_tokens_decoder``, and named ones, that ``backend`` lacks. Raises ValueError for a wrong
    id."""
    given = config.get("added_tokens_decoder") or {}
    if not isinstance(given, dict) or not all(key.isdecimal() for key in given):
        raise ValueError("added_tokens_decoder is not an object of ids; expected ids and tokens")
    known = backend.get_added_tokens_decoder()
    for token_id, values in sorted((int(key), value) for key, value in given.items()):
        token = _added_token(values)
        same = token_id in known and known[token_id].content == token.content
        if same and all(getattr(known[token_id], flag) == getattr(token, flag) for flag in _FLAGS):
            continue
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != token_id:
            raise ValueError(
                f"added_tokens_decoder has {token.content!r} as {token_id}; expected "
                f"{backend.token_to_id(token.content)}, the id that tokenizer.json gives it or leaves for it"
            )
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = [token.get("content") if isinstance(token, dict) else token for token in extra]
    for text in [*named.values(), *extra]:
        if isinstance(text, str) and text not in added:
            backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False)])


def _added_token(values: Any) -> tokenizers.AddedToken:
    if not isinstance(values, dict) or not isinstance(values.get("content"), str):
        raise ValueError(f"added_tokens_decoder has {values!r}; expected an object with content")
    flags = {flag: bool(values[flag]) for flag in _FLAGS if flag in values}
    return tokenizers.AddedToken(values["content"], **flags)


def read_chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Name to Jinja source: from ``chat_template.jinja`` ("default") and TEMPLATE_FOLDER, or else from the config."""
    paths = {"default": directory / TEMPLATE_FILE} if (directory / TEMPLATE_FILE).is_file() else {}
    more = sorted((directory / TEMPLATE_FOLDER).glob("*.jinja"))
    if len(more) > _MAX_TEMPLATES:
        raise CheckpointError(f"{directory / TEMPLATE_FOLDER} has {len(more)} files; expected at most {_MAX_TEMPLATES}")
    paths |= {path.stem: path for path in more}
    found = {}
    for name, path in paths.items():
        with reading(path):
            found[name] = path.read_text(encoding="utf-8")
    return found or _named_templates(config.get("chat_template"))


def _named_templates(template: Any) -> dict[str, str]:
    """One template is written as a string, several as a list of objects with ``name`` and ``template``."""
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    try:
        entries = (
            template.items() if isinstance(template, dict) else [(one["name"], one["template"]) for one in template]
        )
        return {str(name): str(source) for name, source in entries}
    except (TypeError, KeyError) as error:
        raise ValueError("chat_template is neither a string nor a list of name and template") from error
