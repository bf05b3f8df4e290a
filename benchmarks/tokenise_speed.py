# SPDX-License-Identifier: Apache-2.0
"""Training data to tokens: samples one after the other against all of them on all cores.

    python benchmarks/tokenise_speed.py demo-base --data chats.jsonl texts.jsonl.xz --samples 2000 300

Both make the same documents, which is checked. Of each: median seconds of the clock and of the processor over the runs,
which alternate. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np

from wedlm.model import load_tokenizer
from wedlm.train.encode import EncodedSample, encode_batch, encode_documents
from wedlm.train.sources import in_batches, read_samples
from wedlm.train.token_cache import BATCH_CHARACTERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="whose tokenizer")
    parser.add_argument("--data", nargs="+", required=True, help="files that `wedlm train` reads")
    parser.add_argument("--samples", type=int, nargs="+", help="of each file, its first ones; default: all")
    parser.add_argument("--eos-token-id", type=int, default=2)
    parser.add_argument("--batch-characters", type=int, default=BATCH_CHARACTERS)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()

    tokenizer = load_tokenizer(arguments.model)
    counts = arguments.samples or [None] * len(arguments.data)
    files = zip(arguments.data, counts, strict=True)
    samples = list(chain.from_iterable(islice(read_samples(path, skip_bad=True), count) for path, count in files))

    def alone() -> Iterator[EncodedSample]:
        for sample in samples:
            yield from encode_documents(sample, tokenizer, eos_token_id=arguments.eos_token_id)

    def batched() -> Iterator[EncodedSample]:
        for batch in in_batches(samples, arguments.batch_characters):
            for documents in encode_batch(batch, tokenizer, eos_token_id=arguments.eos_token_id):
                if isinstance(documents, ValueError):
                    raise documents
                yield from documents

    num_tokens = 0
    for one, other in zip(alone(), batched(), strict=True):  # and warms both up
        assert np.array_equal(one.tokens, other.tokens)
        assert np.array_equal(one.trainable, other.trainable)
        num_tokens += len(one.tokens)
    report = {
        **vars(arguments),
        "cores": len(os.sched_getaffinity(0)),
        "num_samples": len(samples),
        "tokens": num_tokens,
        **measure({"alone": alone, "batched": batched}, arguments.runs),
    }
    print(json.dumps(report))


def measure(encoders: dict[str, Callable[[], Iterator[EncodedSample]]], num_runs: int) -> dict[str, Any]:
    """Wall and CPU seconds of each, taking turns: the median and the range."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in encoders}
    for _ in range(num_runs):
        for name, encode in encoders.items():
            began = time.perf_counter(), time.process_time()
            for _ in encode():
                pass
            seconds[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    figures: dict[str, Any] = {}
    for name, runs in seconds.items():
        for kind, values in zip(("wall", "cpu"), zip(*runs, strict=True), strict=True):
            figures[f"{name}_{kind}_s"] = round(statistics.median(values), 3)
            figures[f"{name}_{kind}_s_range"] = [round(min(values), 3), round(max(values), 3)]
    return figures


if __name__ == "__main__":
    main()
