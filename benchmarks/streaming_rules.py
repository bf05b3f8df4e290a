# SPDX-License-Identifier: Apache-2.0
"""What other rules of causal streaming would fill, from what masked rows say behind every prefix of AR's own texts.

    python benchmarks/streaming_rules.py read demo --samples SAMPLES.jsonl --out gsm8k_rows.jsonl
    python benchmarks/streaming_rules.py compare gsm8k_rows.jsonl mbpp_rows.jsonl --speed 1.75 1.8 1.85

``read`` takes the samples that `wedlm eval` writes of autoregressive decoding at temperature 0. Causal streaming fills
no position behind one that is left open, so a step depends on nothing but the text so far: one pass with masked rows
behind each prefix has every step of every rule, where a run would show those of one. ``compare`` walks along the texts.
A token that is not AR's counts as an error, after which it goes on with AR's text. Rules are compared at equal speed:
each gets the threshold that gives the first file ``--speed`` tokens a forward.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wedlm.algorithm.dual_stream import RowLabels, dense_mask
from wedlm.algorithm.params import DecodeParams
from wedlm.algorithm.sample import entropy_and_logsumexp
from wedlm.attention.dual_stream import DenseAttend
from wedlm.model import Transformer, load_model, load_tokenizer

THRESHOLDS = np.arange(0.1, 0.8, 0.02)
_LOGITS_AT_ONCE = 512


@dataclass(frozen=True)
class Text:
    """AR's tokens, L of them, and what D masked rows behind each of the L prefixes would write: [L, D]."""

    tokens: list[int]
    choices: np.ndarray
    entropies: np.ndarray


@torch.inference_mode()
def masked_rows(model: Transformer, prompt: list[int], text: list[int], depth: int) -> tuple[list, list]:
    """(choices, entropies) of D masked rows behind every prefix of the text: one forward over all of them."""
    length, known = len(text), len(prompt) + len(text) - 1
    start = len(prompt) + torch.arange(length)
    masks = torch.full((length * depth,), model.config.mask_token_id)
    tokens = torch.cat((torch.tensor([*prompt, *text])[:known], masks))
    positions = torch.cat((torch.arange(known), (start[:, None] + torch.arange(depth)).flatten()))
    # The rows of training with a block behind each prefix, which sees the clean rows before it.
    block = torch.cat((torch.arange(known), start.repeat_interleave(depth)))
    masked = torch.arange(len(tokens)) >= known
    sees = dense_mask(RowLabels(torch.zeros_like(block), block, masked))
    hidden = model.model(tokens, positions, DenseAttend(sees[None, None], 1), masked)[known:]
    choices, entropies = [], []
    for rows in hidden.split(_LOGITS_AT_ONCE):
        logits = model.logits(rows).float()
        choices += logits.argmax(dim=-1).tolist()
        entropies += entropy_and_logsumexp(logits)[0].tolist()
    return choices, entropies


def read(arguments: argparse.Namespace) -> None:
    model, _ = load_model(arguments.model, torch.float32)
    tokenizer = load_tokenizer(arguments.model)
    with arguments.samples.open(encoding="utf-8") as file, arguments.out.open("w", encoding="utf-8") as out:
        for line in [*file][: arguments.limit]:
            sample = json.loads(line)
            text = sample["token_ids"][: arguments.max_tokens]
            choices, entropies = masked_rows(model, tokenizer.encode(sample["prompt"]), text, arguments.depth)
            found = {"tokens": text, "choices": choices, "entropies": [round(one, 5) for one in entropies]}
            out.write(json.dumps(found) + "\n")
            out.flush()


def texts_of(path: Path) -> list[Text]:
    def text(found: dict[str, Any]) -> Text:
        shape = len(found["tokens"]), -1
        return Text(
            found["tokens"], np.reshape(found["choices"], shape), np.reshape(found["entropies"], shape).astype(float)
        )

    with path.open(encoding="utf-8") as file:
        return [text(json.loads(line)) for line in file]


