# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers that are trained here, and texts and chats for them."""

from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

SPECIAL = ["<unk>", "<s>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "",
    "Hello world, hello words!",
    "  spaces   and\n\n\tlines \r\n",
    "It's 2025: 12345 + 678 = 13023; I'LL DON'T",
    "naïve café 你好 🙂🙃 e\u0301 İ",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<s>literal special</s> <tool>call</tool>",
]
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "special tokens": (
        "{{ bos_token }}{% for m in messages %}{{ m.role | upper }}: {{ m.content | trim }}{{ eos_token }}{% endfor %}"
    ),
    "generation tag": (
        "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{% generation %}{{ m.content }}{% endgeneration %}"
        "{%- else -%}[{{ m.content }}]{%- endif -%}{%- endfor -%}"
    ),
    "loop control": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}|{% endfor %}",
    "namespace": (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{{ ns.last }} {{ messages[::-1][0].content }} {{ 'a,b'.split(',')[-1] }}"
    ),
    "tools": (
        "{%- if tools %}{% for tool in tools %}{{ tool | tojson }}\n{{ tool | tojson(indent=2) }}{% endfor %}"
        "{% endif %}"
        "{% if documents is none %}no documents{% endif %}"
        "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    ),
    "date": "{{ strftime_now('%Y') }}",
}
MESSAGES = [
    {"role": "system", "content": " Be <brief> & kind. "},
    {"role": "user", "content": "你好 \"quoted\" 'text'"},
    {"role": "assistant", "content": "Fine."},
    {"role": "user", "content": "Bye"},
]
TOOL = {"type": "function", "function": {"name": "add", "description": "a < b & 'c' é", "parameters": {"b": 1, "a": 2}}}


def train(kind: str) -> Backend:
    """A small byte-level BPE tokenizer with the pre-tokenizer that GGUF calls ``kind``."""
    backend = Backend(BPE(ignore_merges=kind == "llama-bpe"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "smollm")
    if kind == "smollm":
        first: Any = pre_tokenizers.Digits(individual_digits=True)
    else:
        first = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX if kind == "qwen2" else LLAMA3_REGEX), "isolated")
    if kind == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(TEXTS * 20 + [str(n) for n in range(2000)], trainer)
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    if kind == "llama-bpe":
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend
