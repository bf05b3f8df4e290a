# SPDX-License-Identifier: Apache-2.0
"""FP8 on a GPU: products alone, whole steps, `auto`, and what it does to a model's predictions; writes DIR/fp8.json.

python3 benchmarks/fp8_step.py --out DIR [--model CHECKPOINT --text wikitext2_test.txt.gz]

Each part stands alone: one that fails leaves its error in the file. The file is rewritten after each part.
"""

import argparse
import gc
import gzip
import itertools
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from wedlm.attention.sdpa import CausalAttend
from wedlm.bench.forced_acceptance import injected
from wedlm.bench.loop import Loop
from wedlm.bench.record import hardware, versions
from wedlm.bench.settings import Settings, Workload
from wedlm.bench.shapes import shape_config
from wedlm.bench.target import load_target
from wedlm.engine import factory
from wedlm.engine.adaptive.controller import Controller
from wedlm.engine.adaptive.draft_budget import ROW_BUDGETS, Budget, DraftBudget
from wedlm.engine.adaptive.fixed_rows import FixedRows
from wedlm.engine.engine import Engine
from wedlm.engine.execution.captured_step import CapturedStep
from wedlm.engine.sampling_params import SamplingParams
from wedlm.kernels.fp8 import FP8, Fp8Rows, quantize_rows
from wedlm.kernels.matmul import Tiling, few_rows_product, fixed_tiling, tiling_for
from wedlm.model import ModelConfig, load_model, load_tokenizer, pack_for_inference
from wedlm.model.inference import quantization, triton_transformer
from wedlm.model.inference.quantization import Fp8Linear, quantize

RATES = (0.748, 0.795, 0.725)  # drafts accepted by depth: the embedded checkpoint's on GSM8K
ROWS = (1, 16, 64, 128, 256, 2048)
OWN_ROWS = 256  # our kernel is not tried beyond


class Run:
    """What all parts share: the device, the clock, the file."""

    def __init__(self, out: Path, shape: str, seconds: float) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.shape, self.config = shape, shape_config(shape)
        self.out, self.start, self.seconds = out, time.perf_counter(), seconds
        self.rows = ROWS if self.device.type == "cuda" else ROWS[:1]
        self.best: dict[tuple[int, int], Tiling] = {}  # by (N, K), once measured
        self.model: str | None = None
        self.text: Path | None = None
        self.num_tokens = 0
        self.values: dict[str, Any] = {"shape": shape, "versions": versions(), "hardware": hardware(self.device)}

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (time.perf_counter() - self.start)

    def part(self, name: str, measure: Callable[["Run"], Any], least_s: float) -> None:
        """Run one, unless there is less time than it needs; keep what it found before it failed."""
        start = time.perf_counter()
        found: dict[str, Any] = {}
        self.values[name] = found
        if self.left < least_s:
            found["skipped"] = f"{self.left:.0f} s left"
        else:
            try:
                measure(self)
            except Exception as error:  # the other parts must run
                found["error"] = f"{type(error).__name__}: {error}"
                found["traceback"] = traceback.format_exc()[-3000:]
        found["seconds"] = round(time.perf_counter() - start, 1)
        factory.release_memory()
        self.write()
        print(json.dumps({name: found}), flush=True)

    def write(self) -> None:
        self.values["seconds"] = round(time.perf_counter() - self.start, 1)
        (self.out / "fp8.json").write_text(json.dumps(self.values, indent=1) + "\n")

    def milliseconds(self, work: Callable[[], Any], replays: int = 7) -> float:
        """Of ``work`` as a CUDA graph: the median of single replays. (On a CPU: of one call.)"""
        if self.device.type != "cuda":
            start = time.perf_counter()
            work()
            return round(1e3 * (time.perf_counter() - start), 4)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        graph.replay()
        times = []
        for _ in range(replays):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return round(statistics.median(times), 4)


def sizes_of(config: ModelConfig) -> list[tuple[int, int]]:
    """(N, K) of a layer's four products."""
    heads, kv, d = config.num_heads, config.num_kv_heads, config.head_dim
    hidden, inner = config.hidden_size, config.intermediate_size
    return [((heads + 2 * kv) * d, hidden), (hidden, heads * d), (2 * inner, hidden), (hidden, inner)]


