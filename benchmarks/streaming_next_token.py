# SPDX-License-Identifier: Apache-2.0
"""Tokens a forward of streaming on everyday chats, by kind, and whether it counts to 100: what decides its next token.

    python benchmarks/streaming_next_token.py demo --next-token masked causal --window 4 8 16 --out result.json

Prints and saves one JSON object; ``--out`` also keeps every text. Temperature 0. GSM8K, with scores: `wedlm eval`.
"""

import argparse
import itertools
import json
import re
from pathlib import Path

import torch

from wedlm import LLM, SamplingParams
from wedlm.bench.laptop import chat_prompts
from wedlm.engine.outputs import GenerationOutput, Totals

COUNTING = "Count from 1 to 100."


def figures(outputs: list[GenerationOutput]) -> dict:
    """Of some answers together; ``fewest``: the tokens a forward of the slowest one."""
    stats = [output.stats for output in outputs if output.stats is not None]
    totals = Totals.of(outputs)
    return {
        "tokens_per_forward": round(totals.tokens_per_forward, 3),
        "p_cache": round(totals.p_cache, 3),
        "fewest": round(min(one.tokens_per_forward for one in stats), 3),
        "mean_tokens": totals.num_tokens / len(stats),
    }


def run(llm: LLM, options: dict, arguments: argparse.Namespace) -> dict:
    params = SamplingParams(max_tokens=arguments.max_tokens, **options)
    prompts = chat_prompts(arguments.of_each_kind)
    asked = [[{"role": "user", "content": text}] for text in (*(text for _, text in prompts), COUNTING)]
    *outputs, counted = llm.chat(asked, params)
    by_kind: dict[str, list[GenerationOutput]] = {}
    for (kind, _), output in zip(prompts, outputs, strict=True):
        by_kind.setdefault(kind, []).append(output)
    return {
        "options": options,
        "chat": {"all": figures(outputs)} | {kind: figures(some) for kind, some in by_kind.items()},
        "counting": figures([counted])
        | {"right": [int(number) for number in re.findall(r"\d+", counted.text)] == list(range(1, 101))},
        "texts": [output.text for output in (*outputs, counted)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--next-token", nargs="+", default=["masked", "causal"])
    parser.add_argument("--window", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--threshold", type=float, nargs="+", default=[0.4], help="nats")
    parser.add_argument("--of-each-kind", type=int, default=4, help="chats of each of five kinds, four at most")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    llm = LLM(model=arguments.model, device=arguments.device, quantization=arguments.quantization)
    grid = itertools.product(arguments.next_token, arguments.window, arguments.threshold)
    names = ("wedlm_next_token", "wedlm_window_size", "wedlm_entropy_threshold")
    streaming = [{"decoding": "streaming", **dict(zip(names, one, strict=True))} for one in grid]
    report = {
        "model": Path(arguments.model).name,
        "engine": llm.describe(),
        "torch": torch.__version__,
        "max_tokens": arguments.max_tokens,
        "runs": [run(llm, options, arguments) for options in ({"decoding": "autoregressive"}, *streaming)],
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    short = [{name: value for name, value in one.items() if name != "texts"} for one in report["runs"]]
    print(json.dumps({**report, "runs": short}))


if __name__ == "__main__":
    main()
