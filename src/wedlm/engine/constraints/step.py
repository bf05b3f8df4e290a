# SPDX-License-Identifier: Apache-2.0
"""The constrained windows of one step: changes their rows of logits before the choice, and checks their filled columns
after it.

All of this makes the host wait for the device, once or twice a step; steps without constrained windows skip it.
"""

from collections import Counter

import torch
from torch import Tensor

from wedlm.algorithm.sample import SamplingBatch, choose_tokens, entropy_and_logsumexp
from wedlm.algorithm.verify import RowLayout
from wedlm.algorithm.window import Emitted, RowResults, WindowState
from wedlm.engine.constraints.rules import Constraint
from wedlm.engine.plan import ScheduledRequest


class ConstrainedStep:
    """Call ``apply`` before tokens are chosen, ``draft`` after it, and ``correct`` after the windows have advanced.

    When verifying, row i is chosen under the rules that follow from the drafts before it, so AR decoding would choose
    the same; the drafts themselves need not follow the rules. In streaming and block decoding the first masked column
    is chosen under the rules, and later ones without the grammar, because what comes before them is unknown;
    ``correct`` then checks them. In causal streaming the first masked column has two rows, that of the token before it,
    as in AR decoding, and its own, and both choose under the same rules.
    """

    def __init__(self, windows: list[ScheduledRequest], state: WindowState, layout: RowLayout) -> None:
        """``state`` and ``layout`` are those of the forward (after ``extend``)."""
        self._constraints: dict[int, Constraint] = {
            s: one.request.output.constraint
            for s, one in enumerate(windows)
            if one.request.output.constraint is not None
        }
        self._windows = windows
        widths = state.width.tolist()
        self._tokens = [row[:width] for row, width in zip(state.tokens.tolist(), widths, strict=True)]
        self._filled = [row[:width] for row, width in zip(state.filled.tolist(), widths, strict=True)]
        self._shared, self._cached = layout.shared.tolist(), state.cached.tolist()
        self._rows: dict[tuple[int, int], list[int]] = {}  # by column, the one that decides it first
        self._logits = self._free_logits = self._logsumexp = torch.zeros(0)
        self._sampling: SamplingBatch | None = None

    @classmethod
    def of(cls, windows: list[ScheduledRequest], state: WindowState, layout: RowLayout) -> "ConstrainedStep | None":
        """The constrained step, or None if no window is constrained."""
        if all(one.request.output.constraint is None for one in windows):
            return None
        return cls(windows, state, layout)

    def apply(
        self, sequence: Tensor, column: Tensor, logits: Tensor, logsumexp: Tensor, sampling: SamplingBatch
    ) -> None:
        """Change the logits [L, V] of constrained windows in place. ``sequence`` and ``column`` belong to each row,
        ``logsumexp`` to the raw logits."""
        for row, place in enumerate(zip(sequence.tolist(), column.tolist(), strict=True)):
            self._rows.setdefault(place, []).append(row)
        self._sampling, self._logsumexp, self._logits = sampling, logsumexp, logits
        if any(not self._windows[s].request.decode.is_verified for s in self._constraints):
            self._free_logits = logits.clone()
        for s, constraint in self._constraints.items():
            assert constraint.num_accepted == self._windows[s].request.num_output_tokens
            if self._windows[s].request.decode.is_verified:
                self._apply_verified(s, constraint, logits)
            else:
                self._apply_streaming(s, constraint, logits)

    def _apply_verified(self, s: int, constraint: Constraint, logits: Tensor) -> None:
        tokens, num_filled = self._tokens[s], sum(self._filled[s])
        counts = [constraint.counts]  # by number of drafts before the row's token
        tried, known = 0, True
        for c in range(num_filled):
            if c > 0:
                counts.append(counts[-1] + Counter([tokens[c]]))
                known = known and constraint.advance(tokens[c])
                tried += known
            row = logits[self._rows[s, c][0]]
            constraint.apply_penalties(row, counts[c])
            if known:  # otherwise the row stands after a draft that cannot be accepted
                constraint.apply_mask(row)
            constraint.apply_cut(row)
        constraint.rewind(tried)
        for c in range(num_filled, len(tokens)):
            row = logits[self._rows[s, c][0]]
            constraint.apply_penalties(row, counts[self._shared[s][c] - 1])
            constraint.apply_cut(row)

    def _apply_streaming(self, s: int, constraint: Constraint, logits: Tensor) -> None:
        tokens, filled = self._tokens[s], self._filled[s]
        emitted = (
            len(self._windows[s].request.output.tokens) - self._cached[s]
        )  # columns whose tokens the rules know already
        counts, tried, known, first = constraint.counts.copy(), 0, True, True
        for c in range(emitted, len(tokens)):
            if filled[c]:
                counts[tokens[c]] += 1
                if first and known:
                    known = constraint.advance(tokens[c])
                    tried += known
                continue
            for row in self._rows[s, c]:
                constraint.apply_penalties(logits[row], counts)
                if first and known:
                    constraint.apply_mask(logits[row])
                constraint.apply_cut(logits[row])
            first = False
        constraint.rewind(tried)

    def draft(self, results: RowResults) -> None:
        """For verified windows with a grammar, choose the next drafts again, in place.

        What comes before them is known once this step's tokens are chosen. Drafts cannot change the text; those that
        the grammar refuses would only be wasted. Their entropy becomes that of what the grammar admits.
        """
        for s, constraint in self._constraints.items():
            if constraint.matcher is None or not self._windows[s].request.decode.is_verified:
                continue
            drafts = self._tokens[s][1 : sum(self._filled[s])]
            choice = results.choice[s].tolist()
            accepted = next((i for i, token in enumerate(drafts) if token != choice[i]), len(drafts))
            group = [c for c in range(len(drafts) + 1, len(self._tokens[s])) if self._shared[s][c] == accepted + 1]
            tried = 0
            for token in choice[: accepted + 1]:
                if not constraint.advance(token):
                    break
                tried += 1
            else:
                tried += self._draft_group(s, constraint, group[1:], results)  # the first stands in AR's token's place
            constraint.rewind(tried)

    def _draft_group(self, s: int, constraint: Constraint, columns: list[int], results: RowResults) -> int:
        """How many of the drafts chosen for ``columns`` the constraint accepted."""
        assert self._sampling is not None
        for done, c in enumerate(columns):
            (row,) = self._rows[s, c]
            logits = self._logits[row : row + 1].clone()
            if not constraint.apply_mask(logits[0]):
                return done
            token = int(choose_tokens(logits, self._sampling.row(row))[0])
            results.choice[s, c], results.entropy[s, c] = token, entropy_and_logsumexp(logits)[0][0]
            if not constraint.advance(token):
                return done
        return len(columns)

    def correct(self, run: Tensor, state: WindowState, emitted: Emitted) -> None:
        """After the step, mask what the grammars refuse in the windows, and correct what is final, in place.

        The leading filled run is checked token by token. The first token that is refused is masked together with all
        filled columns after it; if this step has logits for it, it is filled from the grammar's tokens at once. ``run``
        says by how many columns the step moved each window. Every step still fills or emits something: the first masked
        column is always chosen within the grammar, and what was checked once is never refused later.
        """
        for s, constraint in self._constraints.items():
            decode = self._windows[s].request.decode
            if constraint.matcher is None or decode.is_verified:
                continue
            # What the prompt has of a block comes before the text that the rules know.
            known = max(0, len(self._windows[s].request.prompt_token_ids) - int(state.cached[s]))
            if constraint.matcher.failed:
                emitted.count[s] = known + 1  # whatever it is: the engine will ask the grammar, and end the text there
                continue
            width = int(state.width[s])
            tokens, filled = state.tokens[s, :width].tolist(), state.filled[s, :width].tolist()
            column, failed = self._first_refused(constraint, tokens[known:], filled[known:])
            if column is None:
                continue
            column += known
            if failed:
                emitted.count[s] = column + 1
                continue
            state.filled[s, column:] = False
            rows, admitted = self._rows.get((s, column + int(run[s]))), True
            row = rows[0] if rows else None
            if decode.is_causal and column > 0:
                row = None  # the next step has a better row for it
            if row is not None:
                token, logprob, admitted = self._choose_again(row, constraint, tokens[known:column])
                for part in (state, emitted):
                    part.tokens[s, column], part.logprobs[s, column] = token, logprob
                state.filled[s, column] = True
            count = column + (row is not None)
            # A block is final as a whole; but where no token is admitted it would never be, and the text ends there.
            waits = decode.decoding == "block" and count < width and admitted
            emitted.count[s] = 0 if waits else count

    def _choose_again(self, row: int, constraint: Constraint, before: list[int]) -> tuple[int, float, bool]:
        """The token that row ``row`` chooses under the rules after ``before``, its raw log-probability, and whether the
        grammar admits any."""
        logits = self._free_logits[row].clone()
        constraint.apply_penalties(logits, constraint.counts + Counter(before))
        tried = sum(constraint.advance(token) for token in before)
        assert tried == len(before)
        admitted = constraint.apply_mask(logits)
        constraint.apply_cut(logits)
        constraint.rewind(tried)
        assert self._sampling is not None
        token = int(choose_tokens(logits[None], self._sampling.row(row))[0])
        return token, float(self._free_logits[row, token] - self._logsumexp[row]), admitted

    def _first_refused(self, constraint: Constraint, tokens: list[int], filled: list[bool]) -> tuple[int | None, bool]:
        """The column of the first token of the leading filled run that is not allowed there, if any, and whether the
        grammar failed there."""
        tried, refused = 0, None
        for c, token in enumerate(tokens):
            if not filled[c] or constraint.ends_with(token):
                break
            assert constraint.matcher is not None
            if constraint.matcher.complete:
                break  # nothing after this survives
            if not constraint.advance(token):
                refused = c
                break
            tried += 1
        failed = constraint.matcher is not None and constraint.matcher.failed
        constraint.rewind(tried)
        return refused, failed
