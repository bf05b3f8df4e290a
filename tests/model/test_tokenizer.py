# SPDX-License-Identifier: Apache-2.0
"""The tokenizer against transformers' AutoTokenizer on small tokenizers trained here, from directories and GGUF."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from tests.model.trained_tokenizers import CHATML, MESSAGES, TEMPLATES, TEXTS, TOOL, train
from wedlm.model import CheckpointError, Tokenizer, load_tokenizer


def write_directory(directory: Path, backend: Backend, **config: Any) -> Path:
    backend.save(str(directory / "tokenizer.json"))
    values = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<|im_end|>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(values))
    return directory


def write_gguf(path: Path, backend: Backend, kind: str, change: dict[str, Any] | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    vocab = {i: token for token, i in backend.get_vocab().items()}
    tokens = [vocab.get(i, f"[PAD{i}]") for i in range(max(vocab) + 3)]
    added = {i: 3 if token.special else 4 for i, token in backend.get_added_tokens_decoder().items()}
    types = [added.get(i, 1 if i in vocab else 5) for i in range(len(tokens))]
    values = {"model": "gpt2", "pre": kind, **(change or {})}
    writer.add_tokenizer_model(values["model"])
    writer.add_tokenizer_pre(values["pre"])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in json.loads(backend.to_str())["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(3)
    writer.add_chat_template(CHATML)
    if "add_bos" in values:
        writer.add_add_bos_token(values["add_bos"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.filterwarnings("ignore:a prompt begins with <s>")  # one of the texts does
@pytest.mark.parametrize("kind", ["smollm", "qwen2", "llama-bpe"])
def test_directory_equals_transformers(kind: str, tmp_path: Path) -> None:
    backend = train(kind)
    # What a tokenizer.json may record of its training; neither must touch a prompt.
    backend.enable_truncation(4)
    backend.enable_padding(length=50, pad_token="<unk>")
    write_directory(tmp_path, backend)
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            assert ours.decode(ids, special) == theirs.decode(ids, skip_special_tokens=special)
    assert ours.special_ids == {0, 1, 2, 3}
    assert ours.vocab_size == len(theirs)
    assert ours.token_id("<|im_end|>") == 3
    assert ours.token_id("absent") is None


@pytest.mark.filterwarnings("ignore:a prompt begins with <s>")  # one of the texts does
@pytest.mark.parametrize("kind", ["smollm", "qwen2", "llama-bpe"])
def test_gguf_rebuilds_the_tokenizer(kind: str, tmp_path: Path) -> None:
    original = train(kind)
    rebuilt = load_tokenizer(write_gguf(tmp_path / "t.gguf", original, kind))
    for text in [*TEXTS, " ".join(TEXTS), "".join(chr(i) for i in range(1, 0x3000, 7))]:
        assert rebuilt.encode(text) == original.encode(text).ids
        assert rebuilt.decode(rebuilt.encode(text)) == original.decode(original.encode(text).ids)
    assert rebuilt.special_ids == {0, 1, 2, 3}
    assert rebuilt.vocab_size == original.get_vocab_size()
    assert rebuilt.special_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    assert rebuilt.apply_chat_template(MESSAGES[1:2]).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(("add_bos", "first"), [(True, [1]), (False, [])])
def test_gguf_says_whether_bos_is_added(add_bos: bool, first: list[int], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_gguf(tmp_path / "t.gguf", train("smollm"), "smollm", {"add_bos": add_bos}))
    assert tokenizer.encode("hi") == first + tokenizer.encode("hi", add_special_tokens=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model is 'llama'; expected 'gpt2'"),
        ({"pre": "deepseek-llm"}, "tokenizer.ggml.pre is 'deepseek-llm'; expected one of smollm"),
    ],
)
def test_gguf_of_another_kind_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(write_gguf(tmp_path / "t.gguf", train("smollm"), "smollm", change))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_templates_render_as_in_transformers(name: str, add_generation_prompt: bool, tmp_path: Path) -> None:
    write_directory(tmp_path, train("smollm"), chat_template=TEMPLATES[name])
    options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt}
    if name == "tools":
        options |= {"tools": [TOOL], "enable_thinking": False}
    wanted = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(MESSAGES, tokenize=False, **options)
    assert load_tokenizer(tmp_path).apply_chat_template(MESSAGES, **options) == wanted


def test_template_file_wins_over_the_config(tmp_path: Path) -> None:
    write_directory(tmp_path, train("smollm"), chat_template="config")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_tokenizer(tmp_path).apply_chat_template(MESSAGES) == "file"


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    tokenizer = load_tokenizer(write_directory(tmp_path, train("smollm"), chat_template=named))
    assert tokenizer.apply_chat_template(MESSAGES) == "plain"
    assert tokenizer.apply_chat_template(MESSAGES, tools=[TOOL]) == "with tools"


def test_special_tokens_may_be_objects(tmp_path: Path) -> None:
    write_directory(tmp_path, train("smollm"), bos_token={"content": "<s>", "lstrip": False}, pad_token=None)
    assert load_tokenizer(tmp_path).special_tokens == {"bos_token": "<s>", "eos_token": "<|im_end|>"}


def test_what_stands_beside_the_tokenizer_is_read_as_by_transformers(tmp_path: Path) -> None:
    """A named token of special_tokens_map.json, and templates in files."""
    write_directory(tmp_path, train("smollm"), chat_template="config")
    old = {"eos_token": "<unk>", "pad_token": {"content": "<pad>", "lstrip": False}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(old))
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }} plain")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("with tools")
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.special_tokens == {"bos_token": "<s>", "eos_token": "<unk>", "pad_token": "<pad>"}
    assert ours.special_tokens == {name: str(text) for name, text in theirs.special_tokens_map.items()}
    assert ours.encode("a<pad>b") == theirs.encode("a<pad>b")
    for tools in (None, [TOOL]):
        assert ours.apply_chat_template(MESSAGES, tools=tools) == theirs.apply_chat_template(
            MESSAGES, tools=tools, tokenize=False
        )


def test_tokens_that_stand_only_in_added_tokens_decoder(tmp_path: Path) -> None:
    backend = train("smollm")
    size = backend.get_vocab_size()
    added = {str(size): {"content": "<extra>", "special": True}, str(size + 1): {"content": "<more>", "special": False}}
    write_directory(tmp_path, backend, added_tokens_decoder=added)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<unk>"}')  # not read beside the decoder
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("a<extra>b<more>") == theirs.encode("a<extra>b<more>")
    assert ours.token_id("<more>") == size + 1
    assert size in ours.special_ids
    assert ours.special_tokens["eos_token"] == "<|im_end|>" == theirs.eos_token
    added[str(size + 5)] = added.pop(str(size))
    write_directory(tmp_path, train("smollm"), added_tokens_decoder=added)
    with pytest.raises(CheckpointError, match=r"added_tokens_decoder has '<more>' as \d+; expected \d+, the id that"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("template", "eos", "ends"),
    [
        (CHATML, "<unk>", ["<unk>", "<|im_end|>"]),
        (CHATML, "<|im_end|>", ["<|im_end|>"]),
        ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "<unk>", ["<unk>"]),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "<unk>", ["<unk>"]),
        ("{{ raise_exception('no') }}", "<unk>", ["<unk>"]),
        (None, "<unk>", ["<unk>"]),
        (CHATML, None, ["<|im_end|>"]),
    ],
)
def test_a_reply_ends_at_the_end_token_and_where_the_template_ends_a_turn(
    template: str | None, eos: str | None, ends: list[str], tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(write_directory(tmp_path, train("smollm"), chat_template=template, eos_token=eos))
    assert tokenizer.end_token_ids() == tuple(tokenizer.token_id(text) for text in ends)


def test_a_doubled_bos_is_warned_of_once() -> None:
    tokenizer = Tokenizer(train("llama-bpe"), special_tokens={"bos_token": "<s>"})
    assert tokenizer.encode("<s>hi", add_special_tokens=False)[:1] == [1]
    with pytest.warns(UserWarning, match="a prompt begins with <s>, which the tokenizer puts in front"):
        assert tokenizer.encode("<s>hi")[:2] == [1, 1]
    assert tokenizer.encode("<s>hi")[:2] == [1, 1]


def test_save_round_trip_and_transformers_reads_it(tmp_path: Path) -> None:
    original = load_tokenizer(write_directory(tmp_path, train("qwen2"), chat_template=CHATML))
    original.save(tmp_path / "copy")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "copy")
    for copy in (load_tokenizer(tmp_path / "copy"), original):
        assert [copy.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
        assert copy.special_tokens == {"bos_token": theirs.bos_token, "eos_token": theirs.eos_token}
        assert copy.apply_chat_template(MESSAGES) == theirs.apply_chat_template(
            MESSAGES, tokenize=False, add_generation_prompt=True
        )


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only one system message') }}", "refused the messages: only one system message"),
        ("{% if %}", r"is not valid Jinja \(line 1\)"),
        ("{{ messages[0].absent.deeper }}", "failed on these messages"),
        ("{{ 1 / 0 }}", "failed on these messages"),
        ("{{ ''.__class__.__mro__ }}", "failed on these messages.*unsafe"),
        ("{{ messages.append(1) }}", "failed on these messages.*unsafe"),
    ],
)
def test_template_failures_are_value_errors(template: str, message: str) -> None:
    tokenizer = Tokenizer(train("smollm"), {"default": template})
    with pytest.raises(ValueError, match=message):
        tokenizer.apply_chat_template(list(MESSAGES))


def test_no_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_directory(tmp_path, train("smollm")))
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="has no chat template"):
        tokenizer.apply_chat_template(MESSAGES)


def test_no_default_template() -> None:
    with pytest.raises(ValueError, match="expected one named default"):
        Tokenizer(train("smollm"), {"rag": "x"}).apply_chat_template(MESSAGES)


def test_directory_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a readable tokenizer"):
        load_tokenizer(tmp_path)
    write_directory(tmp_path, train("smollm"), chat_template=[{"title": "x"}])
    with pytest.raises(ValueError, match="neither a string nor a list"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a JSON object"):
        load_tokenizer(tmp_path)
