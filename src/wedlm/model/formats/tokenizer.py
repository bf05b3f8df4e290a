# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, and messages to a prompt."""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import tokenizers

from wedlm.model.errors import CheckpointError, reading
from wedlm.model.formats.chat_template import render_chat_template, template_constants
from wedlm.model.formats.control_tokens import ChatPrompt, ControlTokens
from wedlm.model.formats.gguf_file import GGUFFile
from wedlm.model.formats.gguf_tokenizer import read_gguf_chat_template, read_gguf_tokenizer
from wedlm.model.formats.resolve import locate
from wedlm.model.formats.save import write_whole
from wedlm.model.formats.template_limits import ExceededError
from wedlm.model.formats.tokenizer_config import (
    add_missing_tokens,
    read_chat_templates,
    read_tokenizer_config,
    special_tokens,
)
from wedlm.model.formats.tokenizer_json import read_tokenizer_json, running

_Render = Callable[[Mapping[str, Any]], str]
# A chat by which the end of a turn is found in what the template makes of it.
_QUESTION, _REPLY = "question", "wedlm"


def load_tokenizer(path_or_id: str | Path) -> "Tokenizer":
    """Load the tokenizer of a checkpoint: a directory, a ``.gguf`` file, a hub id or "demo", as in ``load_model``."""
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
        self._refused_templates: dict[str, str] = {}  # why, by source
        self.special_tokens = dict(special_tokens or {})
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._control = ControlTokens(backend, self.special_tokens.values())
        # SentencePiece's words begin with U+2581, which stands for a space.
        self.drops_first_space = _drops_first_space(backend)
        self._warned_of_bos = False
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @classmethod
    def from_directory(cls, directory: str | Path) -> "Tokenizer":
        """Read ``tokenizer.json`` and the files next to it (``tokenizer_config.py``).

        Raises CheckpointError naming the file that is missing or malformed.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{directory} has no tokenizer.json; expected a tokenizer in that format")
        backend = read_tokenizer_json(path)
        with reading(directory / "tokenizer_config.json"):
            config = read_tokenizer_config(directory)
            named = special_tokens(config)
            add_missing_tokens(backend, config, named)
            return cls(backend, read_chat_templates(directory, config), named)

    @classmethod
    def from_gguf(cls, path: str | Path) -> "Tokenizer":
        """Rebuild a tokenizer from the metadata of a GGUF file. Raises CheckpointError for a kind that cannot be
        rebuilt."""
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
        """Encode text; special tokens written out in ``text`` become their ids.

        ``add_special_tokens`` adds the tokens of the tokenizer's post-processor (BOS, in most models that have one).
        Pass False for a rendered chat template, which already contains it. Raises ValueError for half a surrogate pair.
        """
        return self.encode_batch([text], add_special_tokens)[0]  # alone it would keep the GIL: a second for a megabyte

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """``encode`` each text, on all cores. Raises ValueError for half a surrogate pair."""
        for text in texts:
            _check_unicode(text)
        with running():  # fast: without the tokens' places in the text, which take longer than the tokens
            found = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
            ids = [one.ids for one in found]
        if add_special_tokens and not self._warned_of_bos:
            self._warn_of_doubled_bos(ids)
        return ids

    def _warn_of_doubled_bos(self, batch: Sequence[Sequence[int]]) -> None:
        text = self.special_tokens.get("bos_token", "")
        bos = self.token_id(text)
        if bos is not None and any(ids[:2] == [bos, bos] for ids in batch):
            self._warned_of_bos = True
            warnings.warn(
                f"a prompt begins with {text}, which the tokenizer puts in front of every prompt: the model sees it "
                "twice; leave it out of the prompt",
                stacklevel=4,
            )

    def special_token_id(self, text: str) -> int | None:
        """The id of a special token, which ``decode`` leaves out, given its text; None for any other text."""
        token_id = self.token_id(text)
        return token_id if token_id in self.special_ids else None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``; an incomplete UTF-8 sequence becomes U+FFFD, an id without a token becomes nothing."""
        with running():
            return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of a token, given its text in the vocabulary, such as "<|im_end|>"."""
        return self.backend.token_to_id(token)

    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a reply: the tokenizer's end token, and the control token that the chat template writes
        right after an assistant's message. A checkpoint's configuration often names only one of the two."""
        eos, bos = (self.token_id(self.special_tokens.get(name, "")) for name in ("eos_token", "bos_token"))
        ends = () if eos is None else (eos,)
        question, reply = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _REPLY}
        chats = [[question, reply], [question, reply, question]]
        for text in self.probe_chats(chats, add_generation_prompt=False):
            before = self.encode(text.partition(_QUESTION)[0], add_special_tokens=False)
            after = self.encode(text.rpartition(_REPLY)[2].lstrip(), add_special_tokens=False)[:1]
            opens_turn = [token_id for token_id in before if token_id in self._control.ids][-1:]
            if self._control.ids.issuperset(after) and after and after[0] not in (bos, eos, *opens_turn):
                return (*ends, after[0])
        return ends

    def probe_chats(
        self, chats: Iterable[Sequence[Mapping[str, Any]]], add_generation_prompt: bool = True
    ) -> Iterator[str]:
        """``apply_chat_template`` for those of ``chats`` that the template accepts. If a template exceeds its limits on
        these few words, it is never run again, so that a hostile one costs its limits only once."""
        for messages in chats:
            try:
                yield self.apply_chat_template(messages, add_generation_prompt)
            except ValueError as error:  # no template, or one that wants other messages
                if isinstance(error.__cause__, ExceededError):
                    self._refused_templates[self.chat_templates["default"]] = str(error)

    @property
    def has_chat_template(self) -> bool:
        """Whether ``apply_chat_template`` works."""
        return bool(self.chat_templates)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """A prompt for ``messages`` as text; ``kwargs`` (such as ``tools`` or ``enable_thinking``) go to the template.

        The text is for reading. If you encode it as a whole, a control token that a message spells becomes one;
        ``encode_chat`` prevents that. Raises ValueError if there is no template or it fails.
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

        With ``allow_control_tokens`` nothing is cut: a message can then end its turn and speak as the system. Raises
        ValueError also if a template rewrites a control token's spelling, which then cannot be recognised.
        """
        source, render = self._renderer(kwargs, add_generation_prompt)
        contents = {"messages": messages, **kwargs}
        if allow_control_tokens:
            return ChatPrompt(render(contents))
        return self._control.prompt(render, contents, lambda: template_constants(source))

    def plain_text(self, text: str) -> ChatPrompt:
        """A text, and where to cut it so that the control tokens it spells stay text; ValueError as in ``encode``."""
        _check_unicode(text)
        return self._control.prompt(lambda contents: contents["text"], {"text": text}, tuple)

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
        return [token for ids in self.encode_batch(prompt.pieces(), add_special_tokens=False) for token in ids]

    def _renderer(self, kwargs: Mapping[str, Any], add_generation_prompt: bool) -> tuple[str, _Render]:
        """The template's source, and a function that renders it with contents (messages and some of ``kwargs``)."""
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
        if source in self._refused_templates:
            raise ValueError(self._refused_templates[source])
        fixed = {"tools": None, "documents": None, **self.special_tokens}

        def render(contents: Mapping[str, Any]) -> str:
            variables = {**fixed, **contents, "add_generation_prompt": add_generation_prompt}
            text = render_chat_template(source, variables.pop("messages"), variables, now)
            _check_unicode(text)
            return text

        return source, render


def _drops_first_space(backend: tokenizers.Tokenizer) -> bool:
    """Whether decoding loses the first token's space: U+2581 stands for a space in SentencePiece's words."""
    vocab = backend.get_vocab()
    token_id = next((token_id for text, token_id in vocab.items() if text[:1] == "\u2581" and text[1:].isalpha()), None)
    if token_id is None:
        return False
    return not backend.decode([token_id]).startswith(" ") and " " in backend.decode([token_id, token_id])


def _check_unicode(text: str) -> None:
    try:
        text.encode()  # the library's own message for a lone surrogate explains nothing
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not valid Unicode ({error.reason}); expected valid characters") from error
