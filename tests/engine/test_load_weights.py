# SPDX-License-Identifier: Apache-2.0
"""In which bits weights stay when a checkpoint is loaded, and what is said about it."""

import logging

import gguf
import numpy as np
import pytest
import torch

from tests.engine.native_model import needs_native
from tests.engine.tiny_llm import alone, save_tiny
from tests.model.test_gguf import gguf_tensors
from wedlm import LLM, SamplingParams
from wedlm.attention.sdpa import CausalAttend
from wedlm.engine import factory, load_weights
from wedlm.model import load_model, save_model
from wedlm.native import NativeTransformer
from wedlm.native.library import InstructionSet
from wedlm.native.weights import native_from_torch

PARAMS = SamplingParams(max_tokens=12, temperature=0.0)


def write_blocks(path, directory, kind: str, others: str = "F32", cut: int = 0):
    """A GGUF of the tiny model in ``directory``: layers in ``kind``, all else in ``others``, but for ``cut`` bytes."""
    model, config = load_model(directory, torch.float32)
    writer = gguf.GGUFWriter(path, "qwen3")
    numbers = {
        "block_count": config.num_layers,
        "context_length": 128,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
    }
    for key, value in numbers.items():
        writer.add_uint32(f"qwen3.{key}", value)
    writer.add_float32("qwen3.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    tokens = ["a", "b", "ab", *(f"t{i}" for i in range(3, config.vocab_size))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (config.vocab_size - 4) + [3] * 4)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(config.eos_token_ids[0])
    for name, tensor in gguf_tensors(model, "qwen3").items():
        chosen = kind if name.startswith("blk") else others
        data = tensor.detach().numpy()
        if data.ndim == 2 and chosen != "F32":
            block = gguf.GGMLQuantizationType[chosen]
            try:
                packed = gguf.quants.quantize(data, block)
            except NotImplementedError:  # a type that only llama.cpp writes: the values do not matter
                elements, size = gguf.GGML_QUANT_SIZES[block]
                packed = np.zeros((len(data), data.shape[1] // elements * size), dtype=np.uint8)
            writer.add_tensor(name, packed, raw_dtype=block)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if cut:
        path.write_bytes(path.read_bytes()[:-cut])
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An AR checkpoint whose rows divide by 32 and by 256."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    return save_tiny(tmp_path_factory.mktemp("tiny"), model_type="qwen3", mask_token_id=None, **sizes)


@needs_native
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16"])
def test_blocks_stay_as_the_file_has_them(tmp_path, plain, kind):
    path = write_blocks(tmp_path / "m.gguf", plain, kind)
    llm = LLM(path, device="cpu")
    assert isinstance(llm.model, NativeTransformer)
    assert f"native C++ forward ({llm.model.path}), " in llm.describe()
    assert kind in llm.describe()
    assert llm.model.num_bytes < 1.1 * path.stat().st_size
    wide = LLM(path, device="cpu", dtype="float32")
    assert "plain torch operations" in wide.describe()
    for prompt in ([1, 2, 3], [7] * 20):
        texts = [
            alone(llm, prompt, SamplingParams(max_tokens=12, decoding=name)).token_ids
            for name in ("auto", "verified", "autoregressive")
        ]
        assert texts[0] == texts[1] == texts[2]
        if kind in ("F16", "BF16"):  # inputs are not rounded either
            assert texts[0] == alone(wide, prompt, PARAMS).token_ids


@needs_native
def test_sixteen_bits_become_int8_unless_a_type_is_asked_for(tmp_path, monkeypatch):
    directory = save_tiny(tmp_path)
    save_model(*load_model(directory, torch.bfloat16), directory)
    llm = LLM(directory, device="cpu")
    assert "int8 weights" in llm.describe()
    expected = native_from_torch(load_model(directory)[0], "int8")
    tokens = torch.tensor([1, 2, 3])
    ours = llm.model(tokens, torch.arange(3), CausalAttend())
    assert torch.equal(ours, expected(tokens, torch.arange(3), CausalAttend()))
    for options in ({"dtype": "bfloat16"}, {"dtype": "float32"}, {"quantization": "none"}):
        assert "plain torch operations" in LLM(directory, device="cpu", **options).describe()
    monkeypatch.setattr(load_weights, "INT8_IS_CPU_DEFAULT", False)
    assert "plain torch operations" in LLM(directory, device="cpu").describe()
    assert "int8 weights" in LLM(directory, device="cpu", quantization="int8").describe()


def test_without_the_library_weights_are_widened_and_it_says_so(tmp_path, plain, monkeypatch, caplog):
    monkeypatch.setattr(factory, "is_available", lambda: False)
    path = write_blocks(tmp_path / "m.gguf", plain, "Q8_0")
    with caplog.at_level(logging.WARNING, "wedlm.engine.factory"):
        llm = LLM(path, device="cpu")
    said = (
        "weights are widened and steps take several times as long, because the native library was not built: no C++ "
        "compiler"
    )
    assert said in llm.describe()
    assert said in caplog.text
    assert alone(llm, [1, 2, 3], PARAMS).stats.num_tokens == 12


@needs_native
def test_a_processor_without_any_instruction_set_runs_on_torch(tmp_path, plain, monkeypatch):
    sets = [InstructionSet("avx2", False, "AVX2, FMA and F16C"), InstructionSet("portable", True, "nothing")]
    monkeypatch.setattr(factory, "paths", lambda: sets)
    monkeypatch.setattr(factory, "chosen_path", lambda: "portable")
    path = write_blocks(tmp_path / "m.gguf", plain, "Q8_0")
    said = "this processor has none of the instruction sets that the native library needs (AVX2, FMA and F16C)"
    assert said in LLM(path, device="cpu").describe()
    monkeypatch.setenv("WEDLM_NATIVE_PATH", "portable")  # unless it is asked for
    assert "native C++ forward (portable)" in LLM(path, device="cpu").describe()


@needs_native
def test_a_type_that_is_not_supported_is_named(tmp_path, plain):
    """What can be widened is, and what cannot is refused; each names the type and those that are."""
    path = write_blocks(tmp_path / "m.gguf", plain, "Q3_K")
    said = LLM(path, device="cpu").describe()
    assert "attn_q.weight has type Q3_K; expected one of F32, F16, BF16, Q8_0, Q4_0, Q4_1" in said
    path = write_blocks(tmp_path / "n.gguf", plain, "Q8_K")
    with pytest.raises(ValueError, match=r"attn_\w+\.weight has the unsupported type Q8_K; expected one of F32, F16"):
        LLM(path, device="cpu")


@needs_native
def test_faults_of_a_file_are_one_sentence(tmp_path, plain):
    with pytest.raises(ValueError, match=r"is truncated: tensor .* ends past the end of the file"):
        LLM(write_blocks(tmp_path / "m.gguf", plain, "Q8_0", cut=4000), device="cpu")
    narrow = save_tiny(tmp_path / "narrow", model_type="qwen3", hidden_size=48, intermediate_size=64)
    path = tmp_path / "n.gguf"
    write_blocks(path, narrow, "F32")
    data = path.read_bytes()
    # What no honest writer makes: rows of 48 in blocks of 32.
    name = b"blk.0.attn_q.weight"
    at = data.index(name) + len(name) + 4 + 16
    path.write_bytes(data[:at] + (8).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(ValueError, match=r"tensor blk\.0\.attn_q\.weight has rows of 48; expected a multiple of 32"):
        LLM(path, device="cpu")
