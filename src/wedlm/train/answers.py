# SPDX-License-Identifier: Apache-2.0
"""A model's own answers to the prompts of a chat file, as training data (self-distillation).

Training on the model's own text makes that text easier to predict for its masked rows, and keeps its AR head where it
was; continuations of text do the same for text. The sampler is a plain AR loop over a dense cache, for thousands of
short prompts at once on one device.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from wedlm.model import Tokenizer
from wedlm.model.transformer import Transformer
from wedlm.train.sources import read_samples

# The cache is read up to a multiple of this many keys, so that few shapes occur.
_KEY_STEP = 64


@dataclass(frozen=True)
class AnswerSettings:
    """``temperature`` 0 takes the most likely token. Answers that do not end within ``max_tokens`` are left out, unless
    ``keep_cut`` is set, which marks them as unfinished."""

    max_prompt_tokens: int = 512
    max_tokens: int = 256
    temperature: float = 0.0
    num_samples: int = 1
    batch_size: int = 1024
    seed: int = 0
    keep_cut: bool = False


class _DenseCacheAttend:
    """Attention of N sequences, padded on the left to a common length, over keys [N, K, slots, D]."""

    def __init__(self, model: Transformer, visible: Tensor, num_slots: int) -> None:
        config = model.config
        weight = model.model.embed_tokens.weight
        shape = (config.num_layers, len(visible), config.num_kv_heads, num_slots, config.head_dim)
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)
        # Which slots hold a real token: [N, slots]; those to come are real once they are written.
        self.visible = F.pad(visible, (0, num_slots - visible.shape[1]), value=True)
        self.start = 0

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        num_sequences = self.keys.shape[1]
        q, k, v = (x.unflatten(0, (num_sequences, -1)).transpose(1, 2) for x in (q, k, v))
        rows = q.shape[2]
        self.keys[layer, :, :, self.start : self.start + rows] = k
        self.values[layer, :, :, self.start : self.start + rows] = v
        end = min(-(-(self.start + rows) // _KEY_STEP) * _KEY_STEP, self.keys.shape[3])
        keys, values = self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
        slot = torch.arange(end, device=q.device)
        causal = slot <= self.start + torch.arange(rows, device=q.device)[:, None]
        mask = (causal & self.visible[:, None, :end])[:, None]
        # A padded row sees itself, so that no softmax is empty.
        mask = mask | (slot == self.start + torch.arange(rows, device=q.device)[:, None])
        share = q.shape[1] // keys.shape[1]
        if rows == 1:  # query heads of a key head as its rows: no key is repeated
            out = F.scaled_dot_product_attention(q.reshape(len(q), -1, share, q.shape[-1]), keys, values, mask)
            return out.reshape(num_sequences, -1, q.shape[-1])
        out = F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    def keep(self, index: Tensor) -> None:
        """Continue with only these sequences."""
        self.keys, self.values = self.keys[:, index], self.values[:, index]
        self.visible = self.visible[index]


@torch.inference_mode()
def sample_answers(
    model: Transformer, prompts: Sequence[Sequence[int]], settings: AnswerSettings, generator: torch.Generator
) -> list[list[int] | None]:
    """Token ids of one answer per prompt, without the end token; None if it did not end in time."""
    device = model.model.embed_tokens.weight.device
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    length = torch.tensor([len(p) for p in prompts], device=device)
    visible = torch.arange(width, device=device) >= width - length[:, None]
    attend = _DenseCacheAttend(model, visible, width + settings.max_tokens)
    ends = torch.tensor(model.config.eos_token_ids, device=device)
    positions = (torch.arange(width, device=device) - (width - length)[:, None]).clamp(min=0)
    last = torch.arange(1, len(prompts) + 1, device=device) * width - 1
    logits = model(tokens.flatten(), positions.flatten(), attend, last)
    attend.start = width
    who = torch.arange(len(prompts), device=device)
    answers = torch.full((len(prompts), settings.max_tokens), -1, device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    ended = torch.zeros_like(done)
    for step in range(settings.max_tokens):
        chosen = _choose(logits, settings.temperature, generator)
        is_end = torch.isin(chosen, ends)
        ended[who] |= is_end & ~done
        done |= is_end
        answers[who, step] = torch.where(done, -1, chosen)
        if step % 16 == 15:  # looking waits for the device
            alive = torch.nonzero(~done).flatten()
            if not len(alive):
                break
            if len(alive) < 0.8 * len(done):
                attend.keep(alive)
                who, length, chosen, done = who[alive], length[alive], chosen[alive], done[alive]
        if step + 1 < settings.max_tokens:
            logits = model(chosen, length + step, attend)
            attend.start += 1
    rows, complete = answers.tolist(), ended.tolist()
    kept = zip(rows, (whole or settings.keep_cut for whole in complete), strict=True)
    return [[t for t in row if t >= 0] if keeps else None for row, keeps in kept]


def _choose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    if not temperature:
        return logits.argmax(dim=-1)
    noise = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator)
    return (logits.float() / temperature - noise.log()).argmax(dim=-1)


def usable_text(answer: str, ended: bool) -> str:
    """The part of an answer that can be trained on. An answer that a limit cut (``ended`` False) may stop within a
    character, whose beginning is removed. "" if the answer is empty or has no whole characters."""
    text = answer if ended else answer.rstrip("\N{REPLACEMENT CHARACTER}")
    return text if text.strip() and "\N{REPLACEMENT CHARACTER}" not in text else ""


def with_reply(messages: Sequence[dict[str, Any]], reply: str, ended: bool) -> dict[str, Any]:
    """The conversation as a line of training data; ``ended`` False if the reply was about to continue."""
    line: dict[str, Any] = {"messages": [*messages, {"role": "assistant", "content": reply}]}
    return line if ended else {**line, "unfinished": True}


def write_answers(
    model: Transformer,
    tokenizer: Tokenizer,
    source: str | Path,
    target: str | Path,
    settings: AnswerSettings,
    part: tuple[int, int] = (0, 1),
) -> tuple[int, int]:
    """Answer the first question of each conversation in ``source``, and write {"messages"} lines to ``target``.

    Returns (answers written, answers left out because they did not end or were empty). Prompts that are too long, and
    lines of plain text, are skipped. ``part`` (i, n): every n-th prompt from the i-th on, for n processes.
    """
    device = model.model.embed_tokens.weight.device
    generator = torch.Generator(device).manual_seed(settings.seed)
    asked = sorted(_questions(source, tokenizer, settings), key=lambda pair: len(pair[1]))
    asked = [pair for pair in asked[part[0] :: part[1]] for _ in range(settings.num_samples)]
    written = left_out = 0
    with Path(target).open("w", encoding="utf-8") as file:
        for start in range(0, len(asked), settings.batch_size):
            together = asked[start : start + settings.batch_size]
            answers = sample_answers(model, [ids for _, ids in together], settings, generator)
            for (messages, _), answer in zip(together, answers, strict=True):
                # One that ended within the limit is shorter than it: its end token is not part of it.
                cut = answer is not None and len(answer) == settings.max_tokens
                text = "" if answer is None else usable_text(tokenizer.decode(answer), not cut)
                if not text:
                    left_out += 1
                    continue
                file.write(json.dumps(with_reply(messages, text, not cut), ensure_ascii=False) + "\n")
                written += 1
    return written, left_out


def write_continuations(
    model: Transformer,
    tokenizer: Tokenizer,
    source: str | Path,
    target: str | Path,
    settings: AnswerSettings,
    every: int = 1,
    num_prompt_tokens: int = 24,
) -> int:
    """Continue the beginning of every ``every``-th paragraph in ``source``, and write {"text"} lines to ``target``.

    A paragraph is 200 or more characters between empty lines, of a text or of a conversation's first message. Returns
    how many were written.
    """
    device = model.model.embed_tokens.weight.device
    generator = torch.Generator(device).manual_seed(settings.seed)
    texts = (sample.text or sample.messages[0]["content"] for sample in read_samples(source, skip_bad=False))  # type: ignore[index]
    paragraphs = [part for text in texts for part in text.split("\n\n") if len(part) >= 200][::every]
    prompts = [tokenizer.encode(part, False)[:num_prompt_tokens] for part in paragraphs]
    with Path(target).open("w", encoding="utf-8") as file:
        for start in range(0, len(prompts), settings.batch_size):
            part = prompts[start : start + settings.batch_size]
            for prompt, answer in zip(part, sample_answers(model, part, settings, generator), strict=True):
                text = tokenizer.decode([*prompt, *(answer or [])])
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return len(prompts)


def _questions(
    source: str | Path, tokenizer: Tokenizer, settings: AnswerSettings
) -> Iterator[tuple[list[dict[str, str]], list[int]]]:
    """(messages before the first reply, the prompt's ids) of each conversation."""
    for sample in read_samples(source, skip_bad=False):
        if not sample.messages:
            continue
        first = next(i for i, message in enumerate(sample.messages) if message["role"] == "assistant")
        messages = list(sample.messages[:first])
        if not messages:
            continue
        ids = tokenizer.encode_chat(messages)
        if len(ids) <= settings.max_prompt_tokens:
            yield messages, ids
