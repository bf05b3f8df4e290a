# SPDX-License-Identifier: Apache-2.0
"""GSM8K, zero-shot chat, temperature 0: accuracy, tokens a forward and agreement of text, mode by mode.

    python benchmarks/gsm8k.py MODEL --data gsm8k_test.jsonl.gz --decoding autoregressive verified --out result.json

Prints and saves one JSON object; answers are scored as `wedlm eval` scores them. ``--out`` also keeps every text.
"""

import argparse
import gzip
import json
import time
from pathlib import Path

import torch

from wedlm import LLM, SamplingParams
from wedlm.engine.outputs import Totals
from wedlm.evaluate.divergence import first_difference
from wedlm.evaluate.final_number import same_number


def agreeing(one: list[int], other: list[int]) -> int:
    """Tokens up to the first that differs, that one included; all of them if none does."""
    at = first_difference(one, other)
    return len(one) if at is None else at + 1


def run_mode(
    llm: LLM, questions: list[str], answers: list[str], mode: str, window: int, arguments: argparse.Namespace
) -> dict:
    options: dict = {}
    if mode == "streaming":
        options["wedlm_entropy_threshold"] = arguments.threshold
        options["wedlm_pos_penalty_factor"] = arguments.pos_penalty
        options["wedlm_next_token"] = arguments.next_token
    if mode in ("verified", "auto"):
        options["wedlm_draft_entropy"] = arguments.draft_entropy
    if mode != "autoregressive":
        options["wedlm_window_size"] = window
    params = SamplingParams(temperature=0.0, max_tokens=arguments.max_tokens, decoding=mode, **options)
    asked = [[{"role": "user", "content": question}] for question in questions]
    if arguments.warm:
        llm.chat(asked[: arguments.warm], params)
        llm.engine.pool.reset_prefix_cache()
    began = time.perf_counter()
    outputs = llm.chat(asked, params)
    seconds = time.perf_counter() - began
    totals = Totals.of(outputs)
    right = sum(same_number(output["text"], answer) for output, answer in zip(outputs, answers, strict=True))
    return {
        "mode": mode,
        "settings": options,
        "accuracy": right / len(questions),
        "tokens_per_forward": totals.tokens_per_forward,
        "p_cache": totals.p_cache,
        "mean_tokens": sum(len(output["token_ids"]) for output in outputs) / len(outputs),
        "cut_by_length": sum(output["finish_reason"] == "length" for output in outputs),
        "seconds": seconds,
        "tokens_per_second": totals.num_tokens / seconds,
        "texts": [output["text"] for output in outputs],
        "token_ids": [output["token_ids"] for output in outputs],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--adapter", help="directory of a LoRA")
    parser.add_argument("--data", required=True)
    parser.add_argument("--decoding", nargs="+", default=["autoregressive", "verified", "streaming"])
    parser.add_argument("--limit", type=int, default=0, help="only the first N questions")
    parser.add_argument("--rows", type=int, default=16, help="verified: rows a step")
    parser.add_argument("--draft-entropy", type=float, default=2.5, help="verified: nats")
    parser.add_argument("--streaming-window", type=int, nargs="+", default=[16], help="streaming: one run for each")
    parser.add_argument("--threshold", type=float, default=0.4, help="streaming: entropy threshold in nats")
    parser.add_argument("--pos-penalty", type=float, default=0.02, help="streaming: nats a position")
    parser.add_argument("--next-token", help="streaming: masked or causal; default: the model's")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--warm", type=int, default=0, help="first answer so many of the questions, unread and untimed")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantization", help="int8 on a CPU, fp8 on a GPU")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--kv-cache-gb", type=float, default=0.0, help="0: the engine decides")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    with gzip.open(arguments.data, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][: arguments.limit or None]
    questions = [row["question"] for row in rows]
    answers = [row["answer"] for row in rows]
    most_rows = max(arguments.rows, *arguments.streaming_window)
    llm = LLM(
        model=arguments.model,
        adapter=arguments.adapter,
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        deterministic=arguments.deterministic,
        kv_cache_dtype=arguments.kv_cache_dtype,
        device=arguments.device,
        max_num_seqs=arguments.max_num_seqs,
        kv_cache_bytes=int(arguments.kv_cache_gb * 1e9) or None,
        max_num_batched_tokens=max(8192, 2 * most_rows * arguments.max_num_seqs),
    )
    report = {
        "model": str(Path(*Path(arguments.model).parts[-2:])),
        "adapter": arguments.adapter,
        "questions": len(questions),
        "dtype": arguments.dtype,
        "quantization": arguments.quantization,
        "deterministic": arguments.deterministic,
        "kv_cache_dtype": arguments.kv_cache_dtype,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if llm.device.type == "cuda" else "cpu",
        "max_tokens": arguments.max_tokens,
        "modes": [],
    }
    windows = {"streaming": arguments.streaming_window}
    runs = [(mode, window) for mode in arguments.decoding for window in windows.get(mode, [arguments.rows])]
    for mode, window in runs:
        result = run_mode(llm, questions, answers, mode, window, arguments)
        report["modes"].append(result)
        if mode == "autoregressive":
            baseline = result["token_ids"]
        if report["modes"][0]["mode"] == "autoregressive":
            result["same_text_as_ar"] = sum(a == b for a, b in zip(baseline, result["token_ids"], strict=True))
            result["tokens_to_first_difference"] = sum(map(agreeing, baseline, result["token_ids"]))
        shown = {key: value for key, value in result.items() if key not in ("texts", "token_ids")}
        print(json.dumps(shown), flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
