# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that a stranger could send: honest ones, then changed by byte, by field and by structure.

A case is a name, made of a kind and a number, from which the same files follow every time. Each runs in a process of
its own, forked from one that has imported everything, with a limit of address space and of time.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEMORY_BYTES, SECONDS = 2**30, 5.0
EXTREMES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 64, 10**5, 10**9, 2**31 - 1, 2**31, 2**63, 2**64, 10**30, 10**400, 0.0, -1.5,
    0.5, 1.0, 1e9, 1e308, 1e-320, float("nan"), float("inf"), float("-inf"), "", "x", "yarn", "x" * 100_000,
    "\x1b[31m\n", "\0",
    "\ud800", [], [0], [None], ["a"], [10**9], [[]], [0] * 100_000, {}, {"a": 1}, {"type": "yarn", "factor": 1e999},
]  # fmt: skip


def _repeated(body: str) -> str:
    start = "{% set n = namespace(x='a', y='a') %}{% for i in range(40) %}"
    return start + body + "{% endfor %}{{ n.x == n.y }}{{ n.x }}{{ n.x | tojson }}"


HOSTILE_TEMPLATES = {
    "nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a condition": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "slices": "{{ [1] | slice(10**9) | list }}",
    "batches": "{{ [1] | batch(10**9, 'x') | list | length }}",
    "lipsum": "{{ lipsum(n=10**6) }}",
    "a product": "{{ ('a'*2*10**9) | length }}",
    "doubling": _repeated("{% set n.x = n.x + n.x %}"),
    "joining": _repeated("{% set n.x = n.x ~ n.x %}"),
    "a block": _repeated("{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"),
    "lists": _repeated("{% set n.x = [n.x, n.x] %}"),
    "dicts": _repeated("{% set n.x = dict(a=n.x, b=n.x) %}"),
    "equality": _repeated("{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}"),
    "namespaces": _repeated("{% set n.x = namespace(a=n.x, b=n.x) %}"),
    "a power": "{{ 10**(10**9) }}",
    "padding": "{{ 'a'.center(10**9) }}",
    "a filter's padding": "{{ 'a' | center(10**9) }}",
    "a percent": "{{ '%1000000000d' % 1 }}",
    "a format": "{{ '{:1000000000}'.format(1) }}",
    "a nested format": "{{ '{:{}}'.format(1, 10**9) }}",
    "many fields": "{{ ('{0}' * 400000).format('a' * 100000) }}",
    "many percents": "{{ ('%(x)s' * 200000) % {'x': 'a' * 100000} }}",
    "bytes": "{{ (5).to_bytes(10**9, 'big') }}",
    "rounding": "{{ 1.5 | round(10**9, 'ceil') }}",
    "indentation": "{{ 'a\nb' | indent(10**9) }}",
    "JSON's indentation": "{{ [1] | tojson(indent=10**9) }}",
    "a macro": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a macro's tree": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    "a recursive loop": "{% for i in range(9999) recursive %}{{ loop(range(9999)) if loop.depth0 < 3 }}{% endfor %}",
    "replacements": _repeated("{% set n.x = n.x.replace('a', 'aaa') %}"),
    "a separator": "{{ range(99999) | join('a' * 100000) }}",
    "output": "{% for i in range(99999) %}{{ 'a' * 10000 }}{% endfor %}",
    "template text": "{% for i in range(99999) %}" + "a" * 10_000 + "{% endfor %}",
    "long filters": "{% set r = range(99999) %}{% for i in range(99999) %}{{ r | sum }}{% endfor %}",
    "grouping": "{% set r = range(99999) %}{% for i in range(99999) %}{{ r | groupby('real') | length }}{% endfor %}",
    "a chain of attributes": "{{ range(60000)" + " | map(attribute='real')" * 80 + " | list | length }}",
    "a chain of tests": "{{ range(60000)" + " | select('integer')" * 80 + " | list | length }}",
    "a deep chain": "{{ range(60000)" + " | map('abs')" * 200 + " | list | length }}",
    "a path of attributes": "{{ range(60000) | sort(attribute='" + "real." * 999 + "real') | length }}",
    "wrapping": "{{ ('a ' * 100000) | wordwrap(1, wrapstring='b' * 1000) }}",
    "tabulators": "{{ ('\t' * 1000000).expandtabs(999) }}",
    "the source": "{{ a }}" * 9_000,
    "brackets": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "blocks": "{% for i in [1] %}" * 2_000 + "{% endfor %}" * 2_000,
    "a date": "{{ strftime_now('%Y' * 100000) }}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "imports": "{% import 'os' as os %}{{ os.system('true') }}",
}
EXPLODING_PATTERNS = [
    "(a|a|b)*(.*.*.*.*.*.*)q",
    "(a+)+$",
    ".*.*.*.*.*q",
    "(((",
    "a?" * 100,
    "x" * 10_000,
    "[",
    "\\1(a)*",
]