class Weights:
    """All layers' weights of the shape, in e4m3 and, where asked for, in bfloat16; random."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.sizes = [size for _ in range(run.config.num_layers) for size in sizes_of(run.config)]
        self.layers = [Fp8Linear(self.random(*size) * 0.02, None) for size in self.sizes]
        self.bf16: list[Tensor] = []

    def random(self, *size: int) -> Tensor:
        return torch.randn(size, device=self.run.device, dtype=torch.bfloat16)

    def inputs(self, num_rows: int) -> dict[int, Tensor]:
        """By K."""
        return {depth: self.random(num_rows, depth) for depth in {depth for _, depth in self.sizes}}


def exactness(run: Run) -> None:
    """The kernels against float32; and whether a row's result is the same, bit for bit, at any number of rows."""
    found = run.values["exactness"]
    torch.manual_seed(0)
    for size, depth in sizes_of(run.config):
        layer = Fp8Linear(torch.randn(size, depth, device=run.device, dtype=torch.bfloat16) * 0.02, None)
        x = torch.randn(300, depth, device=run.device, dtype=torch.bfloat16)
        rows, (values, scale) = quantize_rows(x), quantize(x)
        name = f"{size}x{depth}"
        entry: dict[str, Any] = {"rows_rounded_alike": bool(torch.equal(rows.values.float(), values.float()))}
        entry["scales_alike"] = bool(torch.equal(rows.scale, scale))
        exact = (values.double() @ layer.weight.double().T) * scale[:, None] * layer.scale
        plain = x.double() @ (layer.weight.double() * layer.scale[:, None]).T
        entry["rounding_the_inputs"] = error_of(exact, plain)
        for fast in (False, True):
            name_of = f"library_{'fast' if fast else 'precise'}"
            with fast_accum(fast):
                outs = {n: layer.unscaled(values[:n].contiguous(), torch.bfloat16) for n in (1, 16, 33, 64, 128, 300)}
            entry[name_of] = error_of(outs[300].double() * scale[:, None] * layer.scale, exact)
            entry[f"{name_of}_same_first_row"] = same_first_row(outs)
        tiling = tiling_for(size, depth, FP8)
        outs = {}
        for n in (1, 16, 33, 64, 128):
            some = Fp8Rows(rows.values[:n].contiguous(), rows.scale[:n].contiguous())
            out = few_rows_product(some, layer.weight, tiling, scale=layer.scale, dtype=torch.bfloat16)
            outs[n] = out.sum(0) if out.ndim == 3 else out
        entry["ours"] = error_of(outs[128].double(), exact[:128])
        entry["ours_same_first_row"] = same_first_row(outs)
        found[name] = entry


def error_of(actual: Tensor, expected: Tensor) -> float:
    """‖difference‖ / ‖expected‖"""
    return float((actual - expected).norm() / expected.norm())


def same_first_row(outs: dict[int, Tensor]) -> dict[int, bool]:
    """By number of rows: whether the first row equals that of a single row."""
    return {n: bool(torch.equal(out[0], outs[1][0])) for n, out in outs.items()}


@contextmanager
def fast_accum(fast: bool) -> Iterator[None]:
    before, quantization.USE_FAST_ACCUM = quantization.USE_FAST_ACCUM, fast
    try:
        yield
    finally:
        quantization.USE_FAST_ACCUM = before


def row_scaled(rows: Fp8Rows, layer: Fp8Linear) -> Tensor:
    """The library's product that multiplies the scales itself."""
    scales = rows.scale[:, None], layer.scale[None]
    return torch._scaled_mm(
        rows.values, layer.weight.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=quantization.USE_FAST_ACCUM
    )


