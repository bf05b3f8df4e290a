# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in fewer bits: what is written is what was there, rounded, with its tokenizer and its mask token."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

from tests.engine.native_model import needs_native
from tests.engine.tiny_llm import VOCAB, save_tiny
from tests.model.named_tokenizer import TEMPLATES, save_smollm_like
from tests.model.tiny import YARN_ROPE, logits_of, our_model
from wedlm import LLM, SamplingParams
from wedlm.model import CheckpointError, ModelConfig, Transformer, load_model, load_tokenizer, save_model
from wedlm.model.config import RopeScaling
from wedlm.model.formats.gguf_file import GGUFFile
from wedlm.model.formats.gguf_model import checkpoint_name, gguf_name, permute_rows, unpermute_rows
from wedlm.model.formats.gguf_tokenizer import SUPPORTED_PRE_TOKENIZERS
from wedlm.model.formats.gguf_write import GGUF_TYPES, tensor_type
from wedlm.model.formats.int8_rows import round_rows
from wedlm.model.quantize_checkpoint import quantize_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 256, "qk_norm": False, "block_size": 8}
    return save_smollm_like(tmp_path_factory.mktemp("tiny"), model_type="llama", **sizes)


def test_int8_directory(source, tmp_path):
    made = quantize_checkpoint(source, tmp_path / "int8")
    assert (made.path, made.form) == (tmp_path / "int8", "int8, one scale for each output")
    before, config = load_model(source, torch.float32)
    after, stored = load_model(tmp_path / "int8", torch.float32)
    assert stored == config
    for name, tensor in before.state_dict().items():
        expected = round_rows(tensor).widened() if tensor.ndim == 2 else tensor
        assert torch.equal(after.state_dict()[name], expected), name
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "int8" / name).read_bytes() == (source / name).read_bytes()
    assert made.num_bytes < 0.6 * (source / "model.safetensors").stat().st_size
    again = quantize_checkpoint(tmp_path / "int8", tmp_path / "again")  # eight bits are taken over as they are
    assert (again.path / "model.safetensors").read_bytes() == (tmp_path / "int8/model.safetensors").read_bytes()


@needs_native
def test_int8_directory_runs_as_the_original_in_int8(source, tmp_path):
    quantize_checkpoint(source, tmp_path)
    params = SamplingParams(max_tokens=20, temperature=0.0)
    ours, theirs = LLM(tmp_path, device="cpu"), LLM(source, device="cpu", quantization="int8")
    assert "weights: int8;" in ours.describe()
    for prompt in ([1, 2, 3], [9] * 20):
        assert ours.generate(prompt, params)[0].token_ids == theirs.generate(prompt, params)[0].token_ids
    wide = LLM(tmp_path, device="cpu", dtype="float32")
    assert wide.generate([1, 2, 3], params)[0].stats.num_tokens == 20


@pytest.mark.parametrize("said", [None, "verified"])
def test_the_defaults_of_the_papers_format_survive_in_gguf(tmp_path, said):
    """Though the file has llama.cpp's name for the shape."""
    own = {"decoding": said, "next_token": said and "causal", "entropy_threshold": said and 0.2}
    sizes = {"hidden_size": 64, "intermediate_size": 256, **own}
    source = save_smollm_like(tmp_path / "wedlm", model_type="wedlm", **sizes)
    quantize_checkpoint(source, tmp_path / "m.gguf", type="f16")
    _, stored = load_model(tmp_path / "m.gguf", torch.float32)
    assert (stored.model_type, stored.default_decoding) == ("qwen3", said or "streaming")
    assert (stored.next_token, stored.default_next_token) == (said and "causal", "causal" if said else "masked")
    assert (stored.entropy_threshold, stored.default_entropy_threshold) == (said and 0.2, 0.2 if said else 0.4)


