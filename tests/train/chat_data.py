# SPDX-License-Identifier: Apache-2.0
"""A small chat tokenizer and small data files for the tests of training data."""

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from wedlm.model import Tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Qwen3's: the last reply begins with an empty thinking part, which is gone once the conversation goes on.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPEN_ENDED = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
_LINES = [
    "the cat sat on the mat",
    "naïve café 你好 🙂",
    "one two three 123",
    "a\n\nb\n\n\nc",
    "user assistant system\n",
]


def chat_tokenizer(template: str | None = CHATML, eos: str = "<|im_end|>") -> Tokenizer:
    """Byte-level BPE that splits text as Qwen2's does; it puts <s> before a plain text and merges line feeds."""
    backend = Backend(BPE())
    split = Regex(r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, "isolated"), byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(_LINES * 4, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    special = ["<s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|unused|>"]
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    first = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", first)])
    return Tokenizer(backend, {"default": template} if template else None, {"eos_token": eos})


def metaspace_tokenizer() -> Tokenizer:
    """Marks the beginning of a text, as SentencePiece does: the parts of a text have other tokens than the whole."""
    alphabet = "▁abcdefghijklmnopqrstuvwxyz[]"
    backend = Backend(BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    template = OPEN_ENDED.replace("m.content", "m.content + ('</s>' if m.role == 'assistant' else '')")
    return Tokenizer(backend, {"default": template})


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation of alternating user and assistant."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def write_lines(path: Path, *lines: Any) -> Path:
    """A file of these lines (bytes as they are, text as UTF-8, everything else as JSON), packed as its name says."""
    raw = b"".join(_bytes(line) + b"\n" for line in lines)
    packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(raw)
    path.write_bytes(packed)
    return path


def _bytes(line: Any) -> bytes:
    if isinstance(line, bytes):
        return line
    return (line if isinstance(line, str) else json.dumps(line)).encode()
