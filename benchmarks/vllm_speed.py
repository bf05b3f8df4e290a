# SPDX-License-Identifier: Apache-2.0
"""vLLM's AR decoding on random weights of the shapes of engine_speed.py: step time, tokens a second, prefill.

    python benchmarks/vllm_speed.py OUT.json [--shape 8b]

A step's time is the difference of two runs that differ in output length alone, divided by the difference. vLLM makes
the random weights itself (load_format="dummy"): the time of a step does not depend on their values.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from vllm import LLM, SamplingParams

from benchmarks.engine_speed import COMMON, SHAPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--prompt", type=int, default=512)
    args = parser.parse_args()
    values = {**COMMON, **SHAPES[args.shape], "architectures": ["Qwen3ForCausalLM"], "torch_dtype": "bfloat16"}
    values |= {"attention_bias": False, "bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 40960}
    directory = Path(tempfile.mkdtemp())
    (directory / "config.json").write_text(json.dumps(values))
    llm = LLM(
        model=str(directory), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=10240,
        gpu_memory_utilization=0.6, max_num_seqs=128, max_num_batched_tokens=8192, enable_prefix_caching=False,
    )  # fmt: skip
    rng = random.Random(0)

    def run(batch: int, prompt: int, num_tokens: int) -> float:
        prompts = [{"prompt_token_ids": [rng.randrange(10, 1000) for _ in range(prompt)]} for _ in range(batch)]
        params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - start

    results: dict = {"vllm": __import__("vllm").__version__, "torch": torch.__version__, "shape": args.shape}
    results |= {"device": torch.cuda.get_device_name(), "dtype": "bfloat16", "prompt": args.prompt, "steps": []}
    for batch in (1, 8, 32, 64, 128):
        run(batch, args.prompt, 8)
        times = [(run(batch, args.prompt, 160) - run(batch, args.prompt, 32)) / 128 for _ in range(3)]
        step = statistics.median(times)
        row = {"batch": batch, "median_ms": round(1e3 * step, 3), "tokens_per_second": round(batch / step, 1)}
        results["steps"].append({**row, "runs_ms": [round(1e3 * t, 3) for t in times]})
        print(json.dumps(results["steps"][-1]), flush=True)
    seconds = [run(1, 8192, 1) for _ in range(4)][1:]
    results["prefill"] = {"prompt": 8192, "tokens_per_second": round(8192 / statistics.median(seconds))}
    args.out.write_text(json.dumps(results, indent=1))
    print(json.dumps(results["prefill"]))


if __name__ == "__main__":
    main()