@dataclass(frozen=True)
class Outcome:
    """``kind``: loaded, refused, or what must not happen: traceback, message, hang, memory, killed."""

    case: str
    kind: str
    detail: str
    seconds: float
    bytes: int


def write_bases(directory: Path) -> None:
    """The honest files: "hf", "gguf" and "adapter"."""
    import torch
    from safetensors.torch import save_file

    from tests.model.tiny import our_model
    from tests.model.trained_tokenizers import CHATML, train
    from wedlm.model.formats.checkpoint import save_model

    model = our_model("llama", vocab_size=640, num_hidden_layers=2)
    save_model(model, model.config, directory / "hf")
    backend = train("smollm")
    backend.save(str(directory / "hf" / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": CHATML}
    (directory / "hf" / "tokenizer_config.json").write_text(json.dumps(names))
    (directory / "hf" / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3]}))
    _write_gguf(directory / "gguf", model, backend)
    (directory / "adapter").mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        for name, size in (("q_proj", 48), ("k_proj", 16)):
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(4, 48, generator=generator)
            tensors[f"{module}.lora_B.weight"] = torch.randn(size, 4, generator=generator)
    save_file(tensors, directory / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"], "bias": "none"}
    config |= {"alpha_pattern": {"q_proj": 5}, "rank_pattern": {}, "use_rslora": False, "init_lora_weights": True}
    (directory / "adapter" / "adapter_config.json").write_text(json.dumps(config))


def _write_gguf(directory: Path, model: Any, backend: Any) -> None:
    from tests.model.gguf_files import gguf_tensors
    from tests.model.trained_tokenizers import CHATML

    directory.mkdir()
    config = model.config
    vocab = {i: token for token, i in backend.get_vocab().items()}
    added = {i: 3 if token.special else 4 for i, token in backend.get_added_tokens_decoder().items()}
    tokens = [vocab.get(i, f"[PAD{i}]") for i in range(config.vocab_size)]
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": config.num_layers,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": 1e-6,
        "llama.rope.freq_base": 1e4,
        "llama.rope.dimension_count": config.head_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [added.get(i, 1 if i in vocab else 5) for i in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in json.loads(backend.to_str())["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.chat_template": CHATML,
    }
    tensors = {name: tensor.detach().numpy() for name, tensor in gguf_tensors(model, "llama").items()}
    (directory / "m.gguf").write_bytes(gguf_bytes(metadata, tensors))


def gguf_bytes(metadata: dict[str, Any], tensors: dict[str, Any], **lies: int) -> bytes:
    """A GGUF file of float32 tensors. ``lies`` replace num_keys, num_tensors, array_length, string_length, offset,
    dimension, kind or version."""
    data = bytearray()
    keys = b"".join(_gguf_string(key, lies) + _gguf_value(value, lies) for key, value in metadata.items())
    names = b""
    for name, array in tensors.items():
        shape = list(array.shape)[::-1]
        if "dimension" in lies:
            shape[0] = lies["dimension"]
        names += _gguf_string(name, lies) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        names += struct.pack("<IQ", lies.get("kind", 0), lies.get("offset", len(data)))
        data += array.tobytes() + bytes(-array.nbytes % 32)
    counts = lies.get("num_tensors", len(tensors)), lies.get("num_keys", len(metadata))
    head = b"GGUF" + struct.pack("<IQQ", lies.get("version", 3), *counts) + keys + names
    return head + bytes(-len(head) % 32) + bytes(data)


def _gguf_string(text: str, lies: dict[str, int]) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", lies.get("string_length", len(data))) + data


def _gguf_value(value: Any, lies: dict[str, int]) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        unsigned = min(max(value, 0), 2**64 - 1)
        return struct.pack("<IQ", 10, unsigned) if value >= 2**31 else struct.pack("<Ii", 5, max(value, -(2**31)))
    if isinstance(value, float):
        return struct.pack("<Id", 12, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _gguf_string(value, lies)
    if isinstance(value, list):
        length = lies.get("array_length", len(value))
        if value and isinstance(value[0], str):
            return struct.pack("<IIQ", 9, 8, length) + b"".join(_gguf_string(one, lies) for one in value)
        if value and isinstance(value[0], list):
            return struct.pack("<IIQ", 9, 9, length) + b"".join(_gguf_value(one, lies)[4:] for one in value)
        numbers = [one if isinstance(one, int) and -(2**31) <= one < 2**31 else 0 for one in value]
        return struct.pack("<IIQ", 9, 5, length) + struct.pack(f"<{len(numbers)}i", *numbers)
    return struct.pack("<I", 99)


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from wedlm.model.formats.gguf_file import GGUFFile

    file = GGUFFile(path)
    metadata = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in file.metadata.items()}
    return metadata, {name: file.tensor(name).numpy() for name in file.tensors}


# How a case's directory differs from the honest one. Each takes the directory with copies of all bases.


def by_bytes(root: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(path for path in root.rglob("*") if path.is_file()))
    data = bytearray(path.read_bytes())
    # The beginning of a binary file says what the rest is.
    end = min(len(data), 4096) if path.suffix in (".gguf", ".safetensors") and rng.random() < 0.7 else len(data)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        at = rng.randrange(end) if data else 0
        action = rng.randrange(6)
        if action < 3 and data:
            data[at] = rng.choice([0, 1, 255, 127, 128, rng.randrange(256), ord(rng.choice('{}[]",:0919eE.-\\'))])
        elif action <= 3:
            data[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice([1, 8, 100])))
        elif action == 4:
            del data[at : at + rng.choice([1, 8, 1000])]
        else:
            data[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32, 2**63, 2**64 - 1, 10**6, 10**9]))
        end = max(1, min(end, len(data)))
    if rng.random() < 0.2:
        del data[rng.randrange(len(data) + 1) :]
    path.write_bytes(data)
    return path.parent.name


