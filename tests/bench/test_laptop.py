# SPDX-License-Identifier: Apache-2.0
"""Beside llama.cpp, with a stand-in for its wheel: what it is asked, how its figures are read, and how it ends."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from tests.bench.conftest import WORKLOAD, settings
from wedlm.bench import laptop, llamacpp
from wedlm.bench.laptop_report import headline, report
from wedlm.bench.llamacpp import Serving, serving
from wedlm.bench.record import read_record
from wedlm.bench.run import run_bench
from wedlm.bench.settings import LLAMACPP_PARTS
from wedlm.cli.bench import show_run

# A step takes 10 ms with Q8, 20 ms otherwise; a token of a prompt 1 ms.
STAND_IN = """
import http.server, json, os, threading, types
__version__ = "0.0-stand-in"
common_speculative_type = types.SimpleNamespace(COMMON_SPECULATIVE_TYPE_NGRAM_MOD=7)
def get_system_info(): return "STAND-IN = 1 "

class CommonParams:
    def __init__(self):
        self.model, self.cpuparams, self.cpuparams_batch, self.speculative = (types.SimpleNamespace() for _ in range(4))

class Server:
    def __init__(self, params):
        if not os.path.exists(params.model.path): raise RuntimeError("no such model")
        assert params.cpuparams.n_threads == params.cpuparams_batch.n_threads >= 1
        step_ms = 10.0 if "Q8" in params.model.path else 20.0
        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_): pass
            def answer(self, value):
                text = json.dumps(value).encode()
                self.send_response(200); self.send_header("Content-Length", str(len(text))); self.end_headers()
                self.wfile.write(text)
            def do_GET(self): self.answer({})
            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/completion" and asked["temperature"] == 0
                num = 1 if asked["cache_prompt"] else len(asked["prompt"])
                self.answer({"timings": {"prompt_n": num, "prompt_ms": num * 1.0, "predicted_n": asked["n_predict"],
                                         "predicted_ms": (asked["n_predict"] - 1) * step_ms}})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.listening_address = "http://127.0.0.1:%d" % server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "xllamacpp.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", ":".join([str(tmp_path), *sys.path]))
    monkeypatch.setattr(llamacpp, "find_spec", lambda _: object())
    for kind in ("Q4", "Q8"):
        (tmp_path / f"{kind}.gguf").write_text("weights")
    return tmp_path


@pytest.fixture
def small(monkeypatch):
    for name, value in (("CONTEXT", 30), ("ROWS", (1, 4)), ("SLOTS", (2,)), ("_COLD_BYTES", 1), ("_PAUSE_S", 0)):
        monkeypatch.setattr(laptop, name, value)


def beside(stand_in, checkpoint, **changes):
    files = tuple(str(stand_in / f"{kind}.gguf") for kind in ("Q4", "Q8"))
    workload = replace(WORKLOAD, batches=(1, 2), long_prompt=40, chats=1)
    given = {"parts": tuple(LLAMACPP_PARTS), "workload": workload, "shape": None, "model": str(checkpoint)}
    return settings(**{**given, "against": "llamacpp", "gguf": files, **changes})


def test_every_part(stand_in, small, tiny_checkpoint, tmp_path, capsys):
    told = []
    asked = beside(stand_in, tiny_checkpoint)
    record = run_bench(asked, ["bench", "..."], tmp_path / "out", lambda part, row: told.append((part, row)))
    assert any("Ctrl-C ends early" in part for part, _ in told)
    parts = record.values["parts"]
    assert list(parts) == list(LLAMACPP_PARTS)
    assert all(row["runs"] == 2 for rows in parts.values() for row in rows)
    step = {(row["engine"], row["rows"]): row for row in parts["step"]}
    assert step["llama.cpp Q4", 1]["step_ms"] == 20
    assert step["llama.cpp Q8", 1]["step_ms"] == 10
    # The better one is what we are compared with.
    assert step["wedlm", 4]["vs_llamacpp"] == pytest.approx(step["wedlm", 4]["step_ms"] / 10, rel=1e-3)
    assert step["wedlm", 4]["vs_one_row"] == pytest.approx(
        step["wedlm", 4]["step_ms"] / step["wedlm", 1]["step_ms"], rel=1e-3
    )
    chat = {(row["kind"], row["engine"], row["mode"]): row for row in parts["chat"]}
    assert {kind for kind, _, _ in chat} == {"all", "sums", "code", "lists", "open questions", "counting"}
    assert ("all", "llama.cpp Q4", "speculation, ngram-mod") in chat
    assert (
        chat["all", "llama.cpp Q8", "autoregressive"]["tok_per_s"]
        > chat["all", "llama.cpp Q4", "autoregressive"]["tok_per_s"]
    )
    assert chat["all", "wedlm", "auto"]["vs_ar"] > 0
    (prompt,) = [row for row in parts["prompt"] if row["engine"] == "llama.cpp Q8"]
    assert prompt["tok_per_s"] == pytest.approx(1000)
    assert {row["copies"] for row in parts["cold"]} == {2}
    assert [row["step_ms"] for row in parts["cold"]][1:] == [1, 1]  # its prompt's last token, the others cached
    loads = [row["load"] for row in parts["busy"]]
    assert loads.count("quiet") == loads.count("one core busy") == 5
    # The report is made from the file alone.
    values = read_record(tmp_path / "out")
    assert values["llamacpp"]["version"] == "xllamacpp 0.0-stand-in"
    text = report(values)
    assert headline(values) in text
    assert "STAND-IN = 1" in text
    assert len([line for line in headline(values).splitlines() if line.startswith("| ")]) == 2 + 2 + 4 + 1 + 1 + 1 + 1
    show_run(tmp_path / "out", None, True)
    assert (tmp_path / "out/report.md").read_text() == text
    assert headline(values) in capsys.readouterr().out


