# SPDX-License-Identifier: Apache-2.0
"""The slow, obvious decoder: one sequence, no cache, plain Python. It is the oracle of every other decoder.

``model(tokens, positions, num_masked)`` takes rows in order, the last ``num_masked`` of them masked, and returns logits
[rows, vocabulary]. Row i attends to rows 0..i, and in models that see by blocks to all rows whose block is not later.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from wedlm.algorithm.params import DecodeParams
from wedlm.algorithm.sample import gumbel_noise

RowsModel = Callable[[list[int], list[int], int], Tensor]


@dataclass
class ReferenceOutput:
    """``tokens`` after the prompt; ``steps[i]`` is the forward that emitted token i; ``rows`` of each forward."""

    tokens: list[int]
    steps: list[int]
    rows: list[int]


def decode(
    model: RowsModel,
    prompt: list[int],
    max_tokens: int,
    params: DecodeParams,
    propose: Callable[[list[int]], list[int]] | None = None,
    suffix: Sequence[int] = (),
) -> ReferenceOutput:
    """Decode one sequence until an end token or ``max_tokens`` (docs/algorithm.md, "Decoding").

    ``suffix``: known tokens that begin ``max_tokens`` positions after the prompt; decoding fills that gap.

    ``propose`` maps the text so far to drafts that replace a verified step's own, if it finds any. Raises ValueError if
    there is no known token, or no position left for a token.
    """
    known = [*prompt, *suffix]
    if not known or len(known) >= params.max_positions:
        raise ValueError(f"prompt has {len(known)} tokens; expected 1 to {params.max_positions - 1}")
    max_tokens = min(max_tokens, params.max_positions - len(known))
    places = None
    if suffix:  # of the rows: the known tokens go first, and keep their positions
        end = len(known) + max_tokens
        params = replace(params, max_positions=end)
        gap = range(len(prompt), len(prompt) + max_tokens)
        places = [*range(len(prompt)), *range(end - len(suffix), end), *gap]
    step = _verified_step if params.is_verified else partial(_streaming_step, places)
    first = params.num_before_window(len(known))
    committed = known[:first]
    window: list[int | None] = list(known[first:])  # None = masked
    if not params.is_verified:
        window += [None] * (params.row_budget - len(window))
    out = ReferenceOutput([], [], [])
    while True:
        if propose is not None:
            most = min(params.max_positions - len(committed), max_tokens - len(out.tokens), params.max_lookup + 1) - 1
            drafts = propose(prompt + out.tokens)[: max(0, most)]
            window = [window[0], *drafts] if drafts else window
        emitted, committed, window, rows = step(model, committed, window, params)
        if not params.is_verified:  # the prompt's part of a block is not output
            emitted = emitted[max(0, len(prompt) - len(committed)) :]
        out.rows.append(rows)
        for token in emitted:
            out.tokens.append(token)
            out.steps.append(len(out.rows) - 1)
            if token in params.stop_token_ids or len(out.tokens) == max_tokens:
                return out


def _forward(
    model: RowsModel,
    committed: list[int],
    window: list[int | None],
    params: DecodeParams,
    places: list[int] | None = None,
) -> tuple[list[int], dict[int, Tensor]]:
    """Run committed tokens, then the window's filled columns, then its masked ones; returns logits by window column.
    ``places``: the positions, if they are not 0, 1, 2…"""
    filled = [c for c, token in enumerate(window) if token is not None]
    order = filled + [c for c, token in enumerate(window) if token is None]
    n = len(committed)
    tokens = [params.mask_token_id if token is None else token for token in (window[c] for c in order)]
    positions = list(range(n)) + [n + c for c in order]
    if places is not None:
        positions = [places[position] for position in positions]
    logits = model(committed + tokens, positions, len(order) - len(filled)).float()
    return order, {c: logits[n + row] for row, c in enumerate(order)}


def _streaming_step(
    places: list[int] | None, model: RowsModel, committed: list[int], window: list[int | None], params: DecodeParams
) -> tuple[list[int], list[int], list[int | None], int]:
    """Commit the leading filled run (for blocks only a full window), fill the least uncertain positions, emit what
    became final.

    With causal streaming the last row of that run, the one that AR decoding would run, gives the token of the first
    masked position, which is filled in any case. What masked rows say is taken up to the first one that is not certain.
    The first masked position's own row is not if it would choose another token.
    """
    room = params.max_positions - len(committed)
    window = window[:room]
    run = _leading_run(window, params)
    window = (window + [None] * run)[:room]
    order, logits = _forward(model, committed, window, params, places)
    committed, window = committed + [t for t in window[:run] if t is not None], window[run:]
    n = len(committed)
    masked = [c for c, token in enumerate(window) if token is None]
    at = range(params.max_positions) if places is None else places
    tokens = {c: choose_token(logits[c + run], at[n + c], params) for c in masked}
    if params.by_confidence:
        uncertain = {c: -float(torch.log_softmax(logits[c + run], dim=-1)[tokens[c]]) for c in masked}
    else:
        uncertain = {c: _entropy(logits[c + run]) + params.pos_penalty * (c - masked[0]) for c in masked}
    if params.is_causal and masked:
        own, tokens[0] = tokens[0], choose_token(logits[run - 1], at[n], params)
        certain = [*itertools.takewhile(lambda c: uncertain[c] < params.fill_below, masked)] if own == tokens[0] else []
        uncertain = {c: -math.inf if c in certain else math.inf for c in masked}
    each, longer = params.fill_schedule
    least = each + (len(window) - len(masked) < longer)
    chosen = [c for c in masked if uncertain[c] < params.fill_below]
    for c in chosen if len(chosen) >= least else sorted(masked, key=lambda c: (uncertain[c], c))[:least]:
        window[c] = tokens[c]
    emitted = [t for t in window[: _leading_run(window, params)] if t is not None]
    return emitted, committed, window, len(order)


def _leading_run(window: list[int | None], params: DecodeParams) -> int:
    run = next((c for c, token in enumerate(window) if token is None), len(window))
    return 0 if params.decoding == "block" and run < len(window) else run


def _verified_step(
    model: RowsModel, committed: list[int], window: list[int | None], params: DecodeParams
) -> tuple[list[int], list[int], list[int | None], int]:
    """Accept drafts that equal AR's choices, commit AR's next token as the new anchor, and take the next drafts from
    the group of masked rows that foresaw exactly this number of accepted drafts. ``window`` is the anchor and the
    drafts."""
    n, k = len(committed), len(window) - 1
    width = params.width(k, params.max_positions - n)
    # The masked rows, shared out evenly; what is left over goes to the groups of more accepted drafts.
    masked, groups = width - 1 - k, k + 1
    sizes = [masked // groups + (i >= groups - masked % groups) for i in range(groups)]
    drafted: list[list[int]] = []  # by number of accepted drafts
    for i, size in enumerate(sizes):
        _, logits = _forward(model, committed, window[: i + 1] + [None] * size, params)
        drafts: list[int] = []
        for c in range(i + 2, i + 1 + size):  # the group's first row stands at the position that AR's token will take
            if _entropy(logits[c]) >= params.draft_entropy or len(drafts) == params.max_drafts:
                break
            drafts.append(choose_token(logits[c], n + c, params))
        drafted.append(drafts)
    target = [choose_token(logits[c], n + c + 1, params) for c in range(k + 1)]
    a = next((i for i in range(k) if window[i + 1] != target[i]), k)
    committed = committed + [t for t in window[: a + 1] if t is not None]
    room = params.max_positions - len(committed)
    next_window: list[int | None] = [target[a], *drafted[a]]
    return target[: a + 1], committed, next_window[: max(room, 1)], width


def _entropy(logits: Tensor) -> float:
    """Shannon entropy in nats of the raw logits."""
    log_probs = torch.log_softmax(logits, dim=-1)
    return -float((log_probs.exp() * log_probs).nan_to_num().sum())


def choose_token(logits: Tensor, position: int, params: DecodeParams) -> int:
    """Choose the token for ``position``: the arg max, or top-k, then top-p, then temperature, then Gumbel arg max."""
    logits = logits.clone()
    logits[params.mask_token_id] = -torch.inf
    if position < params.min_eos_position:
        logits[list(params.stop_token_ids)] = -torch.inf
    if params.temperature == 0:
        return int(logits.argmax())
    ranked = sorted(range(len(logits)), key=lambda token: -logits[token].item())
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    probs, mass = torch.softmax(logits[ranked], dim=-1).tolist(), 0.0
    kept: list[int] = []
    for token, prob in zip(ranked, probs, strict=True):
        if kept and params.top_p < 1 and mass >= params.top_p:
            break
        kept.append(token)
        mass += prob
    seed, at = torch.tensor([params.seed]), torch.tensor([position])
    noise = gumbel_noise(seed, at, torch.arange(len(logits)))[0]
    # Dividing by a tiny temperature must not overflow to a tie of infinities: only differences to the best count.
    scores = (logits - logits.max()) / params.temperature + noise
    return max(kept, key=lambda token: (scores[token].item(), -token))