def by_field(root: Path, rng: random.Random) -> str:
    path = rng.choice(sorted(root.rglob("*.json")))
    values = json.loads(path.read_text())
    owner: Any = values
    for _ in range(rng.choice([0, 0, 0, 1, 2, 3])):  # deeper, into tokenizer.json mostly
        inner = [
            one
            for one in (owner.values() if isinstance(owner, dict) else owner)
            if one and isinstance(one, dict | list)
        ]
        owner = rng.choice(inner) if inner else owner
    if isinstance(owner, dict):
        known = [
            "rope_scaling",
            "head_dim",
            "block_size",
            "mask_token_id",
            "layer_types",
            "sliding_window",
            "normalizer",
        ]
        key = rng.choice([*sorted(owner), *(known if owner is values else [])])
    else:
        key = rng.randrange(len(owner))
    owner[key] = rng.choice(EXTREMES)
    text = json.dumps(values)
    if rng.random() < 0.05:
        text = text.replace("}", "[" * 100_000 + "]" * 100_000 + "}", 1) if rng.random() < 0.5 else "[" * 200_000
    path.write_text(text)
    return path.parent.name


def by_rope(root: Path, rng: random.Random) -> str:
    path = root / "hf" / "config.json"
    values = json.loads(path.read_text())
    keys = [
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
        "beta_fast",
        "beta_slow",
    ]
    keys += [
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "rope_theta",
        "rope_type",
        "partial_rotary_factor",
    ]
    scaling: dict[str, Any] = {"rope_type": rng.choice(["linear", "llama3", "yarn"]), "factor": 2.0}
    scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    for key in rng.sample(keys, rng.choice([1, 2])):
        scaling[key] = rng.choice(EXTREMES)
    values["rope_scaling"] = scaling
    values["rope_theta"] = rng.choice([1e4, 1.0, 0.5, 1e15, 1e-30])
    path.write_text(json.dumps(values))
    return "hf"


