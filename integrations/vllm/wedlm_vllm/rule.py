# SPDX-License-Identifier: Apache-2.0
"""Streaming over a fixed number of rows a step, for many requests at once, on the device, without waiting for it.

It is ``wedlm.algorithm``'s rule, put behind what vLLM's runner asks: which tokens at which positions, and how many
tokens are final. Imports no vLLM. D are the requests of a step, C the columns of a window (2W), R the rows of a request
in a step, T all rows of all requests in a step.

The text is ``reference.decode``'s, except within 4W positions of the model's end, where windows may have fewer rows.
"""

from collections import OrderedDict
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from wedlm.algorithm.reorder import topological_order
from wedlm.algorithm.sample import SamplingBatch, ban_tokens, choose_tokens, entropy_and_logsumexp
from wedlm.algorithm.window import RowResults, WindowParams, WindowState, extend, shift_left, update_windows
from wedlm_vllm.settings import StreamingSettings

_MOST_LOGITS = 1 << 26  # in float32 at a time: 256 MB, and a few times that to sort them


@dataclass(frozen=True)
class WindowStep:
    """One forward of D windows.

    ``state`` [D, C]: the windows, extended by the masked positions that replace ``run`` [D], the leading filled ones.
    ``num_rows`` [D]: how many rows run, at most R. ``is_whole`` [D]: whether these are all rows that the rule needs; if
    not, this step commits and fills nothing. By row [D, R]: ``column`` of the window, ``tokens``, ``positions`` and
    ``targets``, the positions that the rows' predictions are for. Rows past the window hold masks that nothing sees.
    """

    state: WindowState
    run: Tensor
    num_rows: Tensor
    is_whole: Tensor
    column: Tensor
    tokens: Tensor
    positions: Tensor
    targets: Tensor


