# SPDX-License-Identifier: Apache-2.0
"""In which bits weights stay when a checkpoint is loaded, and what is said about it."""

import logging
import re

import pytest
import torch

from tests.engine.native_model import needs_native
from tests.engine.tiny_llm import alone, save_tiny
from tests.model.gguf_files import write_blocks
from wedlm import LLM, SamplingParams
from wedlm.attention.sdpa import CausalAttend
from wedlm.engine import factory, load_weights
from wedlm.model import load_model, save_model
from wedlm.native import NativeTransformer
from wedlm.native.library import InstructionSet
from wedlm.native.weights import native_from_torch

PARAMS = SamplingParams(max_tokens=12, temperature=0.0)


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
    rounded = "" if kind in ("F16", "BF16") else ", rounded to int8 for matrix products"
    assert re.search(rf"; weights: {kind}[^;]*; activations: float32{rounded}; cache: float32, ", llm.describe())
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
    assert "weights: int8;" in llm.describe()
    expected = native_from_torch(load_model(directory)[0], "int8")
    tokens = torch.tensor([1, 2, 3])
    ours = llm.model(tokens, torch.arange(3), CausalAttend())
    assert torch.equal(ours, expected(tokens, torch.arange(3), CausalAttend()))
    for options in ({"dtype": "bfloat16"}, {"dtype": "float32"}, {"quantization": "none"}):
        assert "plain torch operations" in LLM(directory, device="cpu", **options).describe()
    monkeypatch.setattr(load_weights, "INT8_IS_CPU_DEFAULT", False)
    assert "plain torch operations" in LLM(directory, device="cpu").describe()
    assert "weights: int8;" in LLM(directory, device="cpu", quantization="int8").describe()


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
