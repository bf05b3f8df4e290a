# SPDX-License-Identifier: Apache-2.0
"""The whole model as rank 0 sees it: it tells the others what to compute and computes its own share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wedlm.algorithm.sample import SamplingBatch
from wedlm.attention.base import ExtendBatch, KVCache, RowVisibility
from wedlm.engine.execution.rows import Constrain, Report, RowChoices, choose_row_tokens
from wedlm.engine.execution.sampling_tensors import BatchFlags, BatchParams
from wedlm.engine.ranks.choice import ChoiceRows
from wedlm.engine.ranks.messages import Kind
from wedlm.engine.ranks.processes import Ranks
from wedlm.engine.ranks.rank import Rank


@dataclass(frozen=True)
class PlannedRows:
    """Replaces an ``Attend``: each rank plans its own attention from it."""

    batch: ExtendBatch


class FirstRank:
    """``RowsModel`` over all ranks, with ``plan`` as its ``PlanAttention``. With ``local_logits`` and ``choose`` an
    ``EagerStep`` can choose tokens without whole logits."""

    def __init__(self, rank: Rank, ranks: Ranks) -> None:
        self.rank, self.ranks = rank, ranks

    def plan(self, cache: KVCache, batch: ExtendBatch) -> PlannedRows:
        return PlannedRows(batch)

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Any,
        logits_rows: Tensor | None = None,
        masked: Tensor | None = None,
        adapters: Tensor | None = None,
    ) -> Tensor:
        """Logits [L, V] of the whole vocabulary."""
        logits = self.local_logits(tokens, positions, attend, logits_rows, masked, adapters)
        return self._gather() if len(logits) else logits.new_empty(0, self.rank.shard.whole.vocab_size)

    def local_logits(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Any,
        logits_rows: Tensor | None = None,
        masked: Tensor | None = None,
        adapters: Tensor | None = None,
    ) -> Tensor:
        """Logits [L, V of this rank]."""
        assert adapters is None, "ranks have no adapters by name"
        batch = attend.batch if isinstance(attend, PlannedRows) else None
        with self.ranks.together(Kind.FORWARD, forward_arrays(tokens, positions, batch, logits_rows, masked)):
            return self.rank.forward(tokens, positions, batch, logits_rows, masked)

    def choose(
        self,
        logits: Tensor,
        params: BatchParams,
        index: Tensor,
        target: Tensor,
        flags: BatchFlags,
        mask_token_id: int,
        *,
        report: Report,
        constrain: Constrain | None = None,
    ) -> RowChoices:
        """``choose_row_tokens`` for the latest forward's rows; ``logits`` are this rank's. Gathers whole logits only if
        rules, reports, top-k or top-p need them."""
        if constrain is not None or report != "none" or flags.truncated:
            logits = self._gather().float()
            return choose_row_tokens(
                logits, params, index, target, flags, mask_token_id, report=report, constrain=constrain
            )
        rows = ChoiceRows(
            sampling=params.sampling(index, target, flags),
            stop_tokens=params.stop_tokens[index][:, : None if flags.eos_banned else 0],
            eos_banned=target < params.min_eos_position[index],
            mask_token_id=mask_token_id,
            wants_entropy=flags.entropy,
        )
        with self.ranks.together(Kind.CHOOSE, choice_arrays(rows)):
            return RowChoices(*self.rank.choose(rows))

    def _gather(self) -> Tensor:
        with self.ranks.together(Kind.GATHER, []):
            logits = self.rank.whole_logits()
        assert logits is not None, "rank 0 gathers"
        return logits


def forward_arrays(
    tokens: Tensor, positions: Tensor, batch: ExtendBatch | None, rows: Tensor | None, masked: Tensor | None
) -> list[np.ndarray]:
    """A forward as a message; ``read_forward`` undoes this."""
    visibility = None if batch is None else batch.visibility
    given = [batch is not None, rows is not None, masked is not None, visibility is not None]
    pages: list[list[int]] = [] if batch is None else batch.pages
    return [
        _integers(given),
        _integers([] if batch is None else batch.starts),
        _integers([] if batch is None else batch.counts),
        _integers([len(one) for one in pages]),
        _integers([page for one in pages for page in one]),
        *(_of_tensor(part) for part in (tokens, positions, rows, masked)),
        *(_of_tensor(part) for part in _parts(visibility)),
    ]


def read_forward(
    arrays: Sequence[np.ndarray], device: torch.device
) -> tuple[Tensor, Tensor, ExtendBatch | None, Tensor | None, Tensor | None]:
    """The arguments of ``Rank.forward``."""
    given, starts, counts, sizes, pages, *rest = arrays
    tokens, positions, rows, masked, shared, own_start = (torch.from_numpy(one).to(device) for one in rest)
    batch = None
    if given[0]:
        tables = [one.tolist() for one in np.split(pages, np.cumsum(sizes)[:-1])]
        visibility = RowVisibility(shared, own_start) if given[3] else None
        batch = ExtendBatch(starts.tolist(), counts.tolist(), tables, visibility)
    return tokens, positions, batch, rows if given[1] else None, masked if given[2] else None


def choice_arrays(rows: ChoiceRows) -> list[np.ndarray]:
    """A choice as a message; ``read_choice`` undoes this."""
    sampling = rows.sampling
    return [
        _integers([rows.mask_token_id, rows.wants_entropy, sampling.any_sampled, rows.stop_tokens.shape[1]]),
        _of_tensor(rows.stop_tokens.flatten()),
        _of_tensor(rows.eos_banned),
        sampling.temperature.double().cpu().numpy().view(np.int64),
        _of_tensor(sampling.seed),
        _of_tensor(sampling.position),
    ]


def read_choice(arrays: Sequence[np.ndarray], device: torch.device) -> ChoiceRows:
    """The argument of ``Rank.choose``."""
    (mask_token_id, wants_entropy, any_sampled, num_stop_tokens), stops, banned, temperature, seed, position = arrays
    count = len(seed)
    none = torch.zeros(count, dtype=torch.long, device=device)
    sampling = SamplingBatch(
        temperature=torch.from_numpy(temperature.view(np.float64)).float().to(device),
        top_k=none,
        top_p=none.double(),
        seed=torch.from_numpy(seed).to(device),
        position=torch.from_numpy(position).to(device),
        any_sampled=bool(any_sampled),
        any_truncated=False,
    )
    return ChoiceRows(
        sampling,
        torch.from_numpy(stops).to(device).view(count, int(num_stop_tokens)),
        torch.from_numpy(banned).to(device).bool(),
        int(mask_token_id),
        bool(wants_entropy),
    )


def _parts(visibility: RowVisibility | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if visibility is None else (visibility.shared, visibility.own_start)


def _integers(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def _of_tensor(tensor: Tensor | None) -> np.ndarray:
    return _integers([]) if tensor is None else tensor.long().cpu().contiguous().numpy()
