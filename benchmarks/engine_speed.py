# SPDX-License-Identifier: Apache-2.0
"""The engine's loop on random weights of a common shape: step times, and tokens a second with drafts accepted at will.

    python benchmarks/engine_speed.py OUT.json [--shape 8b|tiny] [--parts steps,auto,pairs,contexts,prefill]

Every figure is measured from result to result in the loop that serves requests; tokens a second are never a step time
divided by tokens assumed. "Accepted at rates r" replaces, inside the captured step, AR's choice after each draft by the
draft itself with the chance r of its depth: everything else of the step, its cost included, is as it is.
benchmarks/vllm_speed.py measures vLLM's AR on the same shape.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch

from wedlm.engine import device_step
from wedlm.engine.auto import expected_step
from wedlm.engine.build import build_engine
from wedlm.engine.engine import Engine, EngineConfig
from wedlm.engine.sampling_params import SamplingParams
from wedlm.model import ModelConfig, Transformer, pack_for_inference
from wedlm.model.rope import inverse_frequencies

MASK = 3
COMMON = {"model_type": "qwen3", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu"}
SHAPES = {
    "8b": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1200, "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
# Accepted share of drafts by depth, given their predecessors: the embedded checkpoint on its own GSM8K text
# (docs/log.md, 2026-11-22: chains .78/.56/.36).
EMBEDDED = (0.78, 0.72, 0.64)
NEVER, ALWAYS = (0.0,), (1.0,)


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Random weights of the shape, packed, made on the device."""
    config = ModelConfig.from_hf({**COMMON, **SHAPES[shape]})
    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(dtype).to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
    model.model.rotary.inv_freq = inverse_frequencies(config)[0].to(device)
    return pack_for_inference(model)


def accept_at(rates: tuple[float, ...], device: torch.device) -> None:
    """From now on captured steps accept drafts at these rates by depth (the last one holds for all deeper ones)."""
    chance = torch.tensor(rates, device=device)

    def advance(state, params, index, rows, choice, entropy, logprobs):  # type: ignore[no-untyped-def]
        following = rows.tokens.roll(-1)
        drafted = (rows.sequence.roll(-1) == rows.sequence) & (following != MASK) & (rows.tokens != MASK)
        depth = torch.arange(len(choice), device=device) - rows.row_start[rows.sequence]
        accepted = torch.rand(len(choice), device=device) < chance[depth.clamp(0, len(chance) - 1)]
        forced = torch.where(accepted, following, (following + 1) % 1000 + 10)
        return _advance(state, params, index, rows, torch.where(drafted, forced, choice), entropy, logprobs)

    device_step.verified_advance = advance


_advance = device_step.verified_advance


