# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints of every kind, loaded by us and by transformers (peft for adapters, transformers' loader for GGUF):
logits, ids, end tokens and rendered chats.

Ours are allowed more end tokens than transformers', which reads generation_config.json alone, or config.json where
that file is missing: each kind says which, and nothing else may differ.
"""

import json
import unicodedata
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.model.gguf_files import gguf_tensors
from tests.model.peft_kinds import KINDS as ADAPTERS
from tests.model.peft_kinds import trained
from tests.model.tiny import LLAMA3_ROPE, hf_config, hf_model, logits_of
from tests.model.trained_tokenizers import CHATML, MESSAGES, TEXTS, TOOL, train
from wedlm.model import ModelConfig, Transformer, load_model, load_tokenizer
from wedlm.model.formats.checkpoint import with_end_tokens
from wedlm.model.lora.peft import apply_adapter

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:a prompt begins with <s>"),  # one of the texts does
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),  # peft asks for what transformers renames
]

VOCAB = 640
TOKENS = [1, 5, 42, 7, 96, 333, 639, 7]
TOLERANCE = 1e-4
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
Change = Callable[[Path], None]


def nothing(_: Path) -> None:
    pass


@dataclass
class Kind:
    """How a directory is made. ``more``: end tokens that ours has beyond transformers'."""

    model: str = "llama"
    shape: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    pre: str = "smollm"
    change: Change = nothing
    shard_size: str = "1GB"
    dtype: torch.dtype = torch.float32
    more: tuple[int, ...] = (3,)  # <|im_end|>, the tokenizer's end token and CHATML's end of a turn


def write(name: str, text: str) -> Change:
    def change(directory: Path) -> None:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)

    return change


def config_says(**values: Any) -> Change:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def older_rope(directory: Path) -> None:
    """transformers 4's spelling."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    theta = rope.pop("rope_theta", 10000.0)
    path.write_text(
        json.dumps({**config, "rope_theta": theta, "rope_scaling": {"type": rope.pop("rope_type"), **rope}})
    )


def with_head(scale: float) -> Change:
    def change(directory: Path) -> None:
        path = directory / "model.safetensors"
        tensors = load_file(path)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * scale
        save_file(tensors, path, {"format": "pt"})

    return change


def stale_shards(directory: Path) -> None:
    """Files of an earlier save, which the index does not name."""
    save_file({"model.norm.weight": torch.zeros(48)}, directory / "model-00009-of-00009.safetensors", {"format": "pt"})


def whole_beside_shards(directory: Path) -> None:
    """One file and an index with shards: the one file counts."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("model-*.safetensors")):
        tensors |= load_file(path)
    save_file(
        {name: tensor * 0.5 for name, tensor in tensors.items()}, directory / "model.safetensors", {"format": "pt"}
    )


def several(*changes: Change) -> Change:
    def change(directory: Path) -> None:
        for one in changes:
            one(directory)

    return change


def rope(**values: Any) -> dict[str, Any]:
    return {"rope_scaling": values, "rope_theta": 5e4}