@pytest.mark.parametrize("type", GGUF_TYPES)
def test_gguf_round_trip(source, tmp_path, type):
    path = tmp_path / "m.gguf"
    made = quantize_checkpoint(source, path, type=type)
    assert (made.path, made.form, made.num_bytes) == (path, f"GGUF, {type.upper()}", path.stat().st_size)
    before, config = load_model(source, torch.float32)
    after, stored = load_model(path, torch.float32)
    assert stored == config
    assert (stored.mask_token_id, stored.block_size, stored.is_wedlm) == (config.mask_token_id, 8, True)
    file = GGUFFile(path)
    kinds = {}
    for name, place in file.tensors.items():
        kinds[name] = file.type_name(name)
        assert place.ggml_type == tensor_type(type, name, place.shape, config)
        ours, theirs = (model.state_dict()[checkpoint_name(name)] for model in (after, before))
        assert (ours - theirs).norm() <= {"4": 0.11, "5": 0.06, "6": 0.03, "8": 0.01}.get(
            type[1], 0.003
        ) * theirs.norm()
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    if type == "q4_k":  # 64 does not divide by 256, and 256 does
        assert (kinds["blk.0.attn_q.weight"], kinds["blk.0.ffn_down.weight"]) == ("Q5_0", "Q4_K")
        assert kinds["output.weight"] == "Q8_0"
    tokenizer, known = load_tokenizer(path), load_tokenizer(source)
    assert tokenizer.chat_templates == known.chat_templates == TEMPLATES
    assert tokenizer.special_tokens == known.special_tokens
    assert tokenizer.special_ids == known.special_ids
    assert tokenizer.vocab_size == known.vocab_size
    for text in ("the tree, 123 <|end|>", " the\n\n"):
        assert tokenizer.encode(text) == known.encode(text)


@needs_native
def test_a_gguf_that_was_written_runs_and_drafts(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "m.gguf", type="f16")
    llm, wide = LLM(tmp_path / "m.gguf", device="cpu"), LLM(source, device="cpu", dtype="float32")
    assert llm.engine.config.has_masked_rows
    for decoding in ("autoregressive", "verified"):
        params = SamplingParams(max_tokens=20, temperature=0.0, decoding=decoding)
        assert llm.generate([1, 2], params)[0].token_ids == wide.generate([1, 2], params)[0].token_ids


@pytest.mark.parametrize(
    ("name", "arch"),
    [("llama", "llama"), ("llama-tied", "llama"), ("qwen2", "qwen2"), ("qwen3-wide-heads", "qwen3"),
     ("wedlm-qwen2.5", "qwen2"), ("wedlm-qwen3", "qwen3"), ("yarn-rope", "qwen2"), ("linear-rope", "llama")],
)  # fmt: skip
def test_families(name, arch, tmp_path):
    model = our_model(name)
    save_model(model, model.config, tmp_path)
    load_tokenizer(save_smollm_like(tmp_path / "other", vocab_size=VOCAB)).save(tmp_path)
    with pytest.raises(ValueError, match=r"ids beyond the embedding's 97"):
        quantize_checkpoint(tmp_path, tmp_path / "m.gguf", type="f32")
    assert not (tmp_path / "m.gguf").exists()
    assert not list(tmp_path.glob(".*"))
    model = our_model(name, vocab_size=VOCAB)
    save_model(model, model.config, tmp_path)
    quantize_checkpoint(tmp_path, tmp_path / "m.gguf", type="f32")
    loaded, config = load_model(tmp_path / "m.gguf", torch.float32)
    assert torch.equal(logits_of(loaded, [1, 5, 42]), logits_of(model, [1, 5, 42]))
    assert config.model_type == arch
    assert config.rope_scaling == model.config.rope_scaling
    assert config.mask_token_id == model.config.mask_token_id


def test_names_and_heads_there_and_back():
    model = Transformer(ModelConfig.from_hf({**json.loads(json.dumps(our_model("llama-biases").config.to_hf()))}))
    for name, _ in model.named_parameters():
        assert gguf_name(name) != name
        assert checkpoint_name(gguf_name(name)) == name
    rows = torch.arange(48.0).reshape(16, 3)
    assert torch.equal(unpermute_rows(permute_rows(rows, 2), 2), rows)


def test_the_mixture_is_llama_cpps():
    """Of 32 layers: the first four, the last four, and every third from the sixth on, as in its own files."""
    values = our_model("llama").config
    config = ModelConfig(**{**{name: getattr(values, name) for name in values.__slots__}, "num_layers": 32})
    more = [i for i in range(32) if tensor_type("q4_k_m", f"blk.{i}.attn_v.weight", (64, 256), config).name == "Q6_K"]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert tensor_type("q4_k_m", "blk.5.ffn_down.weight", (64, 256), config) == GGMLQuantizationType.Q4_K
    assert tensor_type("q4_k_m", "blk.6.ffn_down.weight", (64, 256), config) == GGMLQuantizationType.Q6_K
    assert tensor_type("q4_k_m", "output.weight", (64, 256), config) == GGMLQuantizationType.Q6_K
    assert tensor_type("q4_0", "token_embd.weight", (64, 256), config) == GGMLQuantizationType.Q4_0
    assert tensor_type("q6_k", "blk.5.ffn_up.weight", (64, 96), config) == GGMLQuantizationType.Q8_0
    assert tensor_type("q5_k", "blk.5.ffn_up.weight", (64, 96), config) == GGMLQuantizationType.Q5_1
    assert tensor_type("q8_0", "blk.5.ffn_up.weight", (64, 48), config) == GGMLQuantizationType.F16


