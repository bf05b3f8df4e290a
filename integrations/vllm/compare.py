# SPDX-License-Identifier: Apache-2.0
"""Our engine and vLLM with the plug-in, streaming over the same weights and token ids, on one GPU.

    python integrations/vllm/compare.py --model demo --prompts tests/data/prompts.jsonl --out report.json

Each side can run alone (``--side ours``, ``--side vllm``): what it found stays beside the report, and the other run's
is read from there. For every text that differs, a slow decoder in float32 says how near the nearest decision before
that place was. Times are the least of ``--runs``.
"""

import argparse
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PATHS = [str(HERE), str(HERE.parents[1] / "src")]
# vLLM looks at a model's class in a process of its own, which must find the plug-in, too.
os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, *filter(None, [os.environ.get("PYTHONPATH")])])
sys.path[:0] = PATHS
for _name, _value in {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, in which forwards can be counted
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # Triton's attention multiplies float32 in TF32 otherwise, ten bits of mantissa.
    "TRITON_F32_DEFAULT": "ieee",
}.items():
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402
from wedlm_vllm.convert import add_settings, convert  # noqa: E402
from wedlm_vllm.settings import StreamingSettings  # noqa: E402

from wedlm.algorithm import reference  # noqa: E402
from wedlm.algorithm.params import DecodeParams  # noqa: E402
from wedlm.algorithm.sample import entropy_and_logsumexp  # noqa: E402

MAX_EXPLAINED = 16  # texts that differ; the slow decoder runs each token's forward without a cache
KV_CACHE_BYTES = 4 << 30  # of our engine, so that both sides fit


def main() -> int:
    arguments = parse()
    torch.set_float32_matmul_precision("highest")
    work = arguments.out.with_suffix("")
    work.mkdir(parents=True, exist_ok=True)
    directory = converted(arguments, work)
    prompts = read_prompts(arguments, directory)
    failed = False
    for side, run in (("ours", run_ours), ("vllm", run_vllm)):
        if arguments.side not in (side, "both"):
            continue
        try:
            found = {"model": directory.name, **run(arguments, directory, prompts)}
            (work / f"{side}.json").write_text(json.dumps(found))
            print(side, {name: value for name, value in found.items() if name != "tokens"}, flush=True)
        except Exception:
            traceback.print_exc()
            failed = True
        gc.collect()
        torch.cuda.empty_cache()
    found = {side: work / f"{side}.json" for side in ("ours", "vllm")}
    if all(path.exists() for path in found.values()):
        sides = {side: json.loads(path.read_text()) for side, path in found.items()}
        if sides["ours"]["model"] != sides["vllm"]["model"]:
            raise ValueError(f"{work} has results of two models or settings; expected another --out for each")
        report = compare(sides["ours"], sides["vllm"], directory, prompts)
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps(report))
    return int(failed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="what wedlm_vllm.convert takes")
    parser.add_argument("--prompts", type=Path, required=True, help='JSON lines with "prompt"')
    parser.add_argument("--out", type=Path, required=True, help="report; the folder of its name keeps the rest")
    parser.add_argument("--side", choices=("ours", "vllm", "both"), default="both")
    parser.add_argument("--device", default="cuda", help="of our engine")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 32, 64], help="at a time, for the speeds")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--attention-backend", default="TRITON_ATTN", help="of vLLM; only some take float32")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.35)
    parser.add_argument("--enforce-eager", action="store_true", help="vLLM without torch.compile and CUDA graphs")
    parser.add_argument("--no-async-scheduling", action="store_true")
    add_settings(parser)
    return parser.parse_args()


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("window_size", "num_rows", "entropy_threshold", "pos_penalty", "next_token")
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def converted(arguments: argparse.Namespace, work: Path) -> Path:
    """The checkpoint that both sides load, one for each choice of settings."""
    given = given_settings(arguments)
    name = "-".join(["model", arguments.dtype, *(f"{key}={value}" for key, value in sorted(given.items()))])
    if not (work / name / "config.json").exists():
        print(convert(arguments.model, work / name, arguments.dtype, **given), flush=True)
    return work / name


def settings_of(directory: Path) -> StreamingSettings:
    values = json.loads((directory / "config.json").read_text())
    return StreamingSettings.from_hf(argparse.Namespace(**values))