class StreamingRule:
    """The rule under fixed settings, for up to ``num_windows`` windows at a time."""

    def __init__(
        self, settings: StreamingSettings, max_positions: int, num_windows: int, device: str | torch.device
    ) -> None:
        self.settings, self.max_positions, self.device = settings, max_positions, torch.device(device)
        self._params = WindowParams.stack([settings.decode_params(max_positions)] * num_windows, self.device)

    def params(self, count: int) -> WindowParams:
        """Those of the first ``count`` windows: all are equal."""
        tensors = {f.name: getattr(self._params, f.name) for f in fields(WindowParams)}
        return replace(self._params, **{n: t[:count] for n, t in tensors.items() if isinstance(t, Tensor)})

    def new_windows(self, count: int) -> WindowState:
        """Windows that belong to no text."""
        state = WindowState.empty(count, 2 * self.settings.window_size, self.device)
        return replace(state, cached=state.cached - 1)

    def begin(self, state: WindowState, num_known: Tensor, last_tokens: Tensor) -> WindowState:
        """The windows after ``num_known`` [D] tokens, all cached, that end with ``last_tokens`` [D].

        A window that already stands there (of a request that was preempted and has its keys again) stays as it is. In
        causal streaming a window begins with the last known token, whose row gives the next one; it runs again.
        """
        cached = num_known - int(self.settings.is_causal)
        filled = state.filled & (state.cached == cached)[:, None]
        tokens = state.tokens
        if self.settings.is_causal:
            first = torch.arange(filled.shape[1], device=filled.device) == 0
            filled, tokens = filled | first, torch.where(first, last_tokens[:, None], tokens)
        return replace(state, cached=cached, width=self._width(cached), tokens=tokens, filled=filled)

    def plan(self, state: WindowState, num_rows: Tensor) -> WindowStep:
        """The rows of the next forward, of which only the first ``num_rows`` [D] run."""
        state, run = extend(state, self.params(len(num_rows)))
        # At the model's end vLLM gives fewer rows: what a step in flight might take is not there for the next, and a
        # causal window's first token counts as cached. Half of what is left is what one of two steps always gets.
        is_causal = int(self.settings.is_causal)
        left = self.max_positions - state.cached - is_causal
        needed = torch.minimum(state.width, (left + 1) // 2)
        is_whole = num_rows >= torch.maximum(needed, torch.minimum(run + 1 - is_causal, state.width))
        column = topological_order(state.filled, state.width)[:, : self.settings.num_rows]
        filled = state.filled.gather(1, column)
        tokens = torch.where(filled, state.tokens.gather(1, column), self.settings.mask_token_id)
        positions = (state.cached[:, None] + column).clamp(max=self.max_positions - 1)
        return WindowStep(state, run, num_rows, is_whole, column, tokens, positions, positions + filled)

    def update(self, step: WindowStep, choice: Tensor, entropy: Tensor) -> tuple[WindowState, Tensor, Tensor]:
        """After the forward, given each row's token and entropy (nats) [D, R]: the windows, tokens that are final
        [D, C], and how many of them count [D].

        These are as many as the forward's committed rows. They are the committed tokens, or in causal streaming the
        ones after each of them, since the first was known before.
        """
        params = self.params(len(step.run))
        results = self._by_column(step, choice, entropy)
        whole, _ = update_windows(step.state, step.run, results, params)
        most = step.run - int(self.settings.is_causal)  # a causal window keeps a known token
        commit = torch.where(step.is_whole, step.run, torch.minimum(most, step.num_rows))
        cached = step.state.cached + commit
        part = WindowState(
            cached,
            self._width(cached),
            *(shift_left(columns, commit) for columns in (step.state.tokens, step.state.filled, step.state.logprobs)),
        )
        known = torch.where(step.state.filled, step.state.tokens, results.choice)
        if self.settings.is_causal:
            known = shift_left(known, torch.ones_like(commit))
        return _where(step.is_whole, whole, part), known, commit

    def _width(self, cached: Tensor) -> Tensor:
        return (self.max_positions - cached).clamp(max=self.settings.window_size)

    def _by_column(self, step: WindowStep, choice: Tensor, entropy: Tensor) -> RowResults:
        """Rows' results by window column [D, C]. A column without a row that ran is never certain."""
        capacity = step.state.tokens.shape[1]
        row = torch.arange(step.column.shape[1], device=entropy.device)
        entropy = entropy.masked_fill(row >= step.num_rows[:, None], torch.inf)
        at_column = entropy.new_full((len(entropy), capacity), torch.inf).scatter_(1, step.column, entropy)
        tokens = choice.new_zeros(len(choice), capacity).scatter_(1, step.column, choice)
        if self.settings.is_causal:  # the row before the first masked column decides it; its own may differ
            first = torch.arange(capacity, device=entropy.device) == step.run[:, None]
            following = choice.gather(1, (step.run - 1).clamp(min=0)[:, None])
            at_column = at_column.masked_fill(first & (tokens != following), torch.inf)
            tokens = torch.where(first, following, tokens)
        return RowResults(tokens, at_column, torch.zeros_like(at_column))


def choose_rows(logits: Tensor, sampling: SamplingBatch, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """Each row's token and the entropy (nats) of its raw logits [T, V], a part of the rows at a time."""
    part = max(1, _MOST_LOGITS // logits.shape[1])
    tokens, entropies = [], []
    for start in range(0, len(logits), part):
        rows = slice(start, start + part)
        some = logits[rows].to(torch.float32, copy=True)
        entropies.append(entropy_and_logsumexp(some)[0])
        ends = torch.empty(len(some), 0, dtype=torch.long, device=some.device)
        ban_tokens(some, mask_token_id, ends, torch.zeros(len(some), dtype=torch.bool, device=some.device))
        names = ("temperature", "top_k", "top_p", "seed", "position")
        tokens.append(choose_tokens(some, replace(sampling, **{n: getattr(sampling, n)[rows] for n in names})))
    return torch.cat(tokens), torch.cat(entropies)


class Slots:
    """The windows of a runner's requests, by its slots, and those of requests that lost theirs.

    A runner says only that a request is gone, not whether it ended or was preempted. So its window is kept for a while,
    by its name; a request that comes back under that name continues as if it had never left.
    """

    def __init__(self, rule: StreamingRule, num_slots: int) -> None:
        self.state, self._kept = rule.new_windows(num_slots), rule.new_windows(4 * num_slots)
        self._rule, self._place = rule, OrderedDict[str, int]()
        self._free = list(range(len(self._kept.cached)))

    def add(self, name: str, slot: int) -> None:
        """Give a request a slot."""
        place = self._place.pop(name, None)
        if place is None:
            self.state.cached[slot : slot + 1] = -1
        else:
            self._copy(self._kept, place, self.state, slot)
            self._free.append(place)

    def remove(self, name: str, slot: int) -> None:
        """Take a request's slot away, and keep its window, if need be in the place of the one kept longest."""
        self._place[name] = self._free.pop() if self._free else self._place.popitem(last=False)[1]
        self._copy(self.state, slot, self._kept, self._place[name])

    def begin(self, slots: Tensor, num_known: Tensor, last_tokens: Tensor) -> None:
        """``StreamingRule.begin`` at ``slots``."""
        self.state.put(slots, self._rule.begin(self.state.take(slots), num_known, last_tokens))

    @staticmethod
    def _copy(source: WindowState, i: int, target: WindowState, j: int) -> None:
        for field in fields(WindowState):
            getattr(target, field.name)[j].copy_(getattr(source, field.name)[i])


def _where(condition: Tensor, yes: WindowState, no: WindowState) -> WindowState:
    return WindowState(
        *(
            torch.where(condition if a.ndim == 1 else condition[:, None], a, b)
            for a, b in ((getattr(yes, f.name), getattr(no, f.name)) for f in fields(WindowState))
        )
    )
