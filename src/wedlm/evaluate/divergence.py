# SPDX-License-Identifier: Apache-2.0
"""Where verified answers differ from AR's, and whether AR itself was undecided there.

Verified decoding promises AR's text up to floating point: forwards of other shapes may order two equal logits
differently.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wedlm.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from wedlm.engine.llm import LLM


@dataclass(frozen=True)
class Divergence:
    """An answer whose tokens differ from number ``token`` on. ``gap`` is the distance of AR's two best logits there, in
    nats."""

    doc_id: int
    token: int
    gap: float


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The index from which on two sequences differ, which may be the shorter one's length; None if they are equal."""
    shorter = min(len(a), len(b))
    token = next((i for i in range(shorter) if a[i] != b[i]), shorter)
    return None if token == len(a) == len(b) else token


def divergences(
    llm: "LLM", ar: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], chat: bool
) -> list[Divergence]:
    """Answers of ``ar`` (lines of a samples file, temperature 0) that have different tokens in ``other``.

    ``llm`` is the model that gave them. ``chat``: their prompts came through the chat template.
    """
    found = []
    for x, y in zip(ar, other, strict=True):
        if x["doc_id"] != y["doc_id"]:
            raise ValueError(
                f"question {x['doc_id']} is paired with question {y['doc_id']}; expected the same questions"
            )
        token = first_difference(x["token_ids"], y["token_ids"])
        if token is None:
            continue
        ids = llm.tokenizer.encode(x["prompt"], add_special_tokens=not chat) + x["token_ids"][:token]
        ask = SamplingParams(max_tokens=1, temperature=0.0, logprobs=2, decoding="autoregressive")
        alternatives = llm.generate([ids], ask)[0].top_logprobs
        assert alternatives, "two alternatives were asked for"
        (_, first), (_, second) = alternatives[0][:2]
        found.append(Divergence(x["doc_id"], token, first - second))
    return found
