# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, and messages to a prompt."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers

from wedlm.model.errors import CheckpointError, reading
from wedlm.model.formats.chat_template import render_chat_template, template_constants
from wedlm.model.formats.control_tokens import ChatPrompt, ControlTokens
from wedlm.model.formats.gguf_file import GGUFFile
from wedlm.model.formats.gguf_tokenizer import read_gguf_chat_template, read_gguf_tokenizer
from wedlm.model.formats.json_file import read_json_object
from wedlm.model.formats.resolve import locate
from wedlm.model.formats.save import write_whole
from wedlm.model.formats.tokenizer_json import read_tokenizer_json, running

_Render = Callable[[Mapping[str, Any]], str]
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
        self._control = ControlTokens(backend, self.special_tokens.values())
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @classmethod
    def from_directory(cls, directory: str | Path) -> "Tokenizer":
        """From ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja`` (the last two optional).

        Raises CheckpointError naming the file that is missing or malformed.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{directory} has no tokenizer.json; expected a tokenizer in that format")
        backend = read_tokenizer_json(path)
        config_path = directory / "tokenizer_config.json"
        config = read_json_object(config_path) if config_path.is_file() else {}
        template_path = directory / "chat_template.jinja"
        with reading(template_path):
            template = template_path.read_text(encoding="utf-8") if template_path.is_file() else None
        template = config.get("chat_template") if template is None else template
        with reading(config_path):
            return cls(backend, _named_templates(template), _special_tokens(config))

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
            with write_whole(directory / name) as temporary:
                temporary.write_text(text, encoding="utf-8")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; special tokens written out in ``text`` become their ids.

        ``add_special_tokens`` adds what the tokenizer's post-processor says (BOS, in most models that have one): pass
        False for a rendered chat template, which already contains it.
        """
        return self.encode_batch([text], add_special_tokens)[0]  # alone it would keep the GIL: a second for a megabyte

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """``encode`` of each text, on all cores."""
        with running():  # fast: without the tokens' places in the text, which take longer than the tokens
            found = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
            return [one.ids for one in found]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; an incomplete UTF-8 sequence becomes U+FFFD, an id without a token becomes nothing."""
        with running():
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
        """A prompt for ``messages`` as text; ``kwargs`` (such as ``tools`` or ``enable_thinking``) go to the template.

        For reading. Encoded as it is, a control token that a message spells is one: ``encode_chat`` keeps them apart.
        Raises ValueError if there is no template or it fails.
        """
        return self._renderer(kwargs, add_generation_prompt)[1]({"messages": messages, **kwargs})

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        allow_control_tokens: bool = False,
        **kwargs: Any,
    ) -> ChatPrompt:
        """``apply_chat_template``, and where to cut its text so that what messages and ``kwargs`` spell stays text.

        Nothing is cut with ``allow_control_tokens``: a message can then end its turn and speak as the system. Raises
        ValueError also where a template rewrites a control token's spelling, so that it cannot be told apart.
        """
        source, render = self._renderer(kwargs, add_generation_prompt)
        contents = {"messages": messages, **kwargs}
        if allow_control_tokens:
            return ChatPrompt(render(contents))
        return self._control.prompt(render, contents, lambda: template_constants(source))

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        allow_control_tokens: bool = False,
        **kwargs: Any,
    ) -> list[int]:
        """Token ids of ``chat_prompt``: those of ``encode(apply_chat_template(...), add_special_tokens=False)``, except
        that a control token in a message or in ``kwargs`` is spelled out in ordinary tokens."""
        prompt = self.chat_prompt(messages, add_generation_prompt, allow_control_tokens=allow_control_tokens, **kwargs)
        check_unicode(prompt.text)
        return [token for ids in self.encode_batch(prompt.pieces(), add_special_tokens=False) for token in ids]

    def _renderer(self, kwargs: Mapping[str, Any], add_generation_prompt: bool) -> tuple[str, _Render]:
        """The template's source, and what renders it with contents (messages and such of ``kwargs``)."""
        if not self.chat_templates:
            raise ValueError(
                "this model's tokenizer has no chat template; expected a plain prompt, or an instruct model"
            )
        name = "tool_use" if kwargs.get("tools") and "tool_use" in self.chat_templates else "default"
        if name not in self.chat_templates:
            raise ValueError(
                f"the tokenizer's chat templates are {sorted(self.chat_templates)}; expected one named default"
            )
        source, now = self.chat_templates[name], datetime.now()
        fixed = {"tools": None, "documents": None, **self.special_tokens}

        def render(contents: Mapping[str, Any]) -> str:
            variables = {**fixed, **contents, "add_generation_prompt": add_generation_prompt}
            return render_chat_template(source, variables.pop("messages"), variables, now)

        return source, render


def check_unicode(text: str) -> None:
    """Raises ValueError for half a surrogate pair."""
    try:
        text.encode()  # the library's own message for a lone surrogate tells nobody anything
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is no Unicode text ({error.reason}); expected valid characters") from error


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Names to text; a token is written as its text or as an object with ``content``."""
    found = {name: config[name] for name in _SPECIAL_NAMES if config.get(name)}
    texts: dict[str, str] = {}
    for name, token in found.items():
        text = token.get("content") if isinstance(token, dict) else token
        if not isinstance(text, str):
            raise ValueError(f"{name} is {token!r}; expected a token's text, or an object with content")
        texts[name] = text
    return texts


def _named_templates(template: Any) -> dict[str, str]:
    """One template is written as a string, several as a list of objects with ``name`` and ``template``."""
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in template}
    except (TypeError, KeyError) as error:
        raise ValueError("chat_template is neither a string nor a list of name and template") from error
