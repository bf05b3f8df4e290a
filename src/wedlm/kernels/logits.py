# SPDX-License-Identifier: Apache-2.0
"""Entropy, choice and its log-probability of each row of logits, in one pass over the vocabulary."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from wedlm.kernels.launch import launch_options, pdl_wait, supports_pdl

_LOWEST = tl.constexpr(-1e30)


@triton.jit
def _scan(
    logits_ptr, target_ptr, sequence_ptr, min_eos_position_ptr, stop_tokens_ptr, part_ptr, choice_ptr,
    vocab_size, mask_token_id, tiles_per_part,
    NUM_STOP_TOKENS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """For one part of the vocabulary: maximum, Σ e^(x - max), Σ (x - max) e^(x - max), best allowed token."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pdl_wait(PDL)
    if NUM_STOP_TOKENS > 0:
        sequence = tl.load(sequence_ptr + row)
        eos_banned = tl.load(target_ptr + row) < tl.load(min_eos_position_ptr + sequence)
    highest = tl.full((), _LOWEST, tl.float32)
    mass = tl.full((), 0.0, tl.float32)
    moment = tl.full((), 0.0, tl.float32)
    best = tl.full((), _LOWEST, tl.float32)
    choice = tl.full((), 0, tl.int32)
    for tile in range(part * tiles_per_part, (part + 1) * tiles_per_part):
        token = tile * BLOCK + tl.arange(0, BLOCK)
        inside = token < vocab_size
        x = tl.load(logits_ptr + row * vocab_size + token, mask=inside, other=-float("inf")).to(tl.float32)
        x = tl.maximum(x, _LOWEST)  # -inf has probability 0 and adds nothing
        higher = tl.maximum(highest, tl.max(x, axis=0))
        shrink = tl.exp(highest - higher)
        e = tl.where(inside, tl.exp(x - higher), 0.0)
        # Shifting the maximum by s turns Σ z e^z into (Σ z e^z + s Σ e^z) e^s.
        moment = shrink * (moment + (highest - higher) * mass) + tl.sum(tl.where(e > 0, (x - higher) * e, 0.0), axis=0)
        mass = shrink * mass + tl.sum(e, axis=0)
        highest = higher
        allowed = inside & (token != mask_token_id)
        if NUM_STOP_TOKENS > 0:
            for column in tl.static_range(NUM_STOP_TOKENS):
                banned = tl.load(stop_tokens_ptr + sequence * NUM_STOP_TOKENS + column)
                allowed = allowed & ~(eos_banned & (token == banned))
        candidates = tl.where(allowed, x, -float("inf"))
        tile_best, tile_choice = tl.max(candidates, axis=0, return_indices=True, return_indices_tie_break_left=True)
        if tile_best > best:
            best, choice = tile_best, tile * BLOCK + tile_choice
    place = (row * PARTS + part) * 4
    tl.store(part_ptr + place, highest)
    tl.store(part_ptr + place + 1, mass)
    tl.store(part_ptr + place + 2, moment)
    tl.store(part_ptr + place + 3, best)
    tl.store(choice_ptr + row * PARTS + part, choice)


@triton.jit
def _combine(
    part_ptr, part_choice_ptr, choice_ptr, entropy_ptr, logprob_ptr, num_parts,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    inside = part < num_parts
    pdl_wait(PDL)
    place = part_ptr + (row * num_parts + part) * 4
    highest = tl.load(place, mask=inside, other=_LOWEST)
    mass = tl.load(place + 1, mask=inside, other=0.0)
    moment = tl.load(place + 2, mask=inside, other=0.0)
    best = tl.load(place + 3, mask=inside, other=-float("inf"))
    top = tl.max(highest, axis=0)
    shift = highest - top
    shrink = tl.exp(shift)
    all_mass = tl.sum(mass * shrink, axis=0)
    all_moment = tl.sum(tl.where(mass > 0, shrink * (moment + shift * mass), 0.0), axis=0)
    log_mass = tl.log(all_mass)
    best_value, winner = tl.max(best, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(choice_ptr + row, tl.load(part_choice_ptr + row * num_parts + winner).to(tl.int64))
    tl.store(entropy_ptr + row, tl.maximum(log_mass - all_moment / all_mass, 0.0))
    tl.store(logprob_ptr + row, best_value - top - log_mass)


def greedy_rows(
    logits: Tensor,
    mask_token_id: int,
    eos_ban: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(choice [L] int64, entropy [L], log-probability of the choice [L]) of logits [L, V] of any float type.

    The choice is the most probable token besides the mask token (lowest id among equals). ``eos_ban`` = (target
    position [L], sequence [L], min_eos_position [S], stop tokens [S, E], padded with -1) also rules out the stop tokens
    of rows whose target lies before min_eos_position. Entropy and log-probability are those of the raw distribution,
    in nats.
    """
    num_rows, vocab_size = logits.shape
    block = min(4096, triton.next_power_of_2(vocab_size))
    tiles = triton.cdiv(vocab_size, block)
    tiles_per_part = 1 if num_rows <= 64 else 4
    parts = triton.cdiv(tiles, tiles_per_part)
    part = torch.empty(num_rows, parts, 4, dtype=torch.float32, device=logits.device)
    part_choice = torch.empty(num_rows, parts, dtype=torch.int32, device=logits.device)
    choice = torch.empty(num_rows, dtype=torch.long, device=logits.device)
    entropy, logprob = torch.empty_like(part[:, 0, 0]), torch.empty_like(part[:, 0, 0])
    pdl = supports_pdl(logits.device)
    target, sequence, min_eos_position, stop_tokens = eos_ban or (choice, choice, choice, choice)
    num_stop_tokens = stop_tokens.shape[1] if eos_ban is not None else 0
    _scan[(num_rows, parts)](
        logits, target, sequence, min_eos_position, stop_tokens, part, part_choice,
        vocab_size, mask_token_id, tiles_per_part,
        NUM_STOP_TOKENS=num_stop_tokens, PARTS=parts, BLOCK=block, PDL=pdl, num_warps=8, **launch_options(pdl),
    )  # fmt: skip
    _combine[(num_rows,)](
        part, part_choice, choice, entropy, logprob, parts,
        BLOCK=triton.next_power_of_2(parts), PDL=pdl, num_warps=1, **launch_options(pdl),
    )  # fmt: skip
    return choice, entropy, logprob