def library_products(run: Run) -> None:  # noqa: C901
    """All products of the layers, inputs rounded already, ms."""
    found = run.values["library_products"]
    weights = Weights(run)
    variants: dict[str, Callable[[Fp8Rows, Fp8Linear], Tensor]] = {
        "one_scale": lambda rows, layer: layer.unscaled(rows.values, torch.bfloat16),
        "row_scales": row_scaled,
    }
    for (name, product), fast, n in itertools.product(variants.items(), (True, False), run.rows):
        inputs = {depth: quantize_rows(x) for depth, x in weights.inputs(n).items()}

        def work(product: Any = product, inputs: Any = inputs) -> None:
            for layer in weights.layers:
                product(inputs[layer.in_features], layer)

        key = f"{name}_{'fast' if fast else 'precise'}"
        with fast_accum(fast):
            try:
                found.setdefault(key, {})[n] = run.milliseconds(work)
            except RuntimeError as error:
                found.setdefault(key, {})[n] = str(error)[:300]
    for n in run.rows:
        inputs = weights.inputs(n)

        def rounding(inputs: Any = inputs) -> None:
            for layer in weights.layers:
                quantize_rows(inputs[layer.in_features])

        found.setdefault("rounding_alone", {})[n] = run.milliseconds(rounding)
    del weights.layers
    gc.collect()
    dense = [weights.random(*size) * 0.02 for size in weights.sizes]
    for n in run.rows:
        inputs = weights.inputs(n)
        for key, product in (("bfloat16_library", F.linear), ("bfloat16_ours", few_rows_bf16)):
            if key == "bfloat16_library" or n <= 64:

                def work(product: Any = product, inputs: Any = inputs) -> None:
                    for weight in dense:
                        product(inputs[weight.shape[1]], weight)

                found.setdefault(key, {})[n] = run.milliseconds(work)


def few_rows_bf16(x: Tensor, weight: Tensor) -> Tensor:
    return few_rows_product(x, weight, tiling_for(*weight.shape, weight.dtype))


def candidates(size: int) -> list[Tiling]:
    """Worth a try for N of that size."""
    if size >= 8192:
        return [Tiling(64, 256, 1, 3), Tiling(64, 256, 1, 4), Tiling(64, 128, 1, 6), Tiling(128, 128, 1, 4),
                Tiling(128, 256, 1, 3), Tiling(128, 128, 1, 5, warps=8)]  # fmt: skip
    found = [Tiling(64, 256, splits, 4) for splits in (2, 4, 8)]
    found += [Tiling(64, 128, splits, 6) for splits in (2, 4, 8)]
    return [*found, Tiling(128, 128, 4, 4), Tiling(128, 128, 8, 4)]


def our_products(run: Run) -> None:
    """Our kernel: each product's tilings at 16 rows, then all products by the best of each and by the default, ms."""
    found = run.values["our_products"]
    weights = Weights(run)
    best: dict[tuple[int, int], Tiling] = {}
    inputs = {depth: quantize_rows(x) for depth, x in weights.inputs(16).items()}
    for size in sizes_of(run.config):
        layers = [layer for layer, own in zip(weights.layers, weights.sizes, strict=True) if own == size]
        timed = {}
        for tiling in dict.fromkeys([tiling_for(*size, FP8), *candidates(size[0])]):
            try:
                timed[tiling] = run.milliseconds(partial(by_tiling, inputs, layers, partial(first, tiling)))
            except Exception as error:  # a tiling that does not fit is one of the answers
                found.setdefault("failed", {})[str(tiling)] = str(error)[:200]
        best[size] = min(timed, key=lambda tiling: timed[tiling])
        found["x".join(map(str, size))] = {str(tiling): ms for tiling, ms in timed.items()}
        run.write()
    for n in [n for n in run.rows if n <= OWN_ROWS]:
        inputs = {depth: quantize_rows(x) for depth, x in weights.inputs(n).items()}
        for key, tiling_of in (("default", lambda *of: tiling_for(*of, FP8)), ("best", lambda *of: best[of])):
            found.setdefault(key, {})[n] = run.milliseconds(partial(by_tiling, inputs, weights.layers, tiling_of))
    found["best_tilings"] = {"x".join(map(str, size)): str(tiling) for size, tiling in best.items()}
    run.best = best


def first(tiling: Tiling, *_: int) -> Tiling:
    return tiling


def by_tiling(inputs: dict[int, Fp8Rows], layers: list[Fp8Linear], tiling_of: Callable[..., Tiling]) -> None:
    for layer in layers:
        tiling = tiling_of(*layer.weight.shape)
        few_rows_product(inputs[layer.in_features], layer.weight, tiling, scale=layer.scale, dtype=torch.bfloat16)