@dataclass(frozen=True)
class Rule:
    """Which of the masked rows behind a prefix are certain, up to the first that is not.

    ``penalty``: λ, nats a column. ``added``: a row's uncertainty is the sum of the entropies up to its own. ``repeats``
    False leaves a token that equals the one before it to the AR head.
    """

    penalty: float = DecodeParams.pos_penalty
    added: bool = False
    repeats: bool = True

    def filled(self, text: Text, place: int, threshold: float) -> int:
        """How many tokens the step behind the prefix of ``place`` tokens fills, AR's included."""
        choices, entropies = text.choices[place], text.entropies[place]
        if choices[0] != text.tokens[place]:
            return 1
        uncertain = (np.cumsum(entropies) if self.added else entropies) + self.penalty * np.arange(len(entropies))
        certain = uncertain < threshold
        if not self.repeats:
            certain[1:] &= choices[1:] != choices[:-1]
        return max(1, len(certain) if certain.all() else int(certain.argmin()))


RULES = {
    "as it is": Rule(),
    "without a distance penalty": Rule(penalty=0),
    "no repeated token": Rule(repeats=False),
    "no repeated token, without a distance penalty": Rule(penalty=0, repeats=False),
    "entropies added up": Rule(penalty=0, added=True),
    "entropies added up, no repeated token": Rule(penalty=0, added=True, repeats=False),
}


def walk(text: Text, rule: Rule, threshold: float) -> Iterator[tuple[int, bool]]:
    """(tokens that were right, whether one was wrong) of each step along AR's text."""
    place = 0
    while place < len(text.tokens):
        there = text.tokens[place : place + rule.filled(text, place, threshold)]
        same = text.choices[place, : len(there)] == there
        right = len(there) if same.all() else max(1, int(same.argmin()))
        yield right, right < len(there)
        place += right


def figures(texts: list[Text], rule: Rule, threshold: float) -> tuple[float, float, float]:
    """(tokens a forward, errors per 1,000 tokens, share of the texts without an error)."""
    walks = [[*walk(text, rule, threshold)] for text in texts]
    tokens, steps = (sum(map(len, each)) for each in ([text.tokens for text in texts], walks))
    errors = [sum(wrong for _, wrong in steps) for steps in walks]
    return tokens / steps, 1000 * sum(errors) / tokens, errors.count(0) / len(texts)


def compare(arguments: argparse.Namespace) -> None:
    files = [texts_of(path) for path in arguments.rows]
    for path, texts in zip(arguments.rows, files, strict=True):
        print(f"{path.name}: {len(texts)} texts, {sum(len(text.tokens) for text in texts)} tokens")
    report = []
    for name, rule in RULES.items():
        found = np.array([[figures(texts, rule, threshold) for threshold in THRESHOLDS] for texts in files])
        for speed in arguments.speed:

            def at(values: np.ndarray, speed: float = speed, speeds: np.ndarray = found[0, :, 0]) -> float:
                return round(float(np.interp(speed, speeds, values)), 3)

            of_files = {
                path.stem: dict(zip(("tokens_per_forward", "errors", "same_text"), map(at, one.T), strict=True))
                for path, one in zip(arguments.rows, found, strict=True)
            }
            report.append({"rule": name, "threshold": at(THRESHOLDS), **of_files})
            print(json.dumps(report[-1]))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    reading = commands.add_parser("read")
    reading.add_argument("model")
    reading.add_argument("--samples", type=Path, required=True, help="of autoregressive decoding at temperature 0")
    reading.add_argument("--limit", type=int, help="only the first N of them")
    reading.add_argument("--max-tokens", type=int, default=256, help="only the first N of each")
    reading.add_argument("--depth", type=int, default=8, help="masked rows behind each prefix")
    reading.add_argument("--out", type=Path, required=True)
    comparing = commands.add_parser("compare")
    comparing.add_argument("rows", type=Path, nargs="+", help="what read wrote; the first decides the threshold")
    comparing.add_argument("--speed", type=float, nargs="+", default=[1.8], help="tokens a forward")
    comparing.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    {"read": read, "compare": compare}[arguments.command](arguments)


if __name__ == "__main__":
    main()