def test_sums_of_chats():
    answers = [
        {0: {"tokens": 10, "seconds": 1.0}, 1: {"tokens": 30, "seconds": 1.0}},
        {0: {"tokens": 9, "seconds": 3.0}},
    ]
    assert laptop._sums(answers, [0, 1]) == [{"tok_per_s": 20, "tokens": 40}]  # the second run was cut
    assert [one["tok_per_s"] for one in laptop._sums(answers, [0])] == [10, 3]


def row(engine, **values):
    return {"engine": engine, "runs": 5, "spread": {}, **values}


def test_the_headline_names_gains_as_gains():
    steps = [
        row("wedlm", rows=1, step_ms=4.0),
        row("llama.cpp Q4", rows=1, step_ms=6.0),
        row("llama.cpp F16", rows=1, step_ms=9.0),
    ]
    chats = [
        row("wedlm", kind="all", mode="auto", tok_per_s=90.0),
        *(row("wedlm", kind=kind, mode="auto", tok_per_s=9.0) for kind in ("sums", "lists")),
        row("llama.cpp Q4", kind="all", mode="autoregressive", tok_per_s=120.0),
        row("llama.cpp Q4", kind="all", mode="speculation, ngram-mod", tok_per_s=500.0),
    ]
    values = {
        "settings": {"workload": {"chats": 4, "runs": 5}},
        "load_average": {"start": 0.3},
        "hardware": {"threads": 2},
        "parts": {"step": steps, "chat": chats},
    }
    lines = headline(values).splitlines()
    assert lines[2:] == [
        "| a step of one row (AR), context 256 | 6 ms | 4 ms | **1.50x** |",
        "| 8 chat prompts, one stream: `auto` | 120 tok/s | 90 tok/s | 0.75x |",
    ]


@pytest.mark.parametrize(
    ("runs", "load", "skipped", "provisional", "said"),
    [
        (5, 0.9, [], False, ""),
        (1, 0.9, [], True, "a figure of 1 run(s) instead of 5"),
        (5, 1.5, [], True, "load average of 2"),
        (4, 0.0, ["step: wedlm, run 5"], False, "the median of 4 runs instead of 5"),
        (9, 0.0, ["cold", "busy"], False, "Not in this run, whose time was up: cold, busy."),
    ],
)
def test_figures_that_may_not_be_quoted_say_so(runs, load, skipped, provisional, said):
    values = {
        "settings": {"workload": {"chats": 4, "runs": 5}},
        "load_average": {"start": load},
        "hardware": {"threads": 2},
        "skipped": skipped,
        "parts": {"step": [row("wedlm", rows=1, step_ms=4.0, runs=runs)]},
    }
    text = headline(values)
    assert ("Provisional" in text) == provisional
    assert said in text


def test_twenty_prompts_of_five_kinds():
    prompts = laptop.chat_prompts(4)
    assert len({text for _, text in prompts}) == 20
    assert [kind for kind, _ in prompts[:5]] == [kind for kind, _ in laptop.chat_prompts(1)]
    assert len({kind for kind, _ in prompts[:5]}) == 5


def test_what_is_done_is_kept_when_stopped(stand_in, small, tiny_checkpoint, tmp_path):
    told = []
    record = run_bench(
        beside(stand_in, tiny_checkpoint, parts=("prompt", "step")), [], tmp_path, lambda part, row: told.append(row),
        lambda: any(told),
    )  # fmt: skip
    assert [row["engine"] for row in read_record(tmp_path)["parts"]["prompt"]] == [
        "wedlm",
        "llama.cpp Q4",
        "llama.cpp Q8",
    ]
    assert record.values["skipped"] == ["step"]