class Engines:
    """One engine in bfloat16 and one in FP8 on the same shape, and ways to run the second."""

    def __init__(self, run: Run) -> None:
        self.run = run
        workload = Workload.of(True, True)
        self.loops: dict[str, Loop] = {}
        for name, bits in (("bfloat16", None), ("fp8", "fp8")):
            engine = {"kv_cache_bytes": int(20e9) if run.shape == "qwen3-8b" else 2**28, "quantization": bits}
            dtype = "bfloat16" if run.device.type == "cuda" else "float32"
            settings = Settings(
                ("steps",), ("autoregressive",), workload, shape=run.shape, dtype=dtype,
                engine={name: value for name, value in engine.items() if value is not None},
            )  # fmt: skip
            self.loops[name] = Loop(load_target(settings))
        self.prompts = load_prompts(run, 128)

    @contextmanager
    def fp8_as(self, max_rows: int = 64, fast: bool = False, best: bool = False, head: bool = False) -> Iterator[Loop]:
        """The FP8 engine with our kernel up to a number of rows; ``best`` takes the tilings that were fastest."""
        loop = self.loops["fp8"]
        fused: Any = loop.engine.runner.eager.model
        transformer = fused.model
        before = (triton_transformer.MAX_ROWS, fused.tiling, transformer.lm_head)
        triton_transformer.MAX_ROWS = max_rows
        if best and self.run.best:
            tilings = dict(self.run.best)
            fused.tiling = lambda n, k, dtype: tilings.get((n, k) if dtype == FP8 else None, tiling_for(n, k, dtype))
        if head:
            transformer.lm_head = Fp8Linear(transformer.lm_head.weight.detach(), None)
        forget_steps(loop.engine)
        try:
            with fast_accum(fast):
                yield loop
        finally:
            triton_transformer.MAX_ROWS, fused.tiling, transformer.lm_head = before
            forget_steps(loop.engine)


def forget_steps(engine: Engine) -> None:
    """Capture each step again when it is next needed, and time steps again when a request next asks what they cost."""
    for executor in engine.runner.executors:
        if isinstance(executor, CapturedStep):
            executor.graphs.clear()
    engine.controller = Controller(engine.config.options, engine.runner, time.perf_counter)


def load_prompts(run: Run, count: int, length: int = 512) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    length = length if run.device.type == "cuda" else 8
    shape = (count, length)
    return torch.randint(10, run.config.vocab_size, shape, generator=generator).tolist()


ALL_ROWS = {"wedlm_draft_entropy": 1e9, "wedlm_lookup_drafts": 0}  # masked rows' drafts, however unsure
VARIANTS: dict[str, dict[str, Any]] = {
    "fp8_ours_to_64_best_tilings": {"best": True},
    "fp8_library_fast": {"max_rows": 0, "fast": True},
    "fp8_ours_to_256_best_tilings": {"best": True, "max_rows": 256},
    "fp8_ours_to_64_best_tilings_head_too": {"best": True, "head": True},
    "fp8_library_precise": {"max_rows": 0},
    "fp8_ours_to_64": {},
}
_TWICE = 2  # variants that, like bfloat16, are measured again after all others
_engines: list[Engines] = []


def engines(run: Run) -> Engines:
    """Made once, for all parts that need them."""
    if not _engines:
        _engines.append(Engines(run))
    return _engines[0]


def asked(mode: Any, max_tokens: int, window: int | None = None, **options: Any) -> SamplingParams:
    return SamplingParams(
        decoding=mode, max_tokens=max_tokens, temperature=0.0, ignore_eos=True, wedlm_window_size=window, **options
    )


