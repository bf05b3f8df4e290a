# SPDX-License-Identifier: Apache-2.0
"""The model against transformers: same logits, same greedy text, packed or not."""

import pytest
import torch

from tests.model.tiny import CASES, causal_attend, hf_config, hf_model, logits_of, our_model
from wedlm.model import ModelConfig, Transformer, pack_for_inference

TOLERANCE = 1e-4
PROMPT = [1, 5, 42, 7, 96, 0, 13, 13, 60]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_text_equal_transformers(name: str) -> None:
    twin, model = hf_model(name), our_model(name)
    tokens = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = twin(tokens[None]).logits[0]
    assert wanted.std() > 0.1, "a flat distribution would hide errors"
    separate = logits_of(model, tokens)
    assert (separate - wanted).abs().max() < TOLERANCE
    assert greedy(lambda t: logits_of(model, t)) == greedy(lambda t: twin(torch.tensor([t])).logits[0])
    pack_for_inference(model)
    assert (logits_of(model, tokens) - wanted).abs().max() < TOLERANCE


@torch.inference_mode()
def greedy(logits, steps: int = 20) -> list[int]:
    tokens = list(PROMPT)
    for _ in range(steps):
        tokens.append(int(logits(tokens)[-1].argmax()))
    return tokens


@pytest.mark.parametrize("name", ["llama-tied", "qwen3-wide-heads"])
def test_rows_may_come_in_any_order_of_positions(name: str) -> None:
    twin, model = hf_model(name), our_model(name)
    positions = torch.tensor([0, 1, 5, 3, 2, 300, 4])
    tokens = torch.tensor(PROMPT[:7])
    mask = torch.full((7, 7), -torch.inf).triu(1)[None, None]
    with torch.inference_mode():
        wanted = twin(tokens[None], attention_mask=mask, position_ids=positions[None]).logits[0]
        found = model(tokens, positions, causal_attend)
    assert (found - wanted).abs().max() < TOLERANCE


def test_yarn_at_32k_positions() -> None:
    twin, model = hf_model("yarn-rope"), our_model("yarn-rope")
    tokens = torch.tensor(PROMPT)
    positions = torch.arange(32768 - len(PROMPT), 32768)
    mask = torch.full((len(PROMPT), len(PROMPT)), -torch.inf).triu(1)[None, None]
    with torch.inference_mode():
        wanted = twin(tokens[None], attention_mask=mask, position_ids=positions[None]).logits[0]
        found = model(tokens, positions, causal_attend)
    assert (found - wanted).abs().max() < TOLERANCE


def test_bfloat16_is_as_close_to_float32_as_transformers_is() -> None:
    twin, model = hf_model("qwen3-wide-heads"), our_model("qwen3-wide-heads")
    exact = logits_of(model, PROMPT)
    ours = logits_of(model.to(torch.bfloat16), PROMPT).float()
    with torch.inference_mode():
        theirs = twin.to(torch.bfloat16)(torch.tensor([PROMPT])).logits[0].float()
    assert (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()


def test_state_dict_has_the_names_of_transformers() -> None:
    for name in CASES:
        assert our_model(name).state_dict().keys() == hf_model(name).state_dict().keys()


def test_logits_rows_picks_rows_in_the_order_given() -> None:
    model = our_model("llama")
    everything = logits_of(model, PROMPT)
    rows = torch.tensor([6, 0, 3])
    picked = model(torch.tensor(PROMPT), torch.arange(9), causal_attend, rows)
    torch.testing.assert_close(picked, everything[rows])


def test_no_logits_rows_gives_an_empty_result_without_projecting() -> None:
    model = our_model("llama")
    model.lm_head = torch.nn.Identity()  # would have the wrong width if it ran
    found = model(torch.tensor(PROMPT), torch.arange(9), causal_attend, torch.tensor([], dtype=torch.int64))
    assert found.shape == (0, 97)


def test_gradients_equal_those_of_transformers() -> None:
    twin, model = hf_model("llama-tied"), our_model("llama-tied")
    tokens = torch.tensor(PROMPT)
    twin(tokens[None]).logits[0].logsumexp(-1).sum().backward()
    model(tokens, torch.arange(9), causal_attend).logsumexp(-1).sum().backward()
    wanted = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-4, rtol=1e-4)


def test_queries_keys_and_values_share_a_dtype_under_autocast() -> None:
    model = our_model("qwen3-wide-heads")
    seen = set()

    def attend(layer, q, k, v):
        seen.update((q.dtype, k.dtype, v.dtype))
        return causal_attend(layer, q, k, v)

    with torch.autocast("cpu", torch.bfloat16):
        model(torch.tensor(PROMPT), torch.arange(9), attend)
    assert seen == {torch.bfloat16}


def test_tied_embeddings_are_one_parameter() -> None:
    model = Transformer(ModelConfig.from_hf(hf_config("llama-tied")))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_packing_frees_the_separate_projections_and_cannot_be_repeated() -> None:
    model = our_model("llama-biases")
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    assert pack_for_inference(model) is model
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2) == count
    assert not any("q_proj" in name or "gate_proj" in name for name in model.state_dict())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="packed already"):
        pack_for_inference(model)