def by_gguf_field(root: Path, rng: random.Random) -> str:
    path = root / "gguf" / "m.gguf"
    metadata, tensors = read_gguf(path)
    lies: dict[str, int] = {}
    kind = rng.randrange(6)
    if kind == 0:
        names = ["num_keys", "num_tensors", "array_length", "string_length", "offset", "dimension", "kind", "version"]
        lies[rng.choice(names)] = rng.choice([0, 1, 2, 31, 2**20, 10**6, 2**31, 5 * 10**7, 2**32 - 1])
        if "array_length" in lies or "offset" in lies:
            lies = {name: rng.choice([value, 2**63, 2**64 - 1]) for name, value in lies.items()}
    elif kind == 1:
        tensors.pop(rng.choice(sorted(tensors)))
    elif kind == 2:
        name = rng.choice(sorted(tensors))
        tensors[rng.choice(["rope_freqs.weight", "x\x1b\n", "blk.99999999.attn_q.weight", "output.weight"])] = tensors[
            name
        ]
    else:
        more = [
            "general.alignment",
            "llama.rope.scaling.type",
            "llama.rope.scaling.factor",
            "tokenizer.ggml.add_bos_token",
        ]
        key = rng.choice([*metadata, *more])
        metadata[key] = rng.choice(EXTREMES)
        if rng.random() < 0.2:
            metadata.pop(key)
    path.write_bytes(gguf_bytes(metadata, tensors, **lies))
    return "gguf"


def by_template(root: Path, rng: random.Random) -> str:
    names = sorted(HOSTILE_TEMPLATES)
    if rng.random() < 0.5:
        source = HOSTILE_TEMPLATES[rng.choice(names)]
    else:  # pieces of templates in a random order, and random bytes changed
        pieces = [piece for name in rng.sample(names, 3) for piece in HOSTILE_TEMPLATES[name][:500].split("%}")]
        rng.shuffle(pieces)
        source = "%}".join(pieces[:8])
        for _ in range(rng.choice([0, 1, 3])):
            at = rng.randrange(len(source) + 1)
            source = (
                source[:at]
                + rng.choice(["{{", "}}", "{%", "(", ")", "|", "~", "*", "9", "'", " in ", "[", "é"])
                + source[at:]
            )
    (root / "hf" / "chat_template.jinja").write_text(source, errors="replace")
    return "hf"


