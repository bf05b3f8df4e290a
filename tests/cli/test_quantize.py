# SPDX-License-Identifier: Apache-2.0
"""``wedlm quantize``, and other commands with what it writes."""

import json

import pytest

from tests.cli.command import generate, records, wedlm
from tests.engine.native_model import needs_native
from tests.model.named_tokenizer import save_smollm_like
from wedlm import LLM


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """An AR checkpoint of 16 bits without a mask token."""
    directory = tmp_path_factory.mktemp("tiny") / "ar"
    return str(save_smollm_like(directory, model_type="qwen3", mask_token_id=None, hidden_size=64))


@needs_native
@pytest.mark.parametrize(
    ("name", "words", "said", "weights"),
    [
        ("int8", [], "int8, one scale for each output; 0 MB", "int8"),
        ("m.gguf", [], "GGUF, Q8_0; 0 MB", "Q8_0"),
        ("n.gguf", ["--to", "gguf", "--type", "q4_0"], "GGUF, Q4_0; 0 MB", "Q4_0"),
    ],
)
def test_what_is_written_is_run_as_it_is(source, tmp_path, name, words, said, weights):
    written = str(tmp_path / name)
    result = wedlm("quantize", source, written, *words)
    assert (result.exit_code, result.stdout.strip()) == (0, written), result.output
    assert said in result.stderr
    answered = generate(written, "--raw", "--json", "--max-tokens", "4", "--temperature", "0", "abc")
    (record,) = records(answered)
    assert record["stats"]["num_drafted"] == record["stats"]["num_lookup_drafted"]
    first = answered.stderr.splitlines()[0]
    assert "native C++ forward" in first
    assert f"weights: {weights}" in first
    assert "drafts come from the text alone: the checkpoint names no mask token" in first
    widened = generate(written, "--raw", "--json", "--max-tokens", "4", "--dtype", "float32", "abc")
    assert widened.exit_code == 0
    assert "plain torch operations" in widened.stderr
    drafting = generate(written, "--raw", "--json", "--max-tokens", "4", "--mask-token-id", "99", "abc")
    assert json.loads(drafting.stdout)["stats"]["decoding"] == "auto"
    assert not LLM(written, device="cpu").engine.config.has_masked_rows


def test_errors_are_one_sentence(source, tmp_path):
    for words, message in (
        ((source, str(tmp_path / "x.gguf"), "--type", "q3_k"), "type is 'q3_k'; expected one of f32, f16, bf16"),
        ((source, str(tmp_path / "x"), "--type", "q8_0"), "type is 'q8_0', which is a type of GGUF files"),
        ((source, source), "is the source itself"),
        (("./absent", str(tmp_path / "x")), "absent does not exist; expected a checkpoint"),
    ):
        result = wedlm("quantize", *words)
        assert result.exit_code == 2, result.output
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