def read_prompts(arguments: argparse.Namespace, directory: Path) -> list[list[int]]:
    from wedlm.model import load_tokenizer

    tokenizer = load_tokenizer(directory)
    lines = arguments.prompts.read_text(encoding="utf-8").splitlines()[: arguments.num_prompts]
    texts = [json.loads(line)["prompt"] for line in lines]
    if tokenizer.has_chat_template:
        return [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    return [tokenizer.encode(text) for text in texts]


def end_tokens(directory: Path) -> list[int]:
    eos = json.loads((directory / "generation_config.json").read_text())["eos_token_id"]
    return [eos] if isinstance(eos, int) else list(eos)


def speeds(arguments: argparse.Namespace, generate: Callable[[Sequence[int]], int]) -> dict[str, float]:
    """Tokens a second by the number of requests at a time. ``generate`` takes indices of prompts and returns the number
    of tokens."""
    found = {}
    for count in arguments.requests:
        groups = [list(range(i, i + count)) for i in (range(8) if count == 1 else (0,))]
        best = 0.0
        for _ in range(arguments.runs):
            start, tokens = time.perf_counter(), 0
            for group in groups:
                tokens += generate([i % arguments.num_prompts for i in group])
            best = max(best, tokens / (time.perf_counter() - start))
        found[str(count)] = best
    return found


def run_ours(arguments: argparse.Namespace, directory: Path, prompts: list[list[int]]) -> dict[str, Any]:
    from wedlm import LLM, SamplingParams
    from wedlm.engine.outputs import Totals

    settings = settings_of(directory)
    llm = LLM(
        directory,
        dtype=arguments.dtype,
        device=arguments.device,
        max_model_len=arguments.max_model_len,
        max_num_seqs=max(arguments.requests),
        kv_cache_bytes=KV_CACHE_BYTES,
        mask_token_id=settings.mask_token_id,
    )
    salts = iter(range(1 << 30))

    def params() -> SamplingParams:
        return SamplingParams(
            temperature=0.0,
            max_tokens=arguments.max_tokens,
            decoding="streaming",
            wedlm_window_size=settings.window_size,
            wedlm_entropy_threshold=settings.entropy_threshold,
            wedlm_pos_penalty_factor=settings.pos_penalty,
            wedlm_next_token=settings.next_token,
            cache_salt=str(next(salts)),  # as vLLM without its prefix cache
        )

    def generate(indices: Sequence[int]) -> int:
        salted = params()
        outputs = llm.generate([prompts[i] for i in indices], [salted] * len(indices), progress=False)
        return sum(len(output.token_ids) for output in outputs)

    generate([0, 1])
    outputs = llm.generate(prompts, params(), progress=False)
    totals = Totals.of(outputs)
    return {
        "tokens": [output.token_ids for output in outputs],
        "tokens_per_forward": totals.tokens_per_forward,
        "rows_per_forward": totals.num_rows / totals.num_forwards,
        "tokens_per_s": speeds(arguments, generate),
    }


def run_vllm(arguments: argparse.Namespace, directory: Path, prompts: list[list[int]]) -> dict[str, Any]:
    import vllm
    import wedlm_vllm
    from wedlm_vllm.rule import StreamingRule

    wedlm_vllm.register()  # what the entry point does where the plug-in is installed
    settings, most = settings_of(directory), max(arguments.requests)
    windows = 0  # of all forwards
    update = StreamingRule.update

    def counted(rule: StreamingRule, step: Any, *results: torch.Tensor) -> Any:
        nonlocal windows
        windows += len(step.run)
        return update(rule, step, *results)

    StreamingRule.update = counted  # type: ignore[method-assign]
    graphs = [n * settings.num_rows for n in sorted({1, 2, 4, 8, *range(16, most + 1, 8), most}) if n <= most]
    llm = vllm.LLM(
        model=str(directory),
        dtype=arguments.dtype,
        skip_tokenizer_init=True,
        max_model_len=arguments.max_model_len,
        max_num_seqs=most,
        max_num_batched_tokens=max(8192, most * settings.num_rows),
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        enable_prefix_caching=False,
        enforce_eager=arguments.enforce_eager,
        attention_backend=arguments.attention_backend,
        **({"async_scheduling": False} if arguments.no_async_scheduling else {}),
        **({} if arguments.enforce_eager else {"compilation_config": {"cudagraph_capture_sizes": graphs}}),
    )
    params = vllm.SamplingParams(
        temperature=0.0, max_tokens=arguments.max_tokens, detokenize=False, stop_token_ids=end_tokens(directory)
    )

    def ask(indices: Sequence[int]) -> list[list[int]]:
        asked = [{"prompt_token_ids": prompts[i]} for i in indices]
        return [list(output.outputs[0].token_ids) for output in llm.generate(asked, params, use_tqdm=False)]

    def generate(indices: Sequence[int]) -> int:
        return sum(map(len, ask(indices)))

    generate([0, 1])
    windows = 0
    tokens = ask(range(len(prompts)))
    return {
        "tokens": tokens,
        # A text's last tokens are reported one forward later than they are known, and asynchronous scheduling may run
        # a forward for a text that has ended: both count.
        "tokens_per_forward": sum(map(len, tokens)) / windows,
        "rows_per_forward": settings.num_rows,
        "tokens_per_s": speeds(arguments, generate),
        "version": vllm.__version__,
    }


def compare(ours: dict[str, Any], theirs: dict[str, Any], directory: Path, prompts: list[list[int]]) -> dict[str, Any]:
    ends = set(end_tokens(directory))

    def text(tokens: list[int]) -> list[int]:
        return tokens[:-1] if tokens and tokens[-1] in ends else tokens

    pairs = [(text(a), text(b)) for a, b in zip(ours["tokens"], theirs["tokens"], strict=True)]
    different = [i for i, (a, b) in enumerate(pairs) if a != b]
    explain = Explainer(directory) if different else None
    parted = []
    for i in different:
        a, b = pairs[i]
        at = next((j for j, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        near = explain.nearest(prompts[i], at) if explain is not None and len(parted) < MAX_EXPLAINED else None
        parted.append({"prompt": i, "token": at, "ours": a[at : at + 1], "vllm": b[at : at + 1], "nearest": near})
    return {
        "texts": len(pairs),
        "equal": len(pairs) - len(different),
        "different": parted,
        "settings": settings_of(directory).to_hf(),
        **{side: {k: v for k, v in one.items() if k != "tokens"} for side, one in (("ours", ours), ("vllm", theirs))},
    }


class Explainer:
    """The slow decoder over the same weights in float32."""

    def __init__(self, directory: Path) -> None:
        from wedlm.attention.sdpa import CausalAttend
        from wedlm.model import load_model

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model, config = load_model(directory, torch.float32, self.device)
        self.attend = CausalAttend()
        self.params: DecodeParams = settings_of(directory).decode_params(config.max_length)

    @torch.inference_mode()
    def nearest(self, prompt: list[int], at: int) -> dict[str, Any]:
        """The smallest differences that a decision up to output token ``at`` hung on: logits between a filled token and
        the next best, and nats between an entropy and the threshold, or two entropies of which the smaller was
        filled. ``token`` is the slow decoder's own."""
        margins: list[tuple[float, float]] = []

        def forward(tokens: list[int], positions: list[int], num_masked: int) -> torch.Tensor:
            rows = torch.tensor(tokens, device=self.device)
            logits = self.model(rows, torch.tensor(positions, device=self.device), self.attend)
            margins.append(self._margins(logits.float(), positions, num_masked))
            return logits

        out = reference.decode(forward, prompt, at + 1, self.params)
        before = margins[: out.steps[-1] + 1]
        return {
            "token": out.tokens[-1],
            "logits": min(m[0] for m in before),
            "entropy": min(m[1] for m in before),
        }

    def _margins(self, logits: torch.Tensor, positions: list[int], num_masked: int) -> tuple[float, float]:
        masked = list(range(len(positions) - num_masked, len(positions)))
        first = positions[masked[0]]
        some = logits[torch.tensor(masked, device=logits.device)]
        best = some.topk(2, dim=-1)
        gaps = best.values[:, 0] - best.values[:, 1]
        distance = torch.tensor([positions[row] - first for row in masked], device=logits.device)
        adjusted = entropy_and_logsumexp(some)[0] + self.params.pos_penalty * distance
        chosen = adjusted < self.params.fill_below
        near = (adjusted - self.params.fill_below).abs()
        if self.params.is_causal:
            following = logits[positions.index(first - 1)].topk(2)
            agrees = bool(following.indices[0] == best.indices[0, 0])
            count = int(chosen.long().cumprod(dim=0).sum()) if agrees else 0
            # What hung on the first row: whether it chooses the next token.
            gaps = torch.cat([following.values[:1] - following.values[1:], gaps[: max(1, count)]])
            chosen, near = torch.ones_like(gaps, dtype=torch.bool), near[: count + agrees]
        elif not chosen.any():
            two = adjusted.sort().values[:2]
            near = (
                torch.cat([near, two[1:] - two[:1]]) if self.params.entropy_threshold is not None else two[1:] - two[:1]
            )
            chosen[adjusted.argmin()] = True
        return float(gaps[chosen].min()), float(near.min()) if len(near) else torch.inf


if __name__ == "__main__":
    sys.exit(main())