OBJECTS = {"bos_token": "<s>", "pad_token": "<pad>"}
NAMED = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "{{ tools | tojson }}" + CHATML}]
# The tokenizer that ``train`` makes ends with <tool>, 351.
DECODER = {"352": {"content": "<extra>", "special": True}, "353": {"content": "<more>", "special": False}}
KINDS: dict[str, Kind] = {
    "llama": Kind(),
    "llama, tied": Kind("llama-tied"),
    "llama, biases": Kind("llama-biases"),
    "qwen2": Kind("qwen2", pre="qwen2"),
    "qwen2, tied": Kind("qwen2-tied", pre="qwen2"),
    "qwen3, wide heads": Kind("qwen3-wide-heads", pre="qwen2"),
    "qwen3, biases": Kind("qwen3-bias"),
    "tied, the embedding as lm_head in the file": Kind("llama-tied", change=with_head(1.0)),
    "tied, another lm_head in the file": Kind("llama-tied", change=with_head(-0.5)),
    "rope linear": Kind(shape=rope(rope_type="linear", factor=4.0)),
    "rope llama3": Kind(shape=rope(**LLAMA3_ROPE)),
    "rope yarn": Kind("qwen2", shape=rope(**YARN), pre="qwen2"),
    "rope yarn, attention factor": Kind(shape=rope(**YARN, attention_factor=1.3)),
    "rope yarn, betas": Kind(shape=rope(**YARN, beta_fast=16.0, beta_slow=2.0)),
    "rope yarn, mscale": Kind(shape=rope(**YARN, mscale=0.7, mscale_all_dim=0.4)),
    "rope linear, older spelling": Kind(shape=rope(rope_type="linear", factor=2.0), change=older_rope),
    "rope llama3, older spelling": Kind(shape=rope(**LLAMA3_ROPE), change=older_rope),
    "shards": Kind(shard_size="60KB"),
    "shards, tied": Kind("llama-tied", shard_size="60KB"),
    "shards beside stale ones": Kind(shard_size="60KB", change=stale_shards),
    "shards beside one whole file": Kind(shard_size="60KB", change=whole_beside_shards),
    "bfloat16": Kind(dtype=torch.bfloat16),
    "float16": Kind(dtype=torch.float16),
    "BOS by the post-processor": Kind(pre="llama-bpe"),
    "tokens as objects": Kind(
        tokenizer={name: {"__type": "AddedToken", "content": text} for name, text in OBJECTS.items()}
    ),
    "special_tokens_map": Kind(
        change=write("special_tokens_map.json", '{"eos_token": "<unk>", "pad_token": {"content": "<pad>"}}'),
        more=(0, 3),
    ),
    "special_tokens_map beside added_tokens_decoder": Kind(
        tokenizer={"added_tokens_decoder": DECODER}, change=write("special_tokens_map.json", '{"eos_token": "<unk>"}')
    ),
    "added_tokens_decoder": Kind(tokenizer={"added_tokens_decoder": DECODER}),
    "added_tokens_decoder, other flags": Kind(
        tokenizer={"added_tokens_decoder": {"351": {"content": "<tool>", "special": True, "normalized": False}}}
    ),
    "added_tokens.json": Kind(change=write("added_tokens.json", '{"<extra>": 352, "<more>": 353}')),
    "extra special tokens": Kind(tokenizer={"extra_special_tokens": ["<extra>", "<more>"]}),
    "additional special tokens": Kind(tokenizer={"additional_special_tokens": ["<extra>"]}),
    "template file": Kind(change=write("chat_template.jinja", "{{ bos_token }}" + CHATML)),
    "template file and config": Kind(
        tokenizer={"chat_template": "config"}, change=write("chat_template.jinja", "{{ eos_token }}" + CHATML)
    ),
    "named templates": Kind(tokenizer={"chat_template": NAMED}),
    "template files": Kind(
        change=several(
            write("chat_template.jinja", CHATML), write("additional_chat_templates/tool_use.jinja", "T" + CHATML)
        )
    ),
    "a turn ends at the end token": Kind(
        tokenizer={"chat_template": "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"}
    ),
    "no template": Kind(tokenizer={"chat_template": None}),
    "end tokens in config": Kind(shape={"eos_token_id": [2, 3]}, more=()),
    "end tokens in generation_config": Kind(
        change=write("generation_config.json", '{"eos_token_id": [0, 3]}'), more=(2,)
    ),
    "end token of the tokenizer alone": Kind(tokenizer={"eos_token": "<unk>", "chat_template": None}, more=(0,)),
    "end of a turn in the template alone": Kind(tokenizer={"eos_token": "<unk>"}, more=(0, 3)),
    "no end token in config": Kind(shape={"eos_token_id": None}),
}