def by_normalizer(root: Path, rng: random.Random) -> str:
    path = root / "hf" / "tokenizer.json"
    values = json.loads(path.read_text())
    pattern = rng.choice(
        [{"String": "l"}, {"Regex": "l*"}, {"Regex": "(a|a)*\\d"}, {"Regex": "(.*.*.*.*)\\d"}, {"String": ""}]
    )
    replace = {"type": "Replace", "pattern": pattern, "content": "l" * rng.choice([0, 1, 2, 1000])}
    steps = [replace] * rng.choice([1, 2, 4])
    steps += [{"type": "Prepend", "prepend": "x" * rng.choice([1, 10**6])}] * rng.randrange(2)
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * rng.choice([1, 10**5])
        + [{"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1] * rng.choice([1, 10**4]), "tokens": ["<s>"]}},
    }
    change: tuple[str, Any] = rng.choice(
        [
            ("normalizer", {"type": "Sequence", "normalizers": steps}),
            ("pre_tokenizer", split),
            ("decoder", {"type": "Sequence", "decoders": [replace] * 4}),
            ("post_processor", template),
        ]
    )
    values[change[0]] = change[1]
    path.write_text(json.dumps(values))
    return "hf"


def by_pattern(root: Path, rng: random.Random) -> str:
    path = root / "adapter" / "adapter_config.json"
    values = json.loads(path.read_text())
    values[rng.choice(["alpha_pattern", "rank_pattern"])] = {
        pattern + str(number): 4
        for number in range(rng.choice([1, 20, 5000]))
        for pattern in [rng.choice(EXPLODING_PATTERNS)]
    }
    path.write_text(json.dumps(values))
    return "adapter"


def by_header(root: Path, rng: random.Random) -> str:
    """A safetensors header that lies."""
    base = rng.choice(["hf/model.safetensors", "adapter/adapter_model.safetensors"])
    data = (root / base).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = rng.choice(sorted(header.keys() - {"__metadata__"}))
    kind = rng.randrange(6)
    if kind == 0:
        header[name]["shape"] = rng.choice([[], [0], [2**40, 2**30], [-1], [10**9], "x", [48, 48, 1]])
    elif kind == 1:
        header[name]["data_offsets"] = rng.choice([[0, 0], [0, 2**60], [8, 4], [0, len(data)], "x"])
    elif kind == 2:
        header[name]["dtype"] = rng.choice(["F64", "I64", "BOOL", "F8_E4M3", "U8", "X"])
    elif kind == 3:
        header[rng.choice(["x\x1b[2J\n", "model.layers.99999999999.x", "y" * 10_000, ""])] = header.pop(name)
    elif kind == 4:
        header |= {f"x{number}.rotary_emb.inv_freq": header[name] for number in range(1000)}
    else:
        length = rng.choice([0, 1, 2**31, 2**63, 100_000_001, length - 1])
    text = json.dumps(header).encode()
    (root / base).write_bytes(
        struct.pack("<Q", len(text) if kind < 5 else length) + text + data[8 + struct.unpack("<Q", data[:8])[0] :]
    )
    return base.split("/")[0]


def _change_config(file: str, **changes: Any) -> Callable[[Path], str]:
    def change(root: Path) -> str:
        path = root / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return file.split("/")[0]

    return change


def _change_gguf(changes: dict[str, Any], **lies: int) -> Callable[[Path], str]:
    def change(root: Path) -> str:
        metadata, tensors = read_gguf(root / "gguf" / "m.gguf")
        (root / "gguf" / "m.gguf").write_bytes(gguf_bytes({**metadata, **changes}, tensors, **lies))
        return "gguf"

    return change


def _deep_json(root: Path) -> str:
    (root / "hf" / "config.json").write_text("[" * 200_000)
    return "hf"


def _long_array(root: Path) -> str:
    """An array of 50 million bytes that is really there, and which nothing needs."""
    path = root / "gguf" / "m.gguf"
    data = path.read_bytes()
    (num_keys,) = struct.unpack("<Q", data[16:24])
    array = _gguf_string("x", {}) + struct.pack("<IIQ", 9, 0, 50_000_000) + bytes(50_000_000)
    # Padded to a multiple of the alignment, so that the tensors stay where the file says.
    array += _gguf_string("y", {}) + struct.pack("<I", 8)
    rest = -(len(array) + 8) % 32
    array += _gguf_string("z" * rest, {})
    path.write_bytes(data[:16] + struct.pack("<Q", num_keys + 2) + array + data[24:])
    return "gguf"


def _template(source: str) -> Callable[[Path], str]:
    def change(root: Path) -> str:
        (root / "hf" / "chat_template.jinja").write_text(source)
        return "hf"

    return change


_LETTER = {"type": "Replace", "pattern": {"String": "l"}, "content": "l" * 1000}
# What an attack found, and what the file's reader says now ("" for what loads).
FOUND: dict[str, tuple[Callable[[Path], str], str]] = {
    "layers": (_change_config("hf/config.json", num_hidden_layers=10**5), "num_hidden_layers is 100000; expected 2"),
    "many layers": (_change_config("hf/config.json", num_hidden_layers=10**30), "expected at most 2147483647"),
    "head_dim": (_change_config("hf/config.json", head_dim=10**9), r"expected \[6000000000, 48\] by the config"),
    "length": (_change_config("hf/config.json", max_position_embeddings=10**9), "expected at most 16777216"),
    "the longest": (_change_config("hf/config.json", max_position_embeddings=2**24), ""),
    "vocabulary": (_change_config("hf/config.json", vocab_size=10**9), r"expected \[1000000000, 48\] by the config"),
    "an end token": (
        _change_config("hf/generation_config.json", eos_token_id=[2, 640]),
        r"eos_token_id is 640; expected less than vocab_size \(640\)",
    ),
    "infinite YaRN": (
        _change_config("hf/config.json", rope_scaling={"rope_type": "yarn", "factor": 1e999}),
        "config.json is not valid JSON: Infinity is not a JSON number",
    ),
    "deep JSON": (_deep_json, "config.json is not valid JSON: maximum recursion depth exceeded"),
    "an escape sequence": (_change_config("hf/config.json", model_type="\x1b[2J\n"), r"model_type is '\\x1b\[2J\\n'"),
    "block_count": (_change_gguf({"llama.block_count": 10**6}), "num_hidden_layers is 1000000; expected 2"),
    "no heads": (_change_gguf({"llama.attention.head_count": 0}), "head_count is 0; expected at least 1"),
    "no alignment": (_change_gguf({"general.alignment": 0}), "general.alignment is 0; expected 1 to 1048576"),
    "a long array": (_long_array, ""),
    "a longer array": (_change_gguf({}, array_length=2**40), "expected at most 2097152"),
    "nested arrays": (_change_gguf({"x": [[[1]]]}), "an array has elements of type 9; expected numbers or strings"),
    "a pattern": (
        _change_config("adapter/adapter_config.json", alpha_pattern={"(a|a|b)*(.*.*.*.*.*.*)q": 2}),
        "alpha_pattern has the pattern .* expected a module's name",
    ),
    "a normalizer": (
        _change_config("hf/tokenizer.json", normalizer={"type": "Sequence", "normalizers": [_LETTER] * 4}),
        r"its normalizer can make 1e\+12 characters of one; expected at most 64",
    ),
    "a splitter": (
        _change_config(
            "hf/tokenizer.json",
            pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a|a)*\\d"}, "behavior": "Isolated", "invert": False},
        ),
        "the tokenizer",
    ),
    "half a surrogate pair": (
        _change_config("hf/tokenizer_config.json", chat_template="{{ messages[0]['content'] }}\ud800"),
        "the prompt is not valid Unicode",
    ),
    **{
        f"template: {name}": (_template(source), "" if name == "the source" else "the chat template ")
        for name, source in HOSTILE_TEMPLATES.items()
    },
}


