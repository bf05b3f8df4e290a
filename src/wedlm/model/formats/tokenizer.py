# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, and messages to a prompt."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from wedlm.model.formats.chat_template import render_chat_template
from wedlm.model.formats.gguf_file import GGUFFile
from wedlm.model.formats.gguf_tokenizer import read_gguf_chat_template, read_gguf_tokenizer
from wedlm.model.formats.resolve import locate

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_tokenizer(path_or_id: str | Path) -> "Tokenizer":
    """The tokenizer of a checkpoint: a directory, a ``.gguf`` file, a hub id or "demo", as in ``load_model``."""
    path = locate(path_or_id, weights=False)
    return Tokenizer.from_gguf(path) if path.is_file() else Tokenizer.from_directory(path)


class Tokenizer:
    """A ``tokenizers.Tokenizer`` (``backend``) with its chat templates and the names of its special tokens.

    ``chat_templates`` maps a name to Jinja source; "default" is used unless tools are given and there is a
    "tool_use". ``special_tokens`` maps names such as "eos_token" to token text, which templates can refer to.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        chat_templates: Mapping[str, str] | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        # A tokenizer.json may record the truncation and padding of its training, which would silently cut a prompt.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.chat_templates = dict(chat_templates or {})
        self.special_tokens = dict(special_tokens or {})
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @classmethod
    def from_directory(cls, directory: str | Path) -> "Tokenizer":
        """From ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja`` (the last two optional).

        Raises ValueError naming the file that is missing or malformed.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ValueError(f"{directory} has no tokenizer.json; expected a tokenizer in that format")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # The Rust library raises plain Exception.
            raise ValueError(f"{path} is not a readable tokenizer: {error}") from error
        config_path = directory / "tokenizer_config.json"
        config = _read_json_object(config_path) if config_path.is_file() else {}
        template_path = directory / "chat_template.jinja"
        template = template_path.read_text(encoding="utf-8") if template_path.is_file() else config.get("chat_template")
        return cls(backend, _named_templates(template, config_path), _special_tokens(config))

    @classmethod
    def from_gguf(cls, path: str | Path) -> "Tokenizer":
        """Rebuilt from the metadata of a GGUF file. Raises CheckpointError for a kind that cannot be rebuilt."""
        file = GGUFFile(Path(path))
        backend, special_tokens = read_gguf_tokenizer(file)
        return cls(backend, read_gguf_chat_template(file), special_tokens)

    def save(self, directory: str | Path) -> None:
        """Write the files that ``from_directory`` and transformers read."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        config["clean_up_tokenization_spaces"] = False
        if self.chat_templates:
            named = [{"name": name, "template": source} for name, source in self.chat_templates.items()]
            config["chat_template"] = (
                self.chat_templates["default"] if set(self.chat_templates) == {"default"} else named
            )
        files = {
            "tokenizer.json": self.backend.to_str(pretty=True),
            "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        }
        for name, text in files.items():
            temporary = directory / f".{name}.{os.getpid()}"
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(directory / name)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens written out in ``text`` become their ids.

        ``add_special_tokens`` adds what the tokenizer's post-processor says (BOS, in most models that have one): pass
        False for a rendered chat template, which already contains it.
        """
        return self.encode_batch([text], add_special_tokens)[0]  # alone it would keep the GIL: a second for a megabyte

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """``encode`` of each text, on all cores."""
        # Fast: without the tokens' places in the text, which take longer than the tokens.
        return [one.ids for one in self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; an incomplete UTF-8 sequence becomes U+FFFD, an id without a token becomes nothing."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of a token given by its text in the vocabulary, such as "<|im_end|>"."""
        return self.backend.token_to_id(token)

    @property
    def has_chat_template(self) -> bool:
        """Whether ``apply_chat_template`` works."""
        return bool(self.chat_templates)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """The prompt for ``messages``; ``kwargs`` (such as ``tools`` or ``enable_thinking``) go to the template.

        Encode it with ``add_special_tokens=False``. Raises ValueError if there is no template or it fails.
        """
        if not self.chat_templates:
            raise ValueError(
                "this model's tokenizer has no chat template; expected a plain prompt, or an instruct model"
            )
        name = "tool_use" if kwargs.get("tools") and "tool_use" in self.chat_templates else "default"
        if name not in self.chat_templates:
            raise ValueError(
                f"the tokenizer's chat templates are {sorted(self.chat_templates)}; expected one named default"
            )
        variables = {"tools": None, "documents": None, **self.special_tokens, **kwargs}
        return render_chat_template(
            self.chat_templates[name], messages, {**variables, "add_generation_prompt": add_generation_prompt}
        )


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Names to text; a token is written as its text or as an object with ``content``."""
    found = {name: config[name] for name in _SPECIAL_NAMES if config.get(name)}
    return {name: token["content"] if isinstance(token, dict) else str(token) for name, token in found.items()}


def _named_templates(template: Any, path: Path) -> dict[str, str]:
    """One template is written as a string, several as a list of objects with ``name`` and ``template``."""
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in template}
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: chat_template is neither a string nor a list of name and template") from error


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object")
    return values