def steps(run: Run) -> None:
    """Milliseconds of whole steps, host included: AR by batch, and verified windows of 16 and 36 rows."""
    found = run.values["steps"]
    both = engines(run)
    on_gpu = run.device.type == "cuda"
    cases: list[tuple[str, int, int | None]] = [
        ("autoregressive", batch, None) for batch in ((1, 8, 32, 64, 128) if on_gpu else (1,))
    ]
    cases += [
        ("verified", batch, window)
        for window in ((16, 36) if on_gpu else (2,))
        for batch in ((1, 8) if on_gpu else (1,))
    ]

    def measure(key: str, loop: Loop) -> None:
        for mode, batch, window in cases:
            if "256" in key and batch * (window or 1) <= 64:
                continue  # as the variant to 64
            if run.left < 20:
                found.setdefault("cut", []).append(f"{key} {mode} {batch} {window}")
                continue
            options = {} if mode == "autoregressive" else ALL_ROWS
            params = asked(mode, 1500, window, **options)  # more than any run takes
            figures = loop.batch(both.prompts[:batch], params, 4, 50 if on_gpu else 2)
            name = f"{mode}_{window or 1}_rows_batch_{batch}"
            found.setdefault(name, {}).setdefault(key, []).append(round(figures["step_ms"], 3))
            run.write()

    for variants in (list(VARIANTS.items()), list(VARIANTS.items())[:_TWICE]):
        measure("bfloat16", both.loops["bfloat16"])
        for key, options in variants:
            with both.fp8_as(**options) as loop:
                measure(key, loop)


def kernels(run: Run) -> None:
    """Microseconds of each kernel in an AR step of one sequence."""
    found = run.values["kernels"]
    both = engines(run)
    for key, options in (
        ("fp8_ours_to_64_best_tilings", {"best": True}),
        ("fp8_library_fast", VARIANTS["fp8_library_fast"]),
    ):
        with both.fp8_as(**options) as loop:
            requests = loop.start(both.prompts[:1], asked("autoregressive", 64))
            loop.steps(requests, 4)
            try:
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                    loop.steps(requests, 5)
                    if run.device.type == "cuda":
                        torch.cuda.synchronize()
            finally:
                loop.end(requests)
        events = sorted(profile.key_averages(), key=lambda event: -event.device_time_total)
        found[key] = {
            event.key[:90]: {"per_step": event.count / 5, "us_each": round(event.device_time_total / event.count, 2)}
            for event in events[:16]
            if event.count
        }


def prefill(run: Run) -> None:
    """Tokens a second of one prompt of 8,192."""
    found = run.values["prefill"]
    both = engines(run)
    (prompt,) = load_prompts(run, 1, 8192)

    def measure(key: str, loop: Loop) -> None:
        seconds = []
        for _ in range(4):
            loop.engine.pool.reset_prefix_cache()
            start = time.perf_counter()
            loop.end(loop.start([prompt], asked("autoregressive", 8)))
            seconds.append(time.perf_counter() - start)
        found[key] = round(len(prompt) / min(seconds[1:]))

    measure("bfloat16", both.loops["bfloat16"])
    for key in ("fp8_library_precise", "fp8_library_fast"):
        with both.fp8_as(**VARIANTS[key]) as loop:
            measure(key, loop)


def auto(run: Run) -> None:
    """`auto` with drafts accepted at the embedded checkpoint's rates, by window and batch: tokens a second."""
    found = run.values["auto"]
    both = engines(run)
    on_gpu = run.device.type == "cuda"

    def measure(key: str, loop: Loop) -> None:
        engine = loop.engine
        with injected(engine) as chances:
            chances.set(RATES)
            for window, batch in ((36, 1), (16, 1), (36, 8), (16, 8), (36, 32), (16, 128)) if on_gpu else ((4, 1),):
                if run.left < 20:
                    found.setdefault("cut", []).append(f"{key} {window} {batch}")
                    continue
                prompts, params = both.prompts[:batch], asked("auto", 1500, window, **ALL_ROWS)
                requests = loop.start(prompts, params)
                costs = engine.controller.costs
                for row_budget in ROW_BUDGETS:  # capture all that it may choose
                    if row_budget <= requests[0].decode.row_budget:
                        engine.controller.draft_budget = FixedRows(costs, Budget.of(row_budget))
                        loop.steps(requests, 3)
                loop.end(requests)
                engine.controller.draft_budget = DraftBudget(costs)
                requests = loop.start(prompts, params)
                loop.steps(requests, 60 if on_gpu else 2)
                figures = loop.steps(requests, 80 if on_gpu else 2)
                loop.end(requests)
                row = {
                    name: round(figures[name], 3)
                    for name in ("tok_per_s", "step_ms", "tokens_per_step", "rows_per_step")
                }
                found.setdefault(f"window_{window}_batch_{batch}", {})[key] = row
                run.write()

    with both.fp8_as(best=True) as loop:
        measure("fp8_ours_to_64_best_tilings", loop)
    measure("bfloat16", both.loops["bfloat16"])
    with both.fp8_as(**VARIANTS["fp8_library_fast"]) as loop:
        measure("fp8_library_fast", loop)


