# SPDX-License-Identifier: Apache-2.0
"""The parameters that define what one sequence decodes to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

Decoding = Literal["auto", "streaming", "verified", "block", "autoregressive"]
DECODINGS: tuple[str, ...] = get_args(Decoding)
NextToken = Literal["masked", "causal"]
NEXT_TOKENS: tuple[str, ...] = get_args(NextToken)
# How block decoding chooses the positions to fill: by entropy, as streaming does, or by the probability of their tokens
# (the names are SDAR's): a fixed number a step, or all above a threshold.
Remasking = Literal["entropy", "low_confidence_static", "low_confidence_dynamic"]
REMASKINGS: tuple[str, ...] = get_args(Remasking)
MOST_LOOKUP_DRAFTS = 63  # in a step: further ones are hardly ever right, and each is looked at by the host


def drafts_of(row_budget: int) -> int:
    """The largest number of drafts k that ``row_budget`` rows sustain. Besides the anchor and k drafts a step needs k +
    1 groups of masked rows, one for each number of drafts that may be accepted, with k rows each (docs/algorithm.md,
    "Verified decoding")."""
    return max(0, math.isqrt(row_budget) - 1)


def verified_rows(num_drafts: int, row_budget: int, max_drafts: int) -> int:
    """The rows of a verified step: the anchor, its drafts, and the rows that ``row_budget`` leaves to masked rows, each
    of which can become one of the next step's ``max_drafts``. The first row of a group stands where AR's token goes, so
    groups of one row would be useless and do not run."""
    groups = num_drafts + 1
    masked = min(row_budget - groups, groups * (max_drafts + 1) if max_drafts else 0)
    return groups + (masked if masked > groups else 0)


@dataclass(frozen=True)
class DecodeParams:
    """Everything that the text of one sequence depends on, besides the model and the prompt.

    ``window_size`` is W, the positions of a window, in streaming and block decoding, and R, the largest number of rows
    of a step, in verified decoding. Autoregressive decoding is verified decoding with R=1: an anchor without drafts or
    masked rows. Auto is verified decoding whose R may be lowered from step to step (``row_budget`` is the most).
    ``lookup_drafts``: the largest number of drafts per verified step that come from the text instead of masked rows
    (``wedlm.algorithm.lookup``). ``has_masked_rows``: whether the model predicts anything in masked rows.
    ``entropy_threshold`` (τ, nats): None fills exactly one position per step. ``next_token`` says what decides the
    leftmost masked position of a streaming window: "masked" takes its own row, if that is sure enough; "causal" takes,
    in each step, the row of the token before it, as in AR decoding. ``remasking``: block decoding fills by the
    probability of tokens, in at most ``denoising_steps`` steps per block (None: one per position), and in fewer where
    positions exceed the probability ``confidence_threshold``. ``block_length``: rows see all of their own block of this
    many positions, blocks begin at multiples of it, and windows are such blocks; with 1, rows only see what is before
    them. ``max_positions`` is the model's length; positions are below it. ``stop_token_ids`` end the text;
    ``min_eos_position`` is the first position at which one may stand (prompt length + min_tokens). A text with a gap
    has ``prefix_length`` tokens before the gap and ``suffix_length`` known ones after it, which end at
    ``max_positions``. Values that follow from the fields are cached, because each step needs them.
    """

    decoding: Decoding
    window_size: int = 16
    entropy_threshold: float | None = 0.4
    pos_penalty: float = 0.02
    next_token: NextToken = "masked"
    remasking: Remasking = "entropy"
    confidence_threshold: float = 0.85
    denoising_steps: int | None = None
    block_length: int = 1
    draft_entropy: float = 2.5
    lookup_drafts: int = 0
    has_masked_rows: bool = True
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    mask_token_id: int = 0
    stop_token_ids: tuple[int, ...] = ()
    min_eos_position: int = 0
    max_positions: int = 2**31 - 1
    prefix_length: int = 0
    suffix_length: int = 0

    def positions(self, start: int, stop: int) -> Sequence[int]:
        """The positions of the tokens in the cache's slots ``start`` to ``stop`` - 1. They equal the slots, except in a
        text with a suffix, which lies in the cache before the tokens that fill the gap."""
        if not self.suffix_length:
            return range(start, stop)
        border = self.prefix_length + self.suffix_length
        parts = (
            (0, self.prefix_length, 0),
            (self.prefix_length, border, self.max_positions - border),
            (border, self.max_positions, -self.suffix_length),
        )
        return [slot + by for first, end, by in parts for slot in range(max(start, first), min(stop, end))]

    @cached_property
    def is_verified(self) -> bool:
        """Whether the shifted head chooses the tokens (AR's text) rather than the masked rows."""
        return self.decoding in ("auto", "verified", "autoregressive")

    @cached_property
    def is_causal(self) -> bool:
        """Whether streaming takes each next token from the row before it. Blocks cannot: a block is committed as a
        whole, so the forward may not have the token before it. Neither can texts with a gap, whose last known token is
        not the one before the gap."""
        return self.decoding == "streaming" and self.next_token == "causal" and not self.suffix_length

    @cached_property
    def has_anchor(self) -> bool:
        """Whether a window begins with a known token whose row gives the next one. At first this is the prompt's last
        token, which is therefore not cached with the prompt."""
        return self.is_verified or self.is_causal

    @cached_property
    def most_logits(self) -> int:
        """Upper bound of the rows with logits of a streaming step: the masked ones, and the one that gives the next
        token."""
        return self.window_size + self.is_causal

    @cached_property
    def is_adaptive(self) -> bool:
        """Whether a step may lower the row budget."""
        return self.decoding == "auto"

    @cached_property
    def by_confidence(self) -> bool:
        """Whether positions are filled by the probability of their tokens."""
        return self.remasking != "entropy"

    @cached_property
    def fill_below(self) -> float:
        """The uncertainty (nats) below which a masked position is filled: its entropy, or its token's negative
        log-probability."""
        if self.remasking == "low_confidence_dynamic":
            return -math.log(self.confidence_threshold) if self.confidence_threshold > 0 else math.inf
        return -math.inf if self.by_confidence or self.entropy_threshold is None else self.entropy_threshold

    @cached_property
    def fill_schedule(self) -> tuple[int, int]:
        """(n, m): a step fills at least n positions, and one more while fewer than m of its block are filled. A block
        therefore takes ``denoising_steps`` steps, with the larger ones first."""
        if not self.by_confidence or self.denoising_steps is None:
            return 1, 0
        steps = min(self.denoising_steps, self.window_size)
        each, left = divmod(self.window_size, steps)
        return each, left * (each + 1)

    @cached_property
    def row_budget(self) -> int:
        """R when verifying (1 for AR, and where masked rows are not worth running), W otherwise."""
        alone = self.decoding == "autoregressive" or (self.is_verified and not self.has_masked_rows)
        return 1 if alone else self.window_size

    @cached_property
    def max_drafts(self) -> int:
        """``drafts_of`` the row budget."""
        return drafts_of(self.row_budget)

    @cached_property
    def max_lookup(self) -> int:
        """The largest number of drafts from the text per step, limited by the rows of R, however wide the window is."""
        verifies = self.is_verified and self.decoding != "autoregressive"
        return min(self.lookup_drafts, self.window_size - 1, MOST_LOOKUP_DRAFTS) if verifies else 0

    def num_before_window(self, num_prompt_tokens: int) -> int:
        """How many tokens of a prompt lie before the first window; these only need keys."""
        return num_prompt_tokens - (1 if self.has_anchor else num_prompt_tokens % self.block_length)

    def width(self, num_drafts: int, room: int) -> int:
        """The rows at the start of a step, ``room`` positions before the model's length; streaming then
        extends them."""
        budget = min(self.row_budget, room)
        return min(room, verified_rows(num_drafts, budget, self.max_drafts)) if self.is_verified else budget

    @cached_property
    def max_rows(self) -> int:
        """Upper bound of the rows of any step: a full window may commit while as many masked positions join it."""
        return max(self.row_budget, 1 + self.max_lookup) if self.is_verified else 2 * self.window_size
