# SPDX-License-Identifier: Apache-2.0
"""Rebuild a byte-level BPE tokenizer from the metadata of a GGUF file.

The file names the pre-tokenizer instead of containing it, so each supported name is spelled out here; the patterns are
those of the models' own ``tokenizer.json``.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from wedlm.model.config import ModelConfig
from wedlm.model.errors import CheckpointError, reading
from wedlm.model.formats.gguf_file import GGUFFile

if TYPE_CHECKING:  # most checkpoints are in other files, and need not load it
    from gguf import GGUFWriter

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS, _OTHERS = r"[^\r\n\p{L}\p{N}]?\p{L}+", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    "qwen2": rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_OTHERS}",
    "llama-bpe": rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_OTHERS}",
}
SUPPORTED_PRE_TOKENIZERS = ("smollm", "smollm2", *_PATTERNS)


def read_gguf_tokenizer(file: GGUFFile) -> tuple[Tokenizer, dict[str, str]]:
    """(tokenizer, special token names to text). Raises CheckpointError for a kind that is not supported."""
    with reading(file.path):
        return _read_tokenizer(file)


def _read_tokenizer(file: GGUFFile) -> tuple[Tokenizer, dict[str, str]]:
    model = file.required("tokenizer.ggml.model", str)
    if model != "gpt2":
        raise CheckpointError(f"{file.path}: tokenizer.ggml.model is {model!r}; expected 'gpt2' (byte-level BPE)")
    kind = file.required("tokenizer.ggml.pre", str)
    if kind not in SUPPORTED_PRE_TOKENIZERS:
        expected = ", ".join(SUPPORTED_PRE_TOKENIZERS)
        raise CheckpointError(f"{file.path}: tokenizer.ggml.pre is {kind!r}; expected one of {expected}")
    tokens = file.required("tokenizer.ggml.tokens", list)
    given = file.optional("tokenizer.ggml.token_type", np.ndarray)
    types = [1] * len(tokens) if given is None else given[: len(tokens) + 1].tolist()
    if len(types) != len(tokens):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.token_type is not as long as tokenizer.ggml.tokens")
    # Unused entries pad the vocabulary to the embedding's size; the model's own tokenizer does not have them.
    vocab = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}
    merges = [tuple(merge.split(" ", 1)) for merge in file.required("tokenizer.ggml.merges", list)]
    odd = next((merge for merge in merges if len(merge) != 2 or merge[0] + merge[1] not in vocab), None)
    if odd is not None:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.merges has {' '.join(odd)!r}; expected two parts of a token"
        )
    # Llama 3 takes a word that is a token whole, even if no sequence of merges leads to it.
    tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=kind == "llama-bpe"))
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(kind)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(file, tokens, kind)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=types[i] == _CONTROL, normalized=False)
            for i, token in enumerate(tokens)
            if types[i] in (_CONTROL, _USER_DEFINED)
        ]
    )
    return tokenizer, _special_tokens(file, tokens)


def read_gguf_chat_template(file: GGUFFile) -> dict[str, str]:
    """Name to Jinja source: the default template and the named ones."""
    prefix = "tokenizer.chat_template"
    found = {key: value for key, value in file.metadata.items() if key.startswith(prefix) and isinstance(value, str)}
    return {key.removeprefix(prefix).removeprefix(".") or "default": source for key, source in found.items()}


def _pre_tokenizer(kind: str) -> pre_tokenizers.PreTokenizer:
    if kind in _PATTERNS:
        split = pre_tokenizers.Split(Regex(_PATTERNS[kind]), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, byte_level])
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])


def _post_processor(file: GGUFFile, tokens: list[str], kind: str) -> processors.PostProcessor:
    """Puts BOS in front if the file asks for it, which is the default for Llama 3."""
    bos = _token_id(file, "bos", tokens)
    if bos is None or not file.metadata.get("tokenizer.ggml.add_bos_token", kind == "llama-bpe"):
        return processors.ByteLevel(trim_offsets=False)
    text = tokens[bos]
    return processors.TemplateProcessing(
        single=[text, "$A"], pair=[text, "$A", f"{text}:1", "$B:1"], special_tokens=[(text, bos)]
    )


def _special_tokens(file: GGUFFile, tokens: list[str]) -> dict[str, str]:
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: _token_id(file, kind, tokens) for name, kind in names.items()}
    return {name: tokens[token_id] for name, token_id in ids.items() if token_id is not None}


def _token_id(file: GGUFFile, kind: str, tokens: list[str]) -> int | None:
    key = f"tokenizer.ggml.{kind}_token_id"
    token_id = file.optional(key, int)
    if token_id is not None and not 0 <= token_id < len(tokens):
        raise CheckpointError(f"{file.path}: {key} is {token_id}; expected an id from 0 to {len(tokens) - 1}")
    return token_id


def write_gguf_tokenizer(
    writer: "GGUFWriter",
    tokenizer: Tokenizer,
    special_tokens: Mapping[str, str],
    chat_templates: Mapping[str, str],
    config: ModelConfig,
) -> None:
    """Add a byte-level BPE tokenizer to a file, for ``read_gguf_tokenizer`` and ``read_gguf_chat_template`` to read
    back.

    Raises ValueError for a kind that GGUF, or this package, has no name for.
    """
    values = json.loads(tokenizer.to_str())
    if values["model"].get("type") != "BPE":
        raise ValueError(f"the tokenizer is a {values['model'].get('type')}; expected byte-level BPE")
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = {token_id: token for token, token_id in vocab.items()}
    added = {one["id"]: _CONTROL if one["special"] else _USER_DEFINED for one in values["added_tokens"]}
    if len(tokens) != len(vocab) or max(tokens, default=0) >= config.vocab_size:
        raise ValueError(
            f"the tokenizer has ids beyond the embedding's {config.vocab_size}, or twice; expected neither"
        )
    ids = range(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_kind_of(values))
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in ids])
    writer.add_token_types([added.get(i, _NORMAL) if i in tokens else _UNUSED for i in ids])
    merges = values["model"]["merges"]
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    named = {name: vocab[text] for name, text in special_tokens.items() if text in vocab}
    ends = [named[name] for name in ("eos_token",) if name in named]
    ends += [one for one in config.eos_token_ids if one not in ends]
    bos = named.get("bos_token", config.bos_token_id)
    unknown, padding = named.get("unk_token"), named.get("pad_token")
    found = (bos, writer.add_bos_token_id), (unknown, writer.add_unk_token_id), (padding, writer.add_pad_token_id)
    for token_id, add in (*found, *zip(ends, (writer.add_eos_token_id, writer.add_eot_token_id), strict=False)):
        if token_id is not None:
            add(token_id)
    writer.add_add_bos_token(bos is not None and tokenizer.encode("").ids[:1] == [bos])
    if set(chat_templates) == {"default"}:
        writer.add_chat_template(chat_templates["default"])
    elif chat_templates:
        writer.add_chat_template([{"name": name, "template": text} for name, text in chat_templates.items()])


def _kind_of(values: Mapping[str, Any]) -> str:
    """The name of the way in which a tokenizer splits text, from its ``tokenizer.json``. Raises ValueError."""
    for kind in SUPPORTED_PRE_TOKENIZERS:
        known = Tokenizer(BPE())
        known.pre_tokenizer = _pre_tokenizer(kind)
        is_whole = bool(values["model"].get("ignore_merges"))
        if _steps(json.loads(known.to_str())) == _steps(values) and is_whole == (kind == "llama-bpe"):
            return kind
    raise ValueError(
        f"the tokenizer cuts text in a way without a name; expected one of {', '.join(SUPPORTED_PRE_TOKENIZERS)}"
    )


def _steps(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps of the pre-tokenizer, without those that change no token."""
    step = values["pre_tokenizer"] or {}
    steps = step.get("pretokenizers", [step])
    return [{key: value for key, value in one.items() if key != "trim_offsets"} for one in steps]