def make(kind: Kind, directory: Path) -> None:
    model = hf_model(kind.model, vocab_size=VOCAB, **kind.shape)
    model.to(kind.dtype).save_pretrained(directory, max_shard_size=kind.shard_size)
    (directory / "generation_config.json").unlink(missing_ok=True)
    train(kind.pre).save(str(directory / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>"}
    values |= {"chat_template": CHATML, **kind.tokenizer}
    (directory / "tokenizer_config.json").write_text(json.dumps(values))
    kind.change(directory)


@pytest.mark.parametrize("name", KINDS)
def test_directory(name: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    kind = KINDS[name]
    make(kind, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours, config = load_model(tmp_path, torch.float32)
    record_property("logits", compare_logits(ours, theirs))
    compare_text(tmp_path, {}, theirs, config, kind.more, record_property)


def compare_logits(ours: Transformer, theirs: torch.nn.Module) -> str:
    with torch.inference_mode():
        wanted = theirs(torch.tensor([TOKENS])).logits[0].float()
    difference = float((logits_of(ours, TOKENS).float() - wanted).abs().max())
    assert difference < TOLERANCE
    assert float(wanted.std()) > 0.1  # a model that says nothing would compare equal
    return f"{difference:.1e} apart"


def compare_text(
    path: Path,
    options: dict[str, Any],
    model: torch.nn.Module,
    config: ModelConfig,
    more: tuple[int, ...],
    record_property: Callable[[str, object], None],
) -> None:
    """Ids, end tokens and chats. ``options`` say to transformers which file of ``path`` is meant."""
    ours = load_tokenizer(path / options["gguf_file"] if options else path)
    theirs = AutoTokenizer.from_pretrained(path, **options)
    texts = [*TEXTS, "a<pad>b <extra>c<more> <tool>d", "<|im_end|><|im_end|>"]
    if options:
        # Ours composes characters as Qwen's own tokenizer.json does; transformers' loader of GGUF does not.
        texts = [unicodedata.normalize("NFC", text) for text in texts]
        record_property("explained", "texts in NFC, which transformers' GGUF loader leaves out")
    for text in texts:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.encode(text, False) == theirs.encode(text, add_special_tokens=False), text
    record_property("texts", f"{len(texts)} equal")
    recorded = model.generation_config.eos_token_id
    wanted = set(recorded if isinstance(recorded, list) else [] if recorded is None else [recorded])
    ends = with_end_tokens(config, ours.end_token_ids()).eos_token_ids
    assert wanted <= set(ends)
    assert tuple(token for token in ends if token not in wanted) == more
    record_property("end tokens", f"{sorted(wanted)}" + (f" and ours {list(more)}" if more else ""))
    if not ours.has_chat_template:
        assert theirs.chat_template is None
        return
    for tools in (None, [TOOL]):
        for prompt in (True, False):
            ask = {"tools": tools, "add_generation_prompt": prompt}
            assert ours.apply_chat_template(MESSAGES, **ask) == theirs.apply_chat_template(
                MESSAGES, tokenize=False, **ask
            )
    record_property("chats", "4 equal")


# name -> (model, architecture, pre-tokenizer, metadata, quantisation)
GGUF_KINDS: dict[str, tuple[str, str, str, dict[str, Any], str]] = {
    "llama": ("llama", "llama", "llama-bpe", {}, "F32"),
    "llama, tied": ("llama-tied", "llama", "llama-bpe", {}, "F32"),
    "qwen2": ("qwen2", "qwen2", "qwen2", {}, "F32"),
    "qwen2, tied": ("qwen2-tied", "qwen2", "qwen2", {}, "F32"),
    "qwen3": ("qwen3-wide-heads", "qwen3", "qwen2", {}, "F32"),
    "llama, F16": ("llama", "llama", "llama-bpe", {}, "F16"),
    "llama, Q8_0": ("llama", "llama", "llama-bpe", {}, "Q8_0"),
    "qwen2, Q4_0": ("qwen2", "qwen2", "qwen2", {}, "Q4_0"),
    "end of turn": ("qwen2", "qwen2", "qwen2", {"tokenizer.ggml.eot_token_id": 3}, "F32"),
}


@pytest.mark.parametrize("name", GGUF_KINDS)
def test_gguf(name: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    model_name, arch, pre, keys, quantisation = GGUF_KINDS[name]
    shape: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 96, "intermediate_size": 128}
    if arch == "qwen3":
        shape["head_dim"] = 128  # transformers' loader does not read attention.key_length
    source = Transformer(ModelConfig.from_hf(hf_config(model_name, **shape)))
    source.load_state_dict(hf_model(model_name, **shape).state_dict())
    write_gguf(tmp_path / "m.gguf", source, arch, pre, keys, quantisation)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    ours, config = load_model(tmp_path / "m.gguf", torch.float32)
    record_property("logits", compare_logits(ours, theirs))
    compare_text(tmp_path, {"gguf_file": "m.gguf"}, theirs, config, (3,), record_property)


def write_gguf(path: Path, model: Transformer, arch: str, pre: str, keys: dict[str, Any], quantisation: str) -> None:
    config, kind = model.config, gguf.GGMLQuantizationType[quantisation]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(VOCAB)
    backend = train(pre)
    vocab = {i: token for token, i in backend.get_vocab().items()}
    added = {i: 3 if token.special else 4 for i, token in backend.get_added_tokens_decoder().items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([vocab.get(i, f"[PAD{i}]") for i in range(VOCAB)])
    writer.add_token_types([added.get(i, 1 if i in vocab else 5) for i in range(VOCAB)])
    writer.add_token_merges([" ".join(merge) for merge in json.loads(backend.to_str())["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(pre == "llama-bpe")
    writer.add_chat_template(CHATML)
    for key, value in keys.items():
        writer.add_uint32(key, value)
    for name, tensor in gguf_tensors(model, arch).items():
        array = tensor.detach().numpy()
        stored = kind if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapter(name: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    import peft

    model_name, options = ADAPTERS[name]
    hf_model(model_name, vocab_size=VOCAB).save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(hf_model(model_name, vocab_size=VOCAB), peft.LoraConfig(r=4, **options))
        trained(adapted)
        adapted.save_pretrained(tmp_path / "adapter")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    ours, _ = load_model(tmp_path / "base", torch.float32)
    apply_adapter(ours, tmp_path / "adapter")
    record_property("logits", compare_logits(ours, theirs))
