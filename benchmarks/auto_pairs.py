# SPDX-License-Identifier: Apache-2.0
"""Auto decoding against AR, interleaved pairs on one stream: what looking for drafts costs, and what they bring.

    python benchmarks/auto_pairs.py MODEL [--pairs 10] [--tokens 96] [--device cpu]

Prints the ratio of tokens a second of each pair and their median; the last line is JSON.
"""

import argparse
import json
import statistics
import time

from wedlm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompt", default="Tell me about the sea, its animals and its ships.")
    arguments = parser.parse_args()
    llm = LLM(arguments.model, device=arguments.device)
    prompt = llm.chat_prompt([{"role": "user", "content": arguments.prompt}])

    def speed(decoding: str) -> float:
        params = SamplingParams(decoding=decoding, max_tokens=arguments.tokens, ignore_eos=True)
        start = time.perf_counter()
        llm.generate([prompt], params, progress=False)
        return arguments.tokens / (time.perf_counter() - start)

    for mode in ("autoregressive", "auto"):
        speed(mode)
    ratios = []
    for pair in range(arguments.pairs):
        order = ("autoregressive", "auto") if pair % 2 else ("auto", "autoregressive")
        found = {mode: speed(mode) for mode in order}
        ratios.append(round(found["auto"] / found["autoregressive"], 3))
    print(json.dumps({"model": arguments.model, "median_ratio": statistics.median(ratios), "ratios": ratios}))


if __name__ == "__main__":
    main()
