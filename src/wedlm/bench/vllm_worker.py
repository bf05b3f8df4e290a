# SPDX-License-Identifier: Apache-2.0
"""Measure vLLM: ``python -m wedlm.bench.vllm_worker TASK.json FOUND.json``, as called by ``wedlm.bench.vllm``.

A step's time is the difference between two runs that differ only in output length, divided by the difference in length.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wedlm.bench.stats import Delivered, Figures, TableRow, answer_figures, make_row

_SHORT = 32  # tokens of the shorter of two answers
_LOAD = 0.7
# Over several GPUs; ``vllm.py`` says why.
_NO_MULTICAST = {"pass_config": {"fuse_allreduce_rms": False}}


class Worker:
    """One vLLM engine; prefix caching off, so that the same prompts can be asked again."""

    def __init__(self, task: dict[str, Any]) -> None:
        from vllm import LLM

        self.task, self._count, size = task, 0, task["tensor_parallel_size"]
        self.llm = LLM(
            model=task["model"], load_format=task["load_format"], skip_tokenizer_init=True, dtype=task["dtype"],
            max_model_len=task["max_model_len"], max_num_seqs=task["max_num_seqs"], max_num_batched_tokens=8192,
            gpu_memory_utilization=0.85, enable_prefix_caching=False,
            quantization=task["quantization"], speculative_config=task["speculation"], tensor_parallel_size=size,
            **({} if size == 1 else {"compilation_config": _NO_MULTICAST}),
        )  # fmt: skip

    def params(self, max_tokens: int, ignore_eos: bool) -> Any:
        from vllm import SamplingParams

        ends = [] if ignore_eos else self.task["eos_token_ids"]  # without its tokenizer it knows none
        return SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=ignore_eos, detokenize=False, stop_token_ids=ends
        )

    def seconds(self, prompts: Sequence[list[int]], max_tokens: int) -> float:
        """Seconds for answers of exactly this many tokens."""
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        start = time.perf_counter()
        self.llm.generate(asked, self.params(max_tokens, True), use_tqdm=False)
        return time.perf_counter() - start

    def serve(self, arrivals: Sequence[dict[str, Any]]) -> Figures:
        """The twin of ``Loop.serve``."""
        engine, waiting = self.llm.llm_engine, list(arrivals)
        running: dict[str, Delivered] = {}
        done: list[Delivered] = []
        start = now = time.perf_counter()
        while waiting or running:
            while waiting and waiting[0]["at_s"] <= now - start:
                one = waiting.pop(0)
                name, self._count = f"bench-{self._count}", self._count + 1
                params = self.params(one["max_tokens"], self.task["ignore_eos"])
                engine.add_request(name, {"prompt_token_ids": one["prompt"]}, params)
                running[name] = Delivered(start + one["at_s"])
            if not running:
                time.sleep(max(0.0, start + waiting[0]["at_s"] - now))
            outputs = engine.step() if running else []
            now = time.perf_counter()
            for output in outputs:
                name = "-".join(output.request_id.split("-")[:2])  # some versions add a suffix
                running[name].add(now, len(output.outputs[0].token_ids))
                if output.finished:
                    done.append(running.pop(name))
        return answer_figures(done, now - start)

    def repeat(self, label: dict[str, Any], arrivals: Sequence[dict[str, Any]]) -> TableRow:
        """Repeat, after one run to warm up."""
        return make_row(label, [self.serve(arrivals) for _ in range(self.task["runs"] + 1)][1:])

    def at_once(self, count: int) -> list[dict[str, Any]]:
        most = self.task["answer"]
        return [{"at_s": 0.0, "prompt": prompt, "max_tokens": most} for prompt in self.task["prompts"][:count]]

    def steps(self) -> list[TableRow]:
        more, rows = self.task["steps"], []
        for batch in self.task["batches"]:
            prompts = self.task["prompts"][:batch]
            self.seconds(prompts, 8)
            took = [
                (self.seconds(prompts, _SHORT + more) - self.seconds(prompts, _SHORT)) / more
                for _ in range(self.task["runs"])
            ]
            rows.append(make_row({"batch": batch}, [{"step_ms": 1e3 * t, "tok_per_s": batch / t} for t in took]))
        return rows

    def latency(self) -> list[TableRow]:
        return [self.repeat({}, self.at_once(1))]

    def throughput(self) -> list[TableRow]:
        return [self.repeat({"batch": batch}, self.at_once(batch)) for batch in self.task["batches"]]

    def prefill(self) -> list[TableRow]:
        prompt = self.task["long_prompt"]
        took = [self.seconds([prompt], 1) for _ in range(self.task["runs"] + 1)][1:]
        return [make_row({"prompt": len(prompt)}, [{"tok_per_s": len(prompt) / t, "seconds": t} for t in took])]

    def serving(self) -> list[TableRow]:
        """Serve all at once, which gives the rate if none was set, then as they arrive."""
        arrivals = self.task["arrivals"]
        count = len(arrivals)
        everything = self.repeat({"load": "all at once", "requests": count}, [{**one, "at_s": 0.0} for one in arrivals])
        rate = self.task["rate"] or float(f"{_LOAD * count / everything['seconds']:.5g}")
        spaced = [{**one, "at_s": one["at_s"] / rate} for one in arrivals]
        label = {"load": "arrivals", "requests": count, "requests_per_s": rate}
        return [everything, self.repeat(label, spaced)]


def main(task_file: str, found_file: str) -> None:
    """Write the results after each part, so that a part that fails does not lose the others."""
    task = json.loads(Path(task_file).read_text())
    worker = Worker(task)
    import vllm

    found: dict[str, Any] = {"versions": {"vllm": vllm.__version__}}
    for part in ("steps", "prefill", "serving", "latency", "throughput"):
        if part in task["parts"]:
            found[part] = getattr(worker, part)()
            Path(found_file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
