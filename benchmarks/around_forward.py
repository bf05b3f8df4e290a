# SPDX-License-Identifier: Apache-2.0
"""What a step on a CPU takes outside its forward: the native step, and plain operations around the same forward.

    python benchmarks/around_forward.py --threads 2

Both ways run the same windows of the embedded model in turns, in one process. Last line: JSON.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch

from wedlm import LLM, SamplingParams
from wedlm.engine.execution.native_step import NativeStep
from wedlm.machine import cpu_name
from wedlm.native import describe

CASES: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("AR", 1, {"decoding": "autoregressive"}),
    ("AR, temperature 1", 1, {"decoding": "autoregressive", "temperature": 1.0, "seed": 1}),
    ("verified, 16 rows", 1, {"decoding": "verified", "wedlm_draft_entropy": 1e9, "wedlm_window_size": 16}),
    ("auto", 1, {"decoding": "auto"}),
    ("streaming, W = 4", 1, {"decoding": "streaming", "wedlm_window_size": 4}),
    ("log-probabilities", 1, {"decoding": "autoregressive", "logprobs": 5}),
    ("AR", 4, {"decoding": "autoregressive"}),
    ("AR", 16, {"decoding": "autoregressive"}),
)


class Timed:
    """A model whose calls are timed."""

    def __init__(self, model: Any) -> None:
        self.model, self.seconds = model, 0.0

    def __call__(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        logits = self.model(*arguments)
        self.seconds = time.perf_counter() - start
        return logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20, help="of each way in a turn")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    llm = LLM("demo", device="cpu", quantization="int8", max_model_len=1024)
    engine = llm.engine
    native, eager = engine.runner.executors
    assert isinstance(native, NativeStep)
    timed: Any = Timed(engine.runner.eager.model)
    engine.runner.eager.model = timed
    prompt = (llm.tokenizer.encode("The history of mathematics is long. ") * 64)[:256]
    print("| step | batch | native: outside, ms (least) | its step | plain: outside, ms (least) | its step |")
    print("| --- | --- | --- | --- | --- | --- |")
    results = []
    for name, batch, asked in CASES:
        params = SamplingParams(max_tokens=700, ignore_eos=True, **asked)
        requests = [engine.add(f"{name}-{batch}-{i}", prompt, params) for i in range(batch)]
        while any(request.num_output_tokens == 0 for request in requests):
            engine.step()
        steps: dict[str, list[float]] = {"native": [], "plain": []}
        outside: dict[str, list[float]] = {"native": [], "plain": []}
        for _ in range(args.turns):
            for way, executor in (("native", native), ("plain", eager)):
                engine.runner._direct = [executor]
                for step in range(args.steps):
                    start = time.perf_counter()
                    engine.step()
                    took = time.perf_counter() - start
                    if step > 1:  # the first find cold caches
                        forward = native.decoder.forward_s if way == "native" else timed.seconds
                        steps[way].append(1e3 * took)
                        outside[way].append(1e3 * (took - forward))
        for request in requests:
            engine.abort(request.request_id)
        cells = [
            f"{statistics.median(outside[way]):.2f} ({min(outside[way]):.2f}) | {statistics.median(steps[way]):.2f}"
            for way in ("native", "plain")
        ]
        print(f"| {name} | {batch} | {' | '.join(cells)} |", flush=True)
        figures = {f"{way}_outside_ms": round(statistics.median(outside[way]), 4) for way in outside}
        least = {f"{way}_outside_least_ms": round(min(outside[way]), 4) for way in outside}
        results.append({"case": name, "batch": batch, **figures, **least})
    record = {"benchmark": "around_forward", "cpu": cpu_name(), "threads": args.threads, "torch": torch.__version__}
    print(json.dumps({**record, "native": describe(), "results": results}))


if __name__ == "__main__":
    main()