def test_a_server_ends_with_its_block(stand_in):
    with serving(Serving(str(stand_in / "Q4.gguf"), 1)) as (server,):
        found = server.complete([1, 2, 3], 5)
        assert (found["step_ms"], found["prompt_ms"], found["seconds"]) == (20, 3, 0.083)
    with pytest.raises(OSError, match="refused"):
        server.complete([1], 1)


@pytest.mark.long
@pytest.mark.parametrize("when", ["serving", "starting"])
def test_a_server_does_not_outlive_us(stand_in, when):
    """Also if we die before it has said where it is, when telling us fails."""
    (stand_in / "xllamacpp.py").write_text("import time; time.sleep(1.0)\n" + STAND_IN)
    code = (
        "import json, subprocess, sys, time\n"
        "from dataclasses import asdict\nfrom wedlm.bench.llamacpp import Serving\n"
        f"task = json.dumps(asdict(Serving({str(stand_in / 'Q4.gguf')!r}, 1)))\n"
        "one = subprocess.Popen([sys.executable, '-m', 'wedlm.bench.llamacpp_worker', task], stdin=subprocess.PIPE,"
        " stdout=subprocess.PIPE)\nprint(one.pid, flush=True)\n"
        f"if {when == 'serving'}: one.stdout.readline()\nimport os\nos._exit(1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        timeout=60,
        check=False,
    )
    for _ in range(200):
        if not os.path.exists(f"/proc/{int(done.stdout)}"):
            return
        time.sleep(0.1)
    pytest.fail("the server is still there twenty seconds after its owner died")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("raise RuntimeError('no memory')", "RuntimeError: no memory"),
        pytest.param("import time; time.sleep(60)", "did not start", marks=pytest.mark.long),
    ],
)
def test_one_that_does_not_start(stand_in, monkeypatch, broken, message):
    monkeypatch.setattr(llamacpp, "_START_TIMEOUT_S", 3.0)
    (stand_in / "xllamacpp.py").write_text(broken)
    with pytest.raises(ValueError, match=message), serving(Serving(str(stand_in / "Q4.gguf"), 1)):
        pass


def test_a_program_instead_of_the_wheel(stand_in):
    program = stand_in / "llama-server"
    program.write_text(
        f"#!{sys.executable}\nimport sys, types, time\nsys.path.insert(0, {str(stand_in)!r})\n"
        "if '--version' in sys.argv: print('version: 7 (abc)', file=sys.stderr); raise SystemExit\n"
        "of = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "assert of['--parallel'] == '3' and of['--ctx-size'] == '300' and of['--spec-type'] == 'ngram-mod', of\n"
        "import http.server\nreal = http.server.ThreadingHTTPServer\n"
        "http.server.ThreadingHTTPServer = lambda _, handler: real(('127.0.0.1', int(of['--port'])), handler)\n"
        "import xllamacpp\nparams = xllamacpp.CommonParams()\nparams.model.path = of['--model']\n"
        "params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(of['--threads'])\n"
        "server = xllamacpp.Server(params)\ntime.sleep(60)\n"
    )
    program.chmod(0o755)
    task = Serving(str(stand_in / "Q8.gguf"), 2, 3, 100, llamacpp.SPECULATION, str(program))
    with serving(task) as (server,):
        assert server.about["version"] == "version: 7 (abc)"
        assert server.complete([1, 2], 3)["step_ms"] == 10
    with pytest.raises(OSError, match="refused"):
        server.complete([1], 1)


def test_a_wheel_that_is_not_there(monkeypatch):
    monkeypatch.setattr(llamacpp, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"expected .*pip install 'wedlm\[llamacpp\]' first"):
        llamacpp.check_llamacpp(None)


def test_a_busy_core_is_let_go():
    def running() -> int:
        listed = subprocess.run(
            ["ps", "-ww", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True, check=True
        )
        return listed.stdout.count("time.monotonic() < end")

    with laptop._busy_core():
        assert running() == 1
    assert running() == 0


@pytest.mark.demo_model
def test_files_of_the_base_model(tmp_path, monkeypatch):
    """Asked for by name; what ``wedlm quantize`` writes has its own tests."""
    asked = []
    monkeypatch.setattr(llamacpp, "default_cache_dir", lambda: tmp_path)
    target = "wedlm.model.quantize_checkpoint.quantize_checkpoint"
    monkeypatch.setattr(target, lambda *where, **how: asked.append((*where, how)))
    files = llamacpp.base_files()
    assert list(files) == ["Q4_1", "Q8_0", "F16"]
    expected = [("demo-base", files[kind], {"to": "gguf", "type": kind.lower()}) for kind in ("Q8_0", "F16")]
    assert asked == expected


def test_json_of_the_prompts_is_part_of_the_package():
    assert json.loads((laptop.files("wedlm.bench") / "chat_prompts.json").read_text())
