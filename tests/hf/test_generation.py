# SPDX-License-Identifier: Apache-2.0
"""``generate`` in transformers gives LLM's tokens, and refuses what it cannot do."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TextIteratorStreamer

from tests.engine.tiny_llm import END, LENGTH, PROMPTS, save_tiny
from wedlm import LLM, SamplingParams
from wedlm.hf import WeDLMForCausalLM

MODES = ["streaming", "verified", "block", "autoregressive"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(directory: Path) -> WeDLMForCausalLM:
    return AutoModelForCausalLM.from_pretrained(directory)


@pytest.fixture(scope="module")
def llm(directory: Path) -> LLM:
    return LLM(directory, device="cpu")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mode", MODES)
def test_batches_give_the_tokens_of_llm(
    mode: str, temperature: float, directory: Path, model: WeDLMForCausalLM, llm: LLM
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left", pad_token="<|end|>")
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    options = {"temperature": temperature, "wedlm_window_size": 6, "wedlm_entropy_threshold": 1.0, "top_k": 20}
    found = model.generate(**batch, max_new_tokens=20, decoding=mode, seed=7, **options)
    assert torch.equal(found[:, : batch.input_ids.shape[1]], batch.input_ids)
    params = SamplingParams(max_tokens=20, decoding=mode, seed=7, **options)
    outputs = llm.generate(PROMPTS, params)
    longest = max(len(output.token_ids) for output in outputs)
    for row, output in zip(found[:, batch.input_ids.shape[1] :].tolist(), outputs, strict=True):
        assert row == output.token_ids + [END] * (longest - len(output.token_ids))


def test_defaults_are_those_of_llm(model: WeDLMForCausalLM, llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPTS[0])
    found = model.generate(torch.tensor([ids]), max_new_tokens=12)[0, len(ids) :].tolist()
    output = llm.generate(PROMPTS[0], SamplingParams(max_tokens=12))[0]
    assert output.stats.decoding == "auto"
    assert found == output.token_ids


def test_a_model_that_sees_by_blocks_is_refused(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, model_type="sdar", block_size=4, decoding=None)
    with pytest.raises(ValueError, match="model_type is 'sdar'; expected a causal model"):
        WeDLMForCausalLM.from_pretrained(directory)


def test_end_tokens_of_generation_config_and_of_the_call(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path)
    plain = WeDLMForCausalLM.from_pretrained(directory)
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 12, "decoding": "autoregressive"}
    tokens = plain.generate(ids, **options)[0, 3:].tolist()
    end = tokens[4]
    cut = tokens[: tokens.index(end) + 1]
    assert plain.generate(ids, eos_token_id=end, **options)[0, 3:].tolist() == cut
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, end]}))
    model = WeDLMForCausalLM.from_pretrained(directory)
    assert model.generate(ids, **options)[0, 3:].tolist() == cut
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "generation_config.json").read_text())["eos_token_id"] == [END, end]
    assert len(model.generate(ids, **options, min_new_tokens=12)[0]) == 15


def test_do_sample_is_temperature_one(model: WeDLMForCausalLM) -> None:
    ids = torch.tensor([[5, 6, 7]])
    sampled = model.generate(ids, max_new_tokens=8, seed=3, do_sample=True)
    assert torch.equal(sampled, model.generate(ids, max_new_tokens=8, seed=3, temperature=1.0))
    assert not torch.equal(sampled, model.generate(ids, max_new_tokens=8, do_sample=False))


def test_weights_that_changed_are_used_and_the_mode_of_training_stays(directory: Path) -> None:
    model = WeDLMForCausalLM.from_pretrained(directory).train()
    ids = torch.tensor([[5, 6, 7]])
    before = model.generate(ids, max_new_tokens=8)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    assert not torch.equal(model.generate(ids, max_new_tokens=8), before)
    assert model.training
    assert model(ids, labels=ids).loss.requires_grad, "what generate ran must not leave inference tensors behind"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_beams": 4}, "num_beams is 4, which this generate does not support"),
        ({"num_beam": None}, "num_beam is None, which this generate does not support"),
        ({"logits_processor": [print]}, "logits_processor is .*, which this generate does not support"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate is True"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "num_beams is 2"),
        ({"max_new_tokens": None}, "max_new_tokens is missing; expected it, or max_length"),
        ({"max_new_tokens": None, "max_length": 3}, "max_length is 3; expected more than 3"),
        ({"streamer": 1}, "streamer is 1; expected an object with put and end"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2 without sampling"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0"),
        ({"stop_strings": "x"}, "stop_strings is 'x' without tokenizer"),
        ({"max_new_tokens": 0}, "max_tokens is 0"),
        ({"decoding": "beam"}, "decoding is 'beam'; expected one of auto"),
        ({"wedlm_window_size": 0}, "wedlm_window_size is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample is True and temperature 0.0"),
        ({"do_sample": False, "temperature": 0.7}, "do_sample is False and temperature 0.7"),
        ({"eos_token_id": "x"}, "eos_token_id is 'x'"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, "attention_mask has padding between tokens"),
        ({"attention_mask": torch.tensor([[0, 0, 0]])}, "the prompt has 0 tokens"),
        ({"attention_mask": torch.ones(1, 2)}, r"attention_mask has shape \[1, 2\]; expected \[1, 3\]"),
        ({"input_ids": torch.tensor([5, 6])}, r"input_ids has shape \[2\]; expected \[batch, rows\]"),
        ({"input_ids": torch.tensor([[500]])}, "the prompt contains 500"),
    ],
)
def test_what_it_cannot_do_is_refused(model: WeDLMForCausalLM, options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        model.generate(**{"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 4, **options})


def test_an_ar_checkpoint_needs_a_mask_token_named(tmp_path: Path) -> None:
    values = {"model_type": "llama", "qk_norm": False, "mask_token_id": None}
    model = WeDLMForCausalLM.from_pretrained(save_tiny(tmp_path, **values))
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="the config has no mask_token_id"):
        model.generate(ids, max_new_tokens=4)
    found = model.generate(ids, max_new_tokens=4, mask_token_id=103)
    output = LLM(tmp_path, device="cpu", mask_token_id=103).generate([5, 6, 7], SamplingParams(max_tokens=4))[0]
    assert output.stats.decoding == "auto"
    assert found[0, 3:].tolist() == output.token_ids


def test_padding_may_be_on_either_side(directory: Path, model: WeDLMForCausalLM) -> None:
    found = {}
    for side in ("left", "right"):
        tokenizer = AutoTokenizer.from_pretrained(directory, padding_side=side, pad_token="<|end|>")
        batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
        rows = model.generate(**batch, max_new_tokens=9)
        found[side] = rows[:, batch.input_ids.shape[1] :]
        assert torch.equal(rows[:, : batch.input_ids.shape[1]], batch.input_ids)
    assert torch.equal(found["left"], found["right"])


def test_a_generation_config_and_neutral_options(model: WeDLMForCausalLM) -> None:
    ids = torch.tensor([[5, 6, 7]])
    plain = {"max_new_tokens": 9, "temperature": 0.7, "top_k": 9, "repetition_penalty": 1.2, "seed": 3}
    wanted = model.generate(ids, **plain)
    config = GenerationConfig(max_new_tokens=9, do_sample=True, temperature=0.7, top_k=9, repetition_penalty=1.2)
    assert torch.equal(model.generate(ids, generation_config=config, seed=3), wanted)
    neutral = {"num_beams": 1, "use_cache": True, "logits_processor": [], "assistant_model": None, "synced_gpus": False}
    assert torch.equal(model.generate(input_ids=ids, **plain, **neutral), wanted)
    assert torch.equal(model.generate(ids, **{**plain, "max_new_tokens": None}, max_length=12), wanted)
    other = model.generate(ids, generation_config=config, seed=3, max_new_tokens=4)
    assert torch.equal(other, wanted[:, :7]), "what is given goes before the config"


def test_several_sequences_of_a_prompt(model: WeDLMForCausalLM) -> None:
    """As so many calls with seeds of their own, in transformers' order."""
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    options = {"max_new_tokens": 8, "temperature": 1.0, "eos_token_id": END}
    found = model.generate(ids, num_return_sequences=3, seed=5, **options)
    assert found.shape == (6, 11)
    assert torch.equal(found[:, :3], ids.repeat_interleave(3, dim=0))
    for row in range(6):
        prompt = ids[row // 3 : row // 3 + 1]
        alone = model.generate(prompt, seed=5 + row % 3, **options)[0]
        assert torch.equal(found[row, : len(alone)], alone)
    assert len({tuple(row) for row in found.tolist()}) > 4


@pytest.mark.parametrize("mode", MODES)
def test_criteria_end_a_sequence_at_their_token(model: WeDLMForCausalLM, mode: str) -> None:
    """They see all rows at every length, once; tokens that a forward made beyond the end are dropped, and other rows go
    on."""
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    options = {"max_new_tokens": 20, "decoding": mode, "wedlm_entropy_threshold": 3.0, "eos_token_id": END}
    whole = model.generate(ids, **options)
    seen: list[int] = []

    def criterion(tokens: torch.Tensor, scores: None) -> torch.Tensor:
        assert scores is None
        length = tokens.shape[1]
        seen.append(length)
        assert torch.equal(tokens[1], whole[1, :length])
        assert torch.equal(tokens[0, :10], whole[0, : min(length, 10)])
        assert set(tokens[0, 10:].tolist()) <= {END}
        return torch.tensor([length == 10, False])

    found = model.generate(ids, stopping_criteria=[criterion], pad_token_id=END, **options)
    assert torch.equal(found[1], whole[1])
    assert torch.equal(found[0, :10], whole[0, :10])
    assert set(found[0, 10:].tolist()) == {END}
    assert seen == list(range(4, 24))
    found = model.generate(ids, stopping_criteria=[lambda tokens, scores: tokens.shape[1] == 8], **options)
    assert torch.equal(found, whole[:, :8])


def test_stop_strings_and_time(directory: Path, model: WeDLMForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor([[5, 6, 7]])
    whole = model.generate(ids, max_new_tokens=20)[0, 3:].tolist()
    text = tokenizer.decode(whole[5:7])
    found = model.generate(ids, max_new_tokens=20, stop_strings=[text], tokenizer=tokenizer)[0, 3:].tolist()
    assert found == whole[: len(found)]
    assert tokenizer.decode(found).endswith(text)
    assert len(model.generate(ids, max_new_tokens=90, max_time=0.0, decoding="autoregressive")[0]) == 4


def test_a_streamer_gets_the_text(directory: Path, model: WeDLMForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor([[5, 6, 7]])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    found = model.generate(ids, max_new_tokens=20, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(found[0, 3:])
    with pytest.raises(ValueError, match="streamer is given with 2 sequences"):
        model.generate(ids.repeat(2, 1), max_new_tokens=2, streamer=streamer)


@pytest.mark.filterwarnings("ignore")
def test_lm_evals_backend_for_transformers_runs_on_it(directory: Path, model: WeDLMForCausalLM, llm: LLM) -> None:
    """With both kinds of its tasks: texts until a string, in batches, and likelihoods."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(directory, pad_token="<|end|>")
    backend = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=LENGTH)
    until = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=20))[0].text[10:12]
    options = {"until": [until], "max_gen_toks": 20, "do_sample": False}
    asked = [Instance("generate_until", {}, (prompt, options), 0) for prompt in PROMPTS]
    params = SamplingParams(temperature=0, max_tokens=20, stop=until)
    expected = [output.text for output in llm.generate(PROMPTS, params)]
    assert backend.generate_until(asked, disable_tqdm=True) == expected
    asked = [Instance("loglikelihood", {}, (prompt, " and so on"), 0) for prompt in PROMPTS]
    for (found, _), prompt in zip(backend.loglikelihood(asked, disable_tqdm=True), PROMPTS, strict=True):
        whole = llm.tokenizer.encode(prompt + " and so on")
        start = len(llm.tokenizer.encode(prompt))
        logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        score = sum(float(logits[i - 1, whole[i]]) for i in range(start, len(whole)))
        assert found == pytest.approx(score, abs=1e-3)
