# SPDX-License-Identifier: Apache-2.0
"""WeDLM directories made from AR checkpoints: the mask token, its embedding, and files that every reader agrees on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import AddedToken, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.engine.tiny_llm import ASSISTANT, CHARACTERS, CHAT_TEMPLATE, END, USER, VOCAB, save_tiny, tiny_tokenizer
from tests.model import trained_tokenizers
from tests.model.gguf_files import gguf_tensors
from tests.model.tiny import hf_config, logits_of, our_model
from wedlm import LLM, SamplingParams
from wedlm.cli.init import run_init
from wedlm.model import CheckpointError, ModelConfig, Tokenizer, load_model, load_tokenizer
from wedlm.model.init_checkpoint import check_mask_token_id, choose_mask_token_id, init_checkpoint, set_mask_embedding

TEXTS = ["Hello", "<|user|>hi<|end|>", "é caf 12", "a  b\n\nc"]
MESSAGES = [{"role": "user", "content": "Hi <|end|> there"}]


def save_ar(directory: Path, **overrides: Any) -> Path:
    """A tiny Llama checkpoint with the tokenizer of the engine's tests."""
    return save_tiny(directory, model_type="llama", qk_norm=False, mask_token_id=None, **overrides)


def tokenizer_with(*special: str, size: int = 20, template: str | None = None, **named: str) -> Tokenizer:
    backend = Backend(BPE({f"{i}": i for i in range(size)}, []))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    backend.add_special_tokens([AddedToken(text, special=True) for text in special])
    return Tokenizer(backend, {} if template is None else {"default": template}, named)


def config_of(vocab_size: int, **values: Any) -> ModelConfig:
    return dataclasses.replace(our_model("llama").config, vocab_size=vocab_size, eos_token_ids=(), **values)


