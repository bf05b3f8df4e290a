# SPDX-License-Identifier: Apache-2.0
"""Block decoding by the probability of tokens, of a causal model, against a loop written apart from ``reference.py``:
one forward over the whole text a step, no cache, one position after the other."""

import random
from collections.abc import Callable

import pytest
import torch

from tests.engine.random_transformer import CONFIG, END, LENGTH, MASK, VOCAB
from tests.engine.stub_engine import build
from wedlm.attention.sdpa import CausalAttend
from wedlm.engine.options import EngineConfig, EngineOptions
from wedlm.engine.sampling_params import SamplingParams
from wedlm.model import Transformer, pack_for_inference


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(1)
    transformer = Transformer(CONFIG).eval()
    for parameter in transformer.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return pack_for_inference(transformer)


def decode_blocks(
    forward: Callable, prompt: list[int], size: int, num_tokens: int, quotas: list[int], threshold: float
) -> list[int]:
    """``quotas[i]``: positions that the i-th step of a block fills at least; all others above ``threshold``, too."""
    text = list(prompt)
    while len(text) - len(prompt) < num_tokens and END not in text[len(prompt) :]:
        first = len(text)
        found: dict[int, int] = {}
        for quota in quotas:
            open_positions = [p for p in range(first, first + size) if p not in found]
            if not open_positions:
                break
            known = [*range(first), *sorted(found)]
            probs = forward([*(text + [0] * size)[:first], *(found[p] for p in sorted(found))], known, open_positions)
            guess = {}
            for row, p in enumerate(open_positions):
                allowed = probs[row].clone()
                allowed[MASK] = -1
                guess[p] = (float(allowed.max()), int(allowed.argmax()))
            sure = [p for p in open_positions if guess[p][0] > threshold]
            ranked = sorted(open_positions, key=lambda p: (-guess[p][0], p))
            for p in sure if len(sure) >= quota else ranked[:quota]:
                found[p] = guess[p][1]
        text += [found[p] for p in range(first, first + size)]
    answer = text[len(prompt) :][:num_tokens]
    return answer[: answer.index(END) + 1] if END in answer else answer


@pytest.mark.parametrize("size", [1, 4, 8])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_causal_blocks_by_probability(model, size, threshold):
    def forward(tokens: list[int], known: list[int], masked: list[int]) -> torch.Tensor:
        rows = torch.tensor(tokens + [MASK] * len(masked))
        with torch.inference_mode():
            return torch.softmax(model(rows, torch.tensor(known + masked), CausalAttend())[len(known) :], dim=-1)

    rng = random.Random(size)
    config = EngineConfig(VOCAB, MASK, (END,), LENGTH, EngineOptions(max_num_seqs=4))
    engine = build(model, config, 4, 200, (2, 2, 16))
    steps = {1: 1, 4: 2, 8: 3}[size]
    params = SamplingParams(
        decoding="block",
        wedlm_window_size=size,
        remasking_strategy="low_confidence_static" if threshold is None else "low_confidence_dynamic",
        confidence_threshold=threshold or 0.85,
        denoising_steps=steps,
        max_tokens=21,
    )
    requests = [engine.add(str(i), [rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))], params) for i in range(6)]
    while engine.has_work:
        engine.step()
    quotas = {1: [1], 4: [2, 2], 8: [3, 3, 2]}[size]
    for request in requests:
        limit = 2.0 if threshold is None else threshold
        assert request.output_token_ids == decode_blocks(forward, request.prompt_token_ids, size, 21, quotas, limit), (
            request.prompt_token_ids
        )
    most = [len(quotas) * -(-request.num_output_tokens // size) for request in requests]
    forwards = [request.counters.num_forwards for request in requests]
    if threshold is None or size == 1:
        assert forwards == most
    else:
        assert all(a <= b for a, b in zip(forwards, most, strict=True))
        assert sum(forwards) < sum(most)