KINDS: dict[str, Callable[[Path, random.Random], str]] = {
    function.__name__: function
    for function in (by_bytes, by_field, by_rope, by_gguf_field, by_template, by_normalizer, by_pattern, by_header)
}
SHARES = {"by_bytes": 9, "by_field": 9, "by_gguf_field": 5, "by_rope": 2, "by_header": 2}


def cases(count: int) -> list[str]:
    """Names of ``count`` cases of all kinds."""
    order = [kind for kind in KINDS for _ in range(SHARES.get(kind, 1))]
    return [f"{order[number % len(order)]} {number}" for number in range(count)]


def load(root: Path, base: str) -> None:
    """Do what a user does with the changed files. Raises what that raises."""
    from wedlm import LLM, SamplingParams

    model = root / "gguf" / "m.gguf" if base == "gguf" else root / "hf"
    llm = LLM(model, device="cpu", dtype="float32", adapter=root / "adapter" if base == "adapter" else None)
    prompt = llm.chat_prompt([{"role": "user", "content": "Hello <|im_end|> hello"}])
    llm.generate([prompt, "all is well"], SamplingParams(max_tokens=2, temperature=0.0))


def run(names: Sequence[str], workers: int = 1, seconds: float = SECONDS) -> list[Outcome]:
    """Each case in a process of its own; its time is that of the processor, which other work does not change.

    Call it from a process that has done nothing with torch's threads."""
    with tempfile.TemporaryDirectory() as folder:
        bases = Path(folder) / "bases"
        _in_child(lambda: write_bases(bases))
        running: dict[int, tuple[str, float, int]] = {}
        outcomes: list[Outcome] = []
        waiting = list(reversed(names))
        while waiting or running:
            while waiting and len(running) < workers:
                name = waiting.pop()
                reader, writer = os.pipe()
                started = time.monotonic()
                pid = os.fork()
                if pid == 0:
                    os.close(reader)
                    _child(name, bases, Path(folder) / f"case-{os.getpid()}", writer)
                os.close(writer)
                running[pid] = (name, started, reader)
            time.sleep(0.002)
            for pid, (name, started, reader) in list(running.items()):
                ended, status = os.waitpid(pid, os.WNOHANG)
                late = time.monotonic() - started > 6 * seconds
                if late and not ended:
                    os.kill(pid, signal.SIGKILL)
                    ended, status = os.waitpid(pid, 0)
                if ended:
                    with os.fdopen(reader) as file:
                        outcomes.append(_outcome(name, file.read(), status, time.monotonic() - started))
                    del running[pid]
                    shutil.rmtree(Path(folder) / f"case-{pid}", ignore_errors=True)
        return outcomes