class TestInitialise:
    def test_from_a_directory(self, tmp_path: Path) -> None:
        source, output = save_ar(tmp_path / "ar"), tmp_path / "new" / "wedlm"
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [END], "top_p": 0.9}))
        made = init_checkpoint(source, output, block_size=8)
        assert (made.directory, made.mask_token) == (output, None)
        before, _ = load_model(source)
        model, config = load_model(output)
        assert config == made.config
        assert config == dataclasses.replace(load_model(source)[1], mask_token_id=101, block_size=8)
        assert config.is_wedlm
        assert {path.name for path in output.iterdir()} == {path.name for path in source.iterdir()}
        assert json.loads((output / "generation_config.json").read_text())["top_p"] == 0.9
        for name, tensor in before.state_dict().items():
            same = torch.ones(len(tensor), dtype=torch.bool)
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                same[101] = False
                torch.testing.assert_close(model.state_dict()[name][101], tensor[:101].mean(0))
            assert torch.equal(model.state_dict()[name][same], tensor[same]), name

    def test_the_original_decodes_as_before_and_the_stock_class_loads_it(self, tmp_path: Path) -> None:
        source = save_ar(tmp_path / "ar")
        init_checkpoint(source, tmp_path / "wedlm")
        params = SamplingParams(max_tokens=20, decoding="autoregressive")
        old, new = (LLM(path, device="cpu", mask_token_id=101) for path in (source, tmp_path / "wedlm"))
        assert new.generate(TEXTS, params)[0].token_ids == old.generate(TEXTS, params)[0].token_ids
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "wedlm")
        assert type(stock).__name__ == "LlamaForCausalLM"
        with torch.inference_mode():
            wanted = stock(torch.tensor([[5, 6, 7]])).logits[0]
        assert (logits_of(load_model(tmp_path / "wedlm")[0], [5, 6, 7]) - wanted).abs().max() < 1e-4

    @pytest.mark.filterwarnings("ignore:a prompt begins with <s>")
    @pytest.mark.parametrize("kind", ["smollm", "qwen2", "llama-bpe"])
    def test_from_gguf_the_tokenizer_is_written_so_that_all_agree(self, kind: str, tmp_path: Path) -> None:
        """One file with a model and a tokenizer; then the GGUF's ids = ours = transformers'."""
        backend = trained_tokenizers.train(kind)
        source = tmp_path / "model.gguf"
        write_model_and_tokenizer(source, backend, kind)
        made = init_checkpoint(source, tmp_path / "out")
        assert made.mask_token == "<unk>"
        original, written = load_tokenizer(source), load_tokenizer(tmp_path / "out")
        theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
        for text in trained_tokenizers.TEXTS:
            for special in (True, False):
                ids = original.encode(text, special)
                assert ids == written.encode(text, special)
                assert ids == theirs.encode(text, add_special_tokens=special)
                assert written.decode(ids, special) == theirs.decode(ids, skip_special_tokens=special)
        prompt = original.apply_chat_template(trained_tokenizers.MESSAGES)
        assert written.apply_chat_template(trained_tokenizers.MESSAGES) == prompt
        assert (
            theirs.apply_chat_template(trained_tokenizers.MESSAGES, tokenize=False, add_generation_prompt=True)
            == prompt
        )
        assert (theirs.bos_token, theirs.eos_token) == ("<s>", "<|im_end|>")
        assert torch.equal(load_model(tmp_path / "out")[0].model.norm.weight, load_model(source)[0].model.norm.weight)

    @pytest.mark.long
    @pytest.mark.demo_model
    def test_from_the_demo_model(self, tmp_path: Path) -> None:
        made = init_checkpoint("demo-base", tmp_path)
        assert (made.config.mask_token_id, made.mask_token, made.config.block_size) == (16, "<empty_output>", 32)
        assert made.config.eos_token_ids == (2,)
        theirs, demo = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer("demo-base")
        for text in [*TEXTS, "3.14 don't 日本 <|im_start|>user"]:
            assert theirs.encode(text) == demo.encode(text)
        assert theirs.apply_chat_template(MESSAGES, add_generation_prompt=True).input_ids == demo.encode(
            demo.apply_chat_template(MESSAGES), add_special_tokens=False
        )
        before, after = (load_model(path)[0].model.embed_tokens.weight.detach() for path in ("demo-base", tmp_path))
        others = torch.arange(len(before)) != 16
        assert torch.equal(before[others], after[others])
        torch.testing.assert_close(after[16].float(), before[others].float().mean(0), atol=1e-3, rtol=1e-2)

    def test_tied_embeddings_stay_tied(self, tmp_path: Path) -> None:
        init_checkpoint(save_ar(tmp_path / "ar", tie_word_embeddings=True), tmp_path / "wedlm")
        model, config = load_model(tmp_path / "wedlm")
        assert config.tie_word_embeddings
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_force_replaces_a_checkpoint_and_nothing_else(self, tmp_path: Path) -> None:
        source, output = save_ar(tmp_path / "ar"), tmp_path / "out"
        output.mkdir()
        stale = (
            "chat_template.jinja",
            "model.safetensors.index.json",
            "model-00001-of-00002.safetensors",
            "merges.txt",
        )
        for name in (*stale, "notes.md", "adapter_model.safetensors"):
            (output / name).write_text("old")
        with pytest.raises(ValueError, match=r"is not empty; expected a new directory, or --force"):
            init_checkpoint(source, output)
        assert sorted(path.name for path in output.iterdir()) == sorted(
            [*stale, "notes.md", "adapter_model.safetensors"]
        )
        init_checkpoint(source, output, force=True)
        assert not any((output / name).exists() for name in stale)
        assert (output / "notes.md").read_text() == (output / "adapter_model.safetensors").read_text() == "old"
        assert load_tokenizer(output).chat_templates == {"default": CHAT_TEMPLATE}
        assert load_model(output)[1].mask_token_id == 101

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"mask_token_id": END}, rf"mask_token_id is {END}, which is the end token '<\|end\|>'"),
            ({"mask_token_id": 5}, f"mask_token_id is 5, which is the token '{CHARACTERS[5]}' of ordinary text"),
            ({"mask_token_id": VOCAB}, f"mask_token_id is {VOCAB}; expected an id from 0 to {VOCAB - 1}"),
            ({"mask_token_id": -1}, "mask_token_id is -1; expected an integer of at least 0"),
            ({"mask_token_id": True}, "mask_token_id is True"),
            ({"mask_token_id": ASSISTANT}, r"'<\|assistant\|>' of the chat template"),
            ({"mask_token_id": USER}, r"'<\|user\|>' of the chat template"),
            ({"block_size": 0}, "block_size is 0; expected an integer of at least 1"),
        ],
    )
    def test_refusals_write_nothing(self, options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
        source = save_ar(tmp_path / "ar")
        with pytest.raises(ValueError, match=sentence):
            init_checkpoint(source, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    def test_places_that_cannot_be(self, tmp_path: Path) -> None:
        source = save_ar(tmp_path / "ar")
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="is a file; expected a directory"):
            init_checkpoint(source, tmp_path / "file", force=True)
        with pytest.raises(ValueError, match="is the source itself"):
            init_checkpoint(source, source, force=True)
        with pytest.raises(CheckpointError, match="does not exist"):
            init_checkpoint(tmp_path / "nothing", tmp_path / "out")
        (source / "tokenizer.json").unlink()
        with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
            init_checkpoint(source, tmp_path / "out")

    def test_a_wedlm_checkpoint_is_one_already(self, tmp_path: Path) -> None:
        for name, directory in (("wedlm", save_tiny(tmp_path / "wedlm")), ("adapted", tmp_path / "adapted")):
            if name == "adapted":
                init_checkpoint(save_ar(tmp_path / "ar"), directory)
            with pytest.raises(ValueError, match="is a WeDLM checkpoint already; expected an AR checkpoint"):
                init_checkpoint(directory, tmp_path / "out")


class TestChoice:
    def test_qwen_vocabularies_take_the_published_id(self) -> None:
        """Also in Qwen3, which has a token there, and even if asked for by number."""
        names = {151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>", 151665: "<tool_response>"}
        vocab = {names.get(i, f"t{i}"): i for i in range(151666)}
        tokenizer = Tokenizer(Backend(BPE(vocab, [])), {"default": "<tool_response>"})
        config = config_of(151936)
        assert choose_mask_token_id(config, tokenizer) == 151665
        check_mask_token_id(151665, config, tokenizer)
        with pytest.raises(ValueError, match="'t151664' of ordinary text"):
            check_mask_token_id(151664, config, tokenizer)
        assert choose_mask_token_id(config_of(151936), tokenizer_with("<x>")) == 20, "another vocabulary of that size"

    def test_reserved_tokens_come_first_then_the_last_special_one(self) -> None:
        config = config_of(40)
        assert choose_mask_token_id(config, tokenizer_with("<a>", "<b>", "<c>")) == 22
        assert choose_mask_token_id(config, tokenizer_with("<a>", "<|reserved_1|>", "<c>")) == 21
        assert choose_mask_token_id(config, tokenizer_with("<a>", "[unused7]", "[unused8]", "<c>")) == 22

    def test_used_special_tokens_are_passed_over(self) -> None:
        tokenizer = tokenizer_with("<a>", "<b>", "<c>", "<d>", "<e>", template="{{ '<' + 'd>' }} <c>", pad_token="<b>")
        assert choose_mask_token_id(config_of(40, bos_token_id=24), tokenizer) == 20
        config = dataclasses.replace(config_of(40, bos_token_id=24), eos_token_ids=(20,))
        assert choose_mask_token_id(config, tokenizer) == 25, "none is left: the first id behind the tokenizer's"
        for token_id, use in (
            (20, "the end token '<a>'"),
            (21, "the tokenizer's pad_token '<b>'"),
            (22, "the token '<c>' of the chat template"),
            (23, "the token '<d>' of the chat template"),
            (24, "the first token of a text, '<e>'"),
        ):
            with pytest.raises(ValueError, match=f"mask_token_id is {token_id}, which is {use}"):
                check_mask_token_id(token_id, config, tokenizer)

    def test_tokens_that_the_tokenizer_adds_are_passed_over(self) -> None:
        tokenizer = Tokenizer(trained_tokenizers.train("llama-bpe"))
        assert tokenizer.encode("")[0] == 1
        with pytest.raises(ValueError, match="'<s>' of the chat template, or one that the tokenizer adds"):
            check_mask_token_id(1, config_of(1000, bos_token_id=None), tokenizer)

    def test_no_id_is_left(self) -> None:
        with pytest.raises(ValueError, match="the tokenizer uses all 20 ids and every special token"):
            choose_mask_token_id(config_of(20), tokenizer_with())
        with pytest.raises(ValueError, match="the tokenizer uses all 21 ids"):
            choose_mask_token_id(dataclasses.replace(config_of(21), eos_token_ids=(20,)), tokenizer_with("<a>"))

    def test_a_template_that_refuses_roles_does_not_stop_the_choice(self) -> None:
        template = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}<b>"
        assert choose_mask_token_id(config_of(40), tokenizer_with("<a>", "<b>", template=template)) == 20


def test_mean_embedding_in_bfloat16_is_summed_in_float32() -> None:
    """A sum kept in bfloat16 would stop growing; rows behind the tokenizer's are noise and do not count."""
    model = our_model("llama").to(torch.bfloat16)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.full((97, 48), 3.0))
        model.model.embed_tokens.weight[90:] = 1000.0
        model.lm_head.weight.copy_(torch.arange(97.0)[:, None].expand(97, 48))
    set_mask_embedding(model, 4, 90)
    assert torch.equal(model.model.embed_tokens.weight[4], torch.full((48,), 3.0, dtype=torch.bfloat16))
    expected = torch.tensor((sum(range(90)) - 4) / 89).to(torch.bfloat16)
    assert torch.equal(model.lm_head.weight[4], expected.expand(48))


