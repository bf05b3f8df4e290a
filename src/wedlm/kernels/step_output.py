# SPDX-License-Identifier: Apache-2.0
"""What a step reports to the host about its windows: one tensor, so that one copy fetches it.

Int64 [S, 4 + C + C/2] for windows of C columns, an even number: tokens emitted, rows run, tokens cached now, drafts
verified; the emitted tokens; and their log-probabilities, two float32 in the space of one integer.
"""

import torch
from torch import Tensor


def empty_results(num_sequences: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for the results, and its view as the log-probabilities [S, C]."""
    results = torch.empty(num_sequences, 4 + columns + columns // 2, dtype=torch.long, device=device)
    return results, results[:, first_logprob(results.shape) :].view(torch.float32)


def first_logprob(shape: tuple[int, ...]) -> int:
    """The column of results of this shape where log-probabilities begin: 4 + C."""
    return 4 + (shape[1] - 4) * 2 // 3