def _in_child(work: Callable[[], None]) -> None:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert status == 0, "the honest files could not be written"


def _child(name: str, bases: Path, folder: Path, writer: int) -> None:
    with contextlib.suppress(BaseException):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        shutil.copytree(bases, folder)
        kind, _, rest = name.partition(" ")
        base = FOUND[rest][0](folder) if kind == "found" else KINDS[kind](folder, random.Random(name))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2 * MEMORY_BYTES, resource.RLIM_INFINITY))
        started, kind, detail = time.process_time(), "loaded", ""
        try:
            load(folder, base)
        except (ValueError, OSError) as error:
            kind, detail = "refused", str(error)
            if not detail or "\n" in detail or not detail.isprintable() or len(detail) > 1500:
                kind = "message"
        except MemoryError as error:
            kind, detail = "memory", repr(error)
        except BaseException as error:
            kind, detail = "traceback", f"{type(error).__name__}: {error}"
        seconds = time.process_time() - started
        peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        os.write(writer, json.dumps([kind, detail[:1000], seconds, peak]).encode())
    os._exit(0)


def _outcome(name: str, report: str, status: int, elapsed: float) -> Outcome:
    if not report:
        return Outcome(
            name,
            "hang" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else "killed",
            f"status {status}",
            elapsed,
            0,
        )
    kind, detail, seconds, peak = json.loads(report)
    if kind in ("loaded", "refused") and seconds > SECONDS:
        kind = "hang"
    if kind in ("loaded", "refused") and peak > MEMORY_BYTES:
        kind = "memory"
    return Outcome(name, kind, detail, seconds, peak)


def main() -> None:
    """``python -m tests.attack.files WHAT WORKERS``: outcomes as JSON lines. WHAT: counts, "found" or cases, with
    commas between them."""
    import sys

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import gguf.quants  # noqa: F401 - imported before the forks, as are the two below
    import torch

    import tests.model.gguf_files
    import tests.model.trained_tokenizers  # noqa: F401
    import wedlm

    assert wedlm.LLM is not None
    torch.set_num_threads(1)
    names: list[str] = []
    for what in sys.argv[1].split(","):
        names += (
            cases(int(what)) if what.isdigit() else [f"found {one}" for one in FOUND] if what == "found" else [what]
        )
    for outcome in run(names, int(sys.argv[2]) if len(sys.argv) > 2 else 1):
        print(json.dumps(outcome.__dict__), flush=True)


if __name__ == "__main__":
    main()