def write_model_and_tokenizer(path: Path, backend: Backend, kind: str) -> None:
    """A GGUF with both parts: the tests of each write only theirs."""
    vocab = {i: token for token, i in backend.get_vocab().items()}
    config = ModelConfig.from_hf({**hf_config("llama"), "vocab_size": len(vocab)})
    torch.manual_seed(0)
    model = type(our_model("llama"))(config)
    added = {i: 3 if token.special else 4 for i, token in backend.get_added_tokens_decoder().items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list([vocab[i] for i in range(len(vocab))])
    writer.add_token_types([added.get(i, 1) for i in range(len(vocab))])
    writer.add_token_merges([" ".join(merge) for merge in json.loads(backend.to_str())["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(3)
    writer.add_chat_template(trained_tokenizers.CHATML)
    for name, tensor in gguf_tensors(model, "llama").items():
        writer.add_tensor(name, tensor.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_command_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_init(str(save_ar(tmp_path / "ar")), tmp_path / "out", mask_token_id=None, block_size=8, force=False)
    printed = capsys.readouterr()
    assert printed.out.replace("\n", "") == str(tmp_path / "out")
    assert "llama, 2 layers, float32; block size 8; mask token 101, an id that text does not use" in printed.err
    assert load_model(tmp_path / "out")[1].block_size == 8


def test_the_tiny_tokenizer_is_what_these_tests_assume() -> None:
    assert tiny_tokenizer().vocab_size == 101
    assert choose_mask_token_id(config_of(VOCAB, bos_token_id=None), tiny_tokenizer(chat=False)) == ASSISTANT
