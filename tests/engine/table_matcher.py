# SPDX-License-Identifier: Apache-2.0
"""A grammar that is a random finite automaton over token ids, and AR decoding under constraints, slow and obvious."""

import random

import numpy as np
import torch

from tests.stub import StubModel
from wedlm.algorithm.params import DecodeParams
from wedlm.algorithm.reference import choose_token
from wedlm.engine.sampling_params import SamplingParams


class TableMatcher:
    """``Matcher`` of an automaton: ``table[state]`` maps tokens to states. ``path`` is where it has been."""

    def __init__(self, table: list[dict[int, int]], accepts: set[int], vocab_size: int) -> None:
        self.table, self.accepts, self.vocab_size = table, accepts, vocab_size
        self.path = [0]
        self.failed = False

    @classmethod
    def random(
        cls, rng: random.Random, vocab_size: int, mask_token_id: int, ends: tuple[int, ...] = ()
    ) -> "TableMatcher":
        """Some states accept, and some of those have nothing after them; the others go on by more than ``ends``."""
        tokens = [token for token in range(vocab_size) if token != mask_token_id]
        num_states = rng.randint(2, 6)
        accepts = {state for state in range(1, num_states) if rng.random() < 0.4}
        table: list[dict[int, int]] = []
        for state in range(num_states):
            few = [rng.choice([token for token in tokens if token not in ends]), *rng.sample(tokens, rng.randint(0, 4))]
            leaf = state in accepts and rng.random() < 0.5
            table.append({} if leaf else {token: rng.randrange(num_states) for token in few})
        return cls(table, accepts, vocab_size)

    def fresh(self) -> "TableMatcher":
        return TableMatcher(self.table, self.accepts, self.vocab_size)

    def allowed(self) -> np.ndarray:
        allowed = np.zeros(self.vocab_size, dtype=np.bool_)
        allowed[list(self.table[self.path[-1]])] = True
        return allowed

    def advance(self, token: int) -> bool:
        if token not in self.table[self.path[-1]]:
            return False
        self.path.append(self.table[self.path[-1]][token])
        return True

    def rewind(self, count: int) -> None:
        assert 0 <= count < len(self.path)
        del self.path[len(self.path) - count :]

    @property
    def accepting(self) -> bool:
        return self.path[-1] in self.accepts

    @property
    def complete(self) -> bool:
        return self.accepting and not self.table[self.path[-1]]


def penalize(logits: torch.Tensor, tokens: list[int], output: list[int], params: SamplingParams) -> None:
    for token in set(tokens):
        penalty = params.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token in range(len(logits)):
        count = output.count(token)
        change = params.presence_penalty * (count > 0) + params.frequency_penalty * count
        logits[token] += (params.logit_bias or {}).get(token, 0.0) - change


def decode_constrained(
    model: StubModel,
    prompt: list[int],
    max_tokens: int,
    decode: DecodeParams,
    params: SamplingParams,
    grammar: TableMatcher | None,
) -> tuple[list[int], str]:
    """AR decoding's tokens under the rules, and why it ended; from what the rules say, not from how they are kept."""
    tokens, state = list(prompt), 0
    while True:
        logits = model.rows_model(tokens, list(range(len(tokens))))[-1].clone()
        output = tokens[len(prompt) :]
        logits[decode.mask_token_id] = -torch.inf
        if len(tokens) < decode.min_eos_position:
            logits[list(decode.stop_token_ids)] = -torch.inf
        penalize(logits, tokens, output, params)
        if grammar is not None:
            for token in range(len(logits)):
                is_end = token in decode.stop_token_ids
                if not (state in grammar.accepts if is_end else token in grammar.table[state]):
                    logits[token] = -torch.inf
        if params.min_p and decode.temperature:
            logits[torch.softmax(logits, 0) < params.min_p * torch.softmax(logits, 0).max()] = -torch.inf
        token = choose_token(logits, len(tokens), decode)
        tokens.append(token)
        if token in decode.stop_token_ids:
            return tokens[len(prompt) :], "stop"
        if grammar is not None:
            state = grammar.table[state][token]
            if state in grammar.accepts and not grammar.table[state]:
                return tokens[len(prompt) :], "stop"
        if len(tokens) - len(prompt) == max_tokens:
            return tokens[len(prompt) :], "length"