@pytest.mark.parametrize("kind", SUPPORTED_PRE_TOKENIZERS)
def test_kinds_of_tokenizers(kind, tmp_path):
    directory = save_smollm_like(tmp_path / "m", kind)
    quantize_checkpoint(directory, tmp_path / "m.gguf", type="q8_0")
    ours, known = load_tokenizer(tmp_path / "m.gguf"), load_tokenizer(directory)
    for text in ("the tree they'll 12345", " the\n\n the", "é THE"):
        assert ours.encode(text) == known.encode(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "gptq"}, "to is 'gptq'; expected one of int8, gguf"),
        ({"type": "q3_k"}, "type is 'q3_k', which is a type of GGUF files; expected --to gguf"),
        ({"to": "gguf", "type": "q3_k"}, "type is 'q3_k'; expected one of f32, f16"),
        ({"to": "gguf"}, "is not the name of a GGUF file"),
    ],
)
def test_what_cannot_be_asked_for(source, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        quantize_checkpoint(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_unless_forced(source, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"mine")
    with pytest.raises(ValueError, match="exists; expected a new file, or --force"):
        quantize_checkpoint(source, path)
    assert path.read_bytes() == b"mine"
    quantize_checkpoint(source, path, force=True)
    assert load_model(path)[1].vocab_size == VOCAB
    with pytest.raises(ValueError, match="is the source itself"):
        quantize_checkpoint(path, path, force=True)
    with pytest.raises(ValueError, match="is the source itself"):
        quantize_checkpoint(source, source, force=True)


def test_what_gguf_cannot_hold(tmp_path):
    directory = save_tiny(tmp_path / "odd")
    with pytest.raises(ValueError, match="the tokenizer cuts text in a way without a name; expected one of smollm"):
        quantize_checkpoint(directory, tmp_path / "m.gguf")
    rope = RopeScaling(**{**YARN_ROPE, "attention_factor": 1.5})
    stretched = save_smollm_like(tmp_path / "rope", rope_scaling=rope)
    with pytest.raises(ValueError, match="RoPE is yarn with attention_factor; expected none, linear or plain yarn"):
        quantize_checkpoint(stretched, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def test_damaged_eight_bits_are_one_sentence(source, tmp_path):
    from safetensors.torch import load_file, save_file

    quantize_checkpoint(source, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({key: value for key, value in tensors.items() if key != name + "_scale"}, path)
    with pytest.raises(CheckpointError, match=r"lacks the tensor .*up_proj.weight_scale, the scales of"):
        load_model(tmp_path)
    save_file(tensors | {name + "_scale": torch.ones(7)}, path)
    with pytest.raises(CheckpointError, match=r"up_proj.weight_scale is torch.float32 of shape \[7\]; expected"):
        load_model(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["quantization_config"] == {"quant_method": "wedlm-int8"}


@pytest.mark.long
@pytest.mark.demo_model
@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs pip install 'wedlm[llamacpp]'")
@pytest.mark.parametrize("type", ["f16", "q8_0"])
def test_llama_cpp_gives_the_same_greedy_text(type, tmp_path, record_property):
    path = tmp_path / "demo.gguf"
    quantize_checkpoint("demo", path, type=type)
    llm = LLM(path, device="cpu")
    lines = (Path(__file__).parents[1] / "data/prompts.jsonl").read_text().splitlines()[:8]
    texts = [json.loads(line)["prompt"] for line in lines]
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "1"},
    ]
    prompts = [llm.chat_prompt([{"role": "user", "content": text}]) for text in texts]
    params = SamplingParams(max_tokens=32, temperature=0.0)
    ours = [output.token_ids for output in llm.generate(prompts, params, progress=False)]
    task = {"model": str(path), "prompts": prompts, "max_tokens": 32, "texts": texts, "messages": messages}
    worker = [sys.executable, str(Path(__file__).with_name("llamacpp_worker.py"))]
    ran = subprocess.run(worker, input=json.dumps(task) + "\n", capture_output=True, text=True, timeout=600, check=True)
    theirs = json.loads(ran.stdout.splitlines()[-1])
    record_property("prompts with the same 32 tokens", f"{sum(map(list.__eq__, ours, theirs['tokens']))} of 8")
    assert theirs["encoded"] == [llm.tokenizer.encode(text) for text in texts]
    assert theirs["chat"] == llm.tokenizer.apply_chat_template(messages)
    assert theirs["tokens"] == ours