@torch.inference_mode()
def quality(run: Run) -> None:
    """Of the model's AR head on the text, windows of 1,024: perplexity; agreement and KL with bfloat16 and float32."""
    found = run.values["quality"]
    if run.model is None or run.text is None:
        found["skipped"] = "no --model and --text"
        return
    content = run.text.read_bytes()
    text = (gzip.decompress(content) if run.text.suffix == ".gz" else content).decode()
    ids = load_tokenizer(run.model).encode(text, add_special_tokens=False)
    windows = torch.tensor(ids[: run.num_tokens]).to(run.device).split(1024)
    float32 = list(log_probs(run, windows, torch.float32, None, False))
    bf16 = list(log_probs(run, windows, torch.bfloat16, None, False))
    found["tokens"] = sum(len(window) for window in windows)
    compared: dict[str, tuple[torch.dtype, Any, bool]] = {
        "float32": (torch.float32, None, False),
        "bfloat16": (torch.bfloat16, None, False),
    }
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    compared |= {"fp8": (dtype, "fp8", False), "fp8_head_too": (dtype, "fp8", True)}
    for (name, (kind, bits, head)), fast in itertools.product(compared.items(), (False, True)):
        if fast and (bits is None or run.device.type == "cpu"):
            continue
        with fast_accum(fast):
            totals = torch.zeros(6, dtype=torch.float64)
            for tokens, out, exact, half in zip(
                windows, log_probs(run, windows, kind, bits, head), float32, bf16, strict=True
            ):
                loss = -out[:-1].gather(1, tokens[1:, None]).sum()
                own = [float(loss), len(tokens) - 1]
                for other in (exact, half):
                    agrees = (out.argmax(dim=1) == other.argmax(dim=1)).double().mean()
                    kl = (other.exp() * (other - out)).sum(dim=1).mean()
                    own += [float(agrees) * len(tokens), float(kl) * len(tokens)]
                totals += torch.tensor(own, dtype=torch.float64)
        loss, count, *rest = totals.tolist()
        names = ("agrees_with_float32", "kl_from_float32", "agrees_with_bfloat16", "kl_from_bfloat16")
        figures = {name: value / found["tokens"] for name, value in zip(names, rest, strict=True)}
        key = name + ("_fast" if fast else "")
        found[key] = {"perplexity": torch.tensor(loss / count).exp().item(), **figures}
        run.write()


def log_probs(run: Run, windows: tuple[Tensor, ...], dtype: torch.dtype, bits: Any, head: bool) -> Iterator[Tensor]:
    """[T, V] of each window, float32."""
    assert run.model is not None
    model, _ = load_model(run.model, dtype, run.device)
    packed = pack_for_inference(model, bits, quantizes_head=head)
    for tokens in windows:
        positions = torch.arange(len(tokens), device=tokens.device)
        yield F.log_softmax(packed(tokens, positions, CausalAttend()).float(), dim=-1)


