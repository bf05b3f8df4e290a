# SPDX-License-Identifier: Apache-2.0
"""What one request forbids and favours among its next tokens: a grammar, biases, penalties."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from wedlm.engine.constraints.grammar import Matcher, grammars_of
from wedlm.engine.sampling_params import SamplingParams
from wedlm.model import Tokenizer


class Constraint:
    """The rules of one request, and the state that its emitted tokens have led to.

    Only ``accept``, which the engine calls for each token that it emits, changes the state for good, so a preemption
    has nothing to save. ``advance`` and ``rewind`` try tokens that are not emitted yet.
    """

    def __init__(
        self,
        params: SamplingParams,
        matcher: Matcher | None,
        stop_token_ids: Iterable[int],
        mask_token_id: int,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self.matcher = matcher
        self.counts: Counter[int] = Counter()
        self.num_accepted = 0
        self._ends, self._mask_token_id = frozenset(stop_token_ids), mask_token_id
        self._presence, self._frequency = params.presence_penalty, params.frequency_penalty
        self._repetition, self._prompt = params.repetition_penalty, prompt_token_ids
        self._in_prompt: Tensor | None = None  # [vocabulary], made when first needed
        self._bias = dict(params.logit_bias or {})
        self._log_min_p = math.log(params.min_p) if _cuts(params) else -math.inf

    def accept(self, token: int) -> bool:
        """Note an emitted token. Returns False if the grammar refuses it, which only happens once it has reached its
        limits."""
        if self.matcher is not None and not (
            self.matcher.accepting if token in self._ends else self.matcher.advance(token)
        ):
            return False
        self.counts[token] += 1
        self.num_accepted += 1
        return True

    @property
    def complete(self) -> bool:
        """Whether the grammar allows nothing after what was accepted, so that the answer has ended."""
        return self.matcher is not None and self.matcher.complete

    def advance(self, token: int) -> bool:
        """Try a token that is not emitted. Returns False if the grammar refuses it or it ends the text."""
        if self.matcher is None:
            return True
        return token not in self._ends and self.matcher.advance(token)

    def ends_with(self, token: int) -> bool:
        """Whether the text may end here with this token."""
        return token in self._ends and (self.matcher is None or self.matcher.accepting)

    def rewind(self, count: int) -> None:
        """Take back ``count`` tokens that ``advance`` accepted."""
        if self.matcher is not None:
            self.matcher.rewind(count)

    def apply_penalties(self, logits: Tensor, counts: Mapping[int, int]) -> None:
        """Apply biases and penalties to a row of logits [V], in place. ``counts`` counts the output before
        its token."""
        if self._repetition != 1:
            self._penalize_repetition(logits, counts)
        changes = Counter(self._bias) if self._bias else Counter()
        if self._presence or self._frequency:
            for token, count in counts.items():
                changes[token] -= self._presence + self._frequency * count  # type: ignore[assignment]
        if changes:
            index = torch.tensor(list(changes), device=logits.device)
            logits[index] += torch.tensor(list(changes.values()), dtype=logits.dtype, device=logits.device)

    def _penalize_repetition(self, logits: Tensor, counts: Mapping[int, int]) -> None:
        if self._in_prompt is None:
            self._in_prompt = torch.zeros_like(logits, dtype=torch.bool)
            self._in_prompt[torch.tensor(sorted(set(self._prompt)), dtype=torch.long, device=logits.device)] = True
        seen = self._in_prompt.clone()
        written = [token for token, count in counts.items() if count]
        seen[torch.tensor(written, dtype=torch.long, device=logits.device)] = True
        changed = torch.where(logits > 0, logits / self._repetition, logits * self._repetition)
        torch.where(seen, changed, logits, out=logits)

    def apply_cut(self, logits: Tensor) -> None:
        """Apply ``min_p`` to a row of logits [V], in place."""
        if self._log_min_p > -math.inf:
            logits.masked_fill_(logits < logits.max() + self._log_min_p, -torch.inf)

    def apply_mask(self, logits: Tensor) -> bool:
        """Remove from a row of logits [V], in place, everything that the grammar does not admit in its present state.

        Returns False, with nothing changed, if it admits nothing: it has failed, or the text is complete and has no end
        token. ``accept`` then refuses whatever is chosen, and the engine ends the text.
        """
        if self.matcher is None:
            return True
        allowed = self.matcher.allowed()
        accepting = self.matcher.accepting
        for token in self._ends:
            allowed[token] = accepting
        allowed[self._mask_token_id] = False
        if self.matcher.failed or not allowed.any():
            return False
        mask = torch.from_numpy(allowed).to(logits.device)
        logits[: len(allowed)].masked_fill_(~mask, -torch.inf)
        logits[len(allowed) :] = -torch.inf
        return True


def build_constraint(
    params: SamplingParams,
    stop_token_ids: tuple[int, ...],
    mask_token_id: int,
    vocab_size: int,
    tokenizer: object,
    prompt_token_ids: Sequence[int] = (),
) -> Constraint | None:
    """The constraint that ``params`` ask for, or None. Raises ValueError if it cannot be built."""
    if params.logit_bias and (largest := max(params.logit_bias)) >= vocab_size:
        raise ValueError(f"logit_bias has the token id {largest}; expected ids below {vocab_size}")
    matcher = None
    if params.json_schema is not None or params.grammar is not None:
        if not isinstance(tokenizer, Tokenizer):
            raise ValueError("json_schema or grammar is set but the engine has no tokenizer; expected neither")
        matcher = grammars_of(tokenizer, vocab_size).matcher(params)
    penalised = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    if matcher is None and not (params.logit_bias or penalised or _cuts(params)):
        return None
    return Constraint(params, matcher, stop_token_ids, mask_token_id, prompt_token_ids)


def _cuts(params: SamplingParams) -> bool:
    """Whether ``min_p`` can make a difference: the most probable token always survives it."""
    return params.min_p > 0 and params.temperature > 0