class Bench:
    """One engine; ``measure`` runs a number of requests together and reads the clock between steps."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        self.engine, self.rng, self._count = engine, random.Random(seed), 0

    def start(self, num_windows: int, params: SamplingParams, prompt: int) -> list:
        """Requests after their prompts."""
        vocab = self.engine.config.vocab_size
        requests = []
        for _ in range(num_windows):
            ids = [self.rng.randrange(10, vocab) for _ in range(prompt)]
            requests.append(self.engine.add(f"r{self._count}", ids, params))
            self._count += 1
        while any(request.num_output_tokens == 0 for request in requests):
            self.engine.step()
        return requests

    def steps(self, requests: list, num_steps: int) -> dict:
        """Run so many steps."""
        tokens, rows = (sum(getattr(r, n) for r in requests) for n in ("num_output_tokens", "num_rows"))
        times = []
        start = time.perf_counter()
        for _ in range(num_steps):
            before = time.perf_counter()
            self.engine.step()
            times.append(time.perf_counter() - before)
        seconds = time.perf_counter() - start
        assert all(request.finish_reason is None for request in requests), "the requests are too short"
        tokens = sum(r.num_output_tokens for r in requests) - tokens
        rows = sum(r.num_rows for r in requests) - rows
        ordered = sorted(times)
        return {
            "median_ms": round(1e3 * statistics.median(times), 3),
            "p95_ms": round(1e3 * ordered[int(0.95 * (len(ordered) - 1))], 3),
            "tokens_per_second": round(tokens / seconds, 1),
            "tokens_per_step": round(tokens / num_steps / len(requests), 3),
            "rows_per_step": round(rows / num_steps / len(requests), 2),
        }

    def end(self, requests: list) -> None:
        for request in requests:
            self.engine.abort(request.request_id)

    def measure(self, num_windows: int, params: SamplingParams, prompt: int, warm: int, num_steps: int) -> dict:
        requests = self.start(num_windows, params, prompt)
        self.steps(requests, warm)
        found = self.steps(requests, num_steps)
        self.end(requests)
        return {"batch": num_windows, "prompt": prompt, **found}


def sampling(decoding: str, **options) -> SamplingParams:  # type: ignore[no-untyped-def]
    return SamplingParams(decoding=decoding, max_tokens=3000, ignore_eos=True, **options)


ALL_ROWS = {"wedlm_draft_entropy": 1e9}  # drafts however unsure: every row that the budget has
ALL_MASKS = {"wedlm_entropy_threshold": 1e9, "wedlm_window_size": 8}  # 16 rows: every mask is filled in each step


def steps(bench: Bench, prompt: int, small: bool) -> list[dict]:
    """Step times by batch and rows."""
    cases = [
        *((b, "autoregressive", {}) for b in (1, 8, 32, 64, 128)),
        *((b, "verified", ALL_ROWS) for b in (1, 8, 32)),
        *((b, "streaming", ALL_MASKS) for b in (1, 8, 32)),
        (32, "verified", {**ALL_ROWS, "wedlm_window_size": 8}),
        (128, "verified", {**ALL_ROWS, "wedlm_window_size": 4}),
    ]
    found = []
    for batch, decoding, options in cases[: 3 if small else None]:
        figures = bench.measure(batch, sampling(decoding, **options), prompt, 5, 60)
        found.append({"decoding": decoding, "row_budget": options.get("wedlm_window_size", 16), **figures})
        print(json.dumps(found[-1]), flush=True)
    return found


def auto(bench: Bench, prompt: int, small: bool) -> list[dict]:
    """Auto decoding beside AR, drafts accepted at rates."""
    found = []
    cases = {"embedded": EMBEDDED, "about 2 tokens": (0.62,), "about 3 tokens": (0.9,), "all drafts": ALWAYS}
    for name, rates in cases.items():
        accept_at(rates, bench.engine.runner.device)
        getattr(bench.engine.runner, "forget_graphs", lambda: None)()
        for batch in (1, 8, 32, 64, 128)[: 1 if small else None]:
            bench.engine.auto = None if bench.engine.auto is None else type(bench.engine.auto)(bench.engine.auto.costs)
            row = {"accepted": name, "rates": rates, "expected_at_16_rows": expected_step(16, rates * 3, (1.0,) * 8)[0]}
            figures = bench.measure(batch, sampling("auto", **ALL_ROWS), prompt, 80, 150)
            found.append({**row, **figures, "row_budget": bench.engine.auto.row_budget})
            print(json.dumps(found[-1]), flush=True)
    device_step.verified_advance = _advance
    getattr(bench.engine.runner, "forget_graphs", lambda: None)()
    return found


def pairs(bench: Bench, prompt: int, small: bool) -> list[dict]:
    """Auto against AR where no draft is ever accepted: what looking for drafts costs."""
    found = []
    for batch in (1, 8, 32)[: 1 if small else None]:
        warm = bench.start(batch, sampling("auto"), prompt)
        bench.steps(warm, 100)
        bench.end(warm)
        ratios = []
        for _ in range(10):
            speeds = [
                bench.measure(batch, sampling(decoding), prompt, 5, 60)["tokens_per_second"]
                for decoding in ("autoregressive", "auto")
            ]
            ratios.append(round(speeds[1] / speeds[0], 4))
        found.append({"batch": batch, "median_ratio": statistics.median(ratios), "ratios": ratios})
        print(json.dumps(found[-1]), flush=True)
    return found


def contexts(bench: Bench, prompt: int, small: bool) -> list[dict]:
    """Step time against the length of the context."""
    found = []
    for length in (512, 4096, 16384, 32000)[: 1 if small else None]:
        for decoding, options in (("autoregressive", {}), ("verified", ALL_ROWS)):
            figures = bench.measure(1, sampling(decoding, **options), length, 5, 40)
            found.append({"decoding": decoding, **figures})
            print(json.dumps(found[-1]), flush=True)
    return found


def prefill(bench: Bench, prompt: int, small: bool) -> list[dict]:
    """Tokens a second of a prompt of 8,192, first token included; the second run of three is warm."""
    length, times = 64 if small else 8192, []
    for _ in range(4):
        start = time.perf_counter()
        bench.end(bench.start(1, sampling("autoregressive"), length))
        times.append(time.perf_counter() - start)
    found = {"prompt": length, "seconds": [round(t, 4) for t in times[1:]]}
    found["tokens_per_second"] = round(length / statistics.median(times[1:]))
    print(json.dumps(found), flush=True)
    return [found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--parts", default="steps,auto,pairs,contexts,prefill")
    parser.add_argument("--prompt", type=int, default=512)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = device.type == "cpu"
    model = random_model(args.shape, device, torch.float32 if small else torch.bfloat16)
    config = EngineConfig(
        vocab_size=model.config.vocab_size,
        mask_token_id=MASK,
        end_token_ids=(2,),
        max_model_len=model.config.max_length,
        max_num_seqs=128,
        max_num_batched_tokens=8192,
    )
    engine = build_engine(model, config, None, kv_cache_bytes=2**24 if small else 45 * 10**9)
    results: dict = {
        "shape": args.shape,
        "device": torch.cuda.get_device_name() if not small else "cpu",
        "torch": torch.__version__,
        "dtype": "float32" if small else "bfloat16",
        "prompt": args.prompt,
        "runner": type(engine.runner).__name__,
    }
    for part in args.parts.split(","):
        results[part] = {"steps": steps, "auto": auto, "pairs": pairs, "contexts": contexts, "prefill": prefill}[part](
            Bench(engine), args.prompt, small
        )
        if part == "auto" and engine.auto is not None:
            costs = engine.auto.costs
            results["costs_ms"] = {r: round(1e3 * s, 3) for r, s in zip(costs._rows, costs._seconds, strict=True)}
        args.out.write_text(json.dumps(results, indent=1))
    print(json.dumps({part: len(results[part]) for part in args.parts.split(",")}))


if __name__ == "__main__":
    main()