def tilings(run: Run) -> None:
    """Our kernel in bfloat16 at 16 rows by tiling; and deterministic products of many rows by their tiles, beside the
    library's; ms of all layers' products of one size."""
    found = run.values["tilings"]
    weights = Weights(run)
    weights.bf16 = [weights.random(*size) * 0.02 for size in weights.sizes]
    on_gpu = run.device.type == "cuda"
    for size in sizes_of(run.config):
        mine = [i for i, own in enumerate(weights.sizes) if own == size]
        layers, dense = [weights.layers[i] for i in mine], [weights.bf16[i] for i in mine]
        table = found.setdefault("x".join(map(str, size)), {})

        def timed(
            name: str, n: int, product: Callable[[Any, Any], Any], x: Any, all_weights: list, table: Any = table
        ) -> None:
            try:
                table.setdefault(name, {})[n] = run.milliseconds(lambda: [product(x, one) for one in all_weights])
            except Exception as error:  # a tiling that does not fit is one of the answers
                table.setdefault(name, {})[n] = str(error)[:120]

        for n in (16,) if on_gpu else (2,):
            x = weights.random(n, size[1])
            for tiling in dict.fromkeys([tiling_for(*size, torch.bfloat16), *bf16_candidates(size[0])]):
                timed(f"bfloat16 {tiling}", n, lambda x, w, t=tiling: few_rows_product(x, w, t), x, dense)
        for n in (128, 256, 2048) if on_gpu else (70,):
            if run.left < 15:
                found["cut"] = True
                return
            x = weights.random(n, size[1])
            rows = quantize_rows(x)
            timed("bfloat16 library", n, F.linear, x, dense)
            timed("fp8 library", n, lambda rows, layer: layer.unscaled(rows.values, torch.bfloat16), rows, layers)
            for kind, base in (("bfloat16", tiling_for(*size, torch.bfloat16)), ("fp8", tiling_for(*size, FP8))):
                for tiling in dict.fromkeys(
                    [fixed_tiling(base, n, FP8 if kind == "fp8" else torch.bfloat16), *many(base, kind)]
                ):
                    if kind == "fp8":
                        timed(
                            f"fp8 {tiling}",
                            n,
                            lambda rows, layer, t=tiling: few_rows_product(
                                rows, layer.weight, t, scale=layer.scale, dtype=torch.bfloat16, whole=True
                            ),
                            rows,
                            layers,
                        )
                    else:
                        timed(
                            f"bfloat16 {tiling}",
                            n,
                            lambda x, w, t=tiling: few_rows_product(x, w, t, whole=True),
                            x,
                            dense,
                        )
        run.write()


def bf16_candidates(size: int) -> list[Tiling]:
    """Worth a try for N of that size at 16 rows."""
    if size >= 8192:
        return [
            Tiling(64, 128, 1, 4),
            Tiling(64, 64, 1, 6),
            Tiling(64, 128, 1, 5),
            Tiling(128, 64, 1, 4),
            Tiling(128, 128, 1, 3),
        ]
    found = [Tiling(64, 128, splits, 4) for splits in (2, 4, 8)]
    return [*found, *(Tiling(64, 128, splits, 6) for splits in (2, 4, 8)), Tiling(64, 64, 4, 8), Tiling(128, 64, 4, 5)]


def many(base: Tiling, kind: str) -> list[Tiling]:
    """Tiles of many rows that add up as ``base`` does: outputs, rows, depth, stages, warps."""
    deep = base.depth
    shapes = [(128, 128, deep, 2, 8), (64, 128, deep, 3, 4), (64, 256, deep, 2, 4)]
    if kind == "bfloat16":
        shapes = [
            (128, 128, 64, 4, 8),
            (128, 256, 64, 3, 8),
            (64, 128, 128, 3, 4),
            (64, 256, 64, 4, 4),
            (128, 128, 64, 4, 4),
        ]
    return [Tiling(n, k, base.splits, stages, warps, rows) for n, rows, k, stages, warps in shapes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write fp8.json into")
    parser.add_argument("--shape", default="qwen3-8b")
    parser.add_argument("--model", help="a checkpoint, for its quality")
    parser.add_argument("--text", type=Path, help="plain or gzipped, for the model's quality")
    parser.add_argument("--tokens", type=int, default=65536, help="of the text, from its beginning")
    parser.add_argument("--seconds", type=float, default=360, help="parts that would begin too late are left out")
    parser.add_argument("--parts", default=",".join(PARTS))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    run = Run(arguments.out, arguments.shape, arguments.seconds)
    run.model, run.text, run.num_tokens = arguments.model, arguments.text, arguments.tokens
    if run.device.type == "cpu":  # only to try the script out
        quantization.check_fp8_device = lambda _: None
        factory.eager_reason = lambda *_: None
    for name in arguments.parts.split(","):
        run.part(name, *PARTS[name])
    print(json.dumps(run.values))


PARTS: dict[str, tuple[Callable[[Run], None], float]] = {  # with the fewest seconds it is worth beginning with
    "exactness": (exactness, 20),
    "our_products": (our_products, 40),
    "steps": (steps, 60),
    "auto": (auto, 40),
    "library_products": (library_products, 30),
    "quality": (quality, 30),
    "prefill": (prefill, 20),
    "kernels": (kernels, 15),
    "tilings": (tilings, 30),
}

if __name__ == "__main__":
    main()
