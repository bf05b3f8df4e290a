# SPDX-License-Identifier: Apache-2.0
"""What a step costs by the number of adapters whose requests share it, against the base's; last line JSON.

    python benchmarks/adapters.py demo --quantization int8 --threads 2 --out adapters.json

Random LoRAs of all the layers' matrices, as many loaded as are used. ``--batch`` requests decode one token a step (AR);
adapters go around among them, so that neighbours differ. All numbers take turns within every repetition, and ratios are
of the same repetition. ``masked``: verified decoding with 16 rows a request, and adapters of masked rows.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from wedlm import LLM, SamplingParams
from wedlm.bench.record import hardware, versions
from wedlm.model.lora.row_factors import Matrices, RowFactors

_PROMPT, _WARM = 64, 3


def random_factors(llm: LLM, rank: int, masked: bool) -> RowFactors:
    config = llm.model_config
    inner, hidden = config.intermediate_size, config.hidden_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sizes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    matrices: Matrices = {
        f"model.layers.{layer}.{name}.weight": (torch.randn(rank, size[1]) / 100, torch.randn(size[0], rank) / 100)
        for layer in range(config.num_layers)
        for name, size in sizes.items()
    }
    return RowFactors({}, matrices, torch.randn(hidden)) if masked else RowFactors(matrices)


def step_ms(llm: LLM, adapters: list[str | None], params: SamplingParams, steps: int) -> float:
    """Median of ``steps`` steps of requests with these adapters, none of which ends meanwhile."""
    engine, prompt = llm.engine, torch.randint(0, 40_000, (_PROMPT,)).tolist()
    names = [f"{i}" for i in range(len(adapters))]
    for i, (name, adapter) in enumerate(zip(names, adapters, strict=True)):
        engine.add(name, [*prompt, i], params, adapter=adapter)
    while any(not request.num_output_tokens for request in engine.requests.values()):
        engine.step()
    found = []
    for step in range(_WARM + steps):
        start = time.perf_counter()
        engine.step()
        if step >= _WARM:
            found.append((time.perf_counter() - start) * 1e3)
    assert len(engine.requests) == len(adapters)
    for name in names:
        engine.abort(name)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--quantization", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--masked", action="store_true")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    most = max(args.adapters)
    options = {"quantization": args.quantization, "dtype": args.dtype, "device": args.device}
    llm = LLM(args.model, max_num_seqs=max(args.batch), max_adapters=most, kv_cache_bytes=2**29, **options)
    factors = [llm.engine.adapters.prepare(random_factors(llm, args.rank, args.masked)) for _ in range(most)]
    decoding = "verified" if args.masked else "autoregressive"
    params = SamplingParams(
        temperature=0.0, max_tokens=500, ignore_eos=True, decoding=decoding, wedlm_window_size=16,
        wedlm_lookup_drafts=0, wedlm_draft_entropy=1e9 if args.masked else 0.4,
    )  # fmt: skip
    print(llm.describe())
    rows = []
    for batch in args.batch:
        times: dict[int, list[float]] = {}
        for _ in range(args.repetitions):
            for count in (0, *(one for one in args.adapters if one <= batch)):
                for i in range(count):
                    llm.engine.load_adapter(f"a{i}", factors[i])
                names = [f"a{i % count}" if count else None for i in range(batch)]
                times.setdefault(count, []).append(step_ms(llm, names, params, args.steps))
                for i in range(count):
                    llm.unload_adapter(f"a{i}")
        for count, found in times.items():
            ratios = [own / base for own, base in zip(found, times[0], strict=True)]
            row = {"batch": batch, "adapters": count, "step_ms": round(statistics.median(found), 3)}
            row |= {"ratio": round(statistics.median(ratios), 3), "spread": [round(f(ratios), 3) for f in (min, max)]}
            rows.append(row)
            print(f"batch {batch:3}  adapters {count}  {row['step_ms']:9.3f} ms  x {row['ratio']:.3f}  {row['spread']}")
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    report = {"benchmark": "adapters", "engine": llm.describe(), "hardware": hardware(llm.device)}
    report |= {"versions": versions(), "settings": settings, "rows": rows}
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
