# SPDX-License-Identifier: Apache-2.0
"""Hostile programs: each must end as an Outcome other than passed, and leave nothing behind."""

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from wedlm.evaluate import sandbox
from wedlm.evaluate.sandbox import Limits, SandboxUnavailable, run_program, run_programs

QUICK = Limits(seconds=5.0, cpu_seconds=1.0, memory_bytes=128 * 2**20, max_file_bytes=2**20, max_output_bytes=2**16)
SECRET = "correct-horse-battery-staple"


@pytest.fixture(scope="module", autouse=True)
def sandbox_is_there():
    try:
        run_program("")
    except SandboxUnavailable as error:
        pytest.skip(str(error))


def found(program: str, limits: Limits = QUICK) -> str:
    """What a program tells by raising: the value of its variable ``told``."""
    outcome = run_program(program + "\nraise ValueError(told)", limits)
    assert outcome.status == "failed", outcome
    assert outcome.detail.startswith("ValueError: "), outcome
    return outcome.detail.removeprefix("ValueError: ")


def processes_with(word: str) -> list[int]:
    """Processes of this machine whose command line has a word."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it may have ended meanwhile
            if word.encode() in path.read_bytes():
                pids.append(int(path.parent.name))
    return pids


def test_a_program_that_reaches_its_end_passes():
    program = (
        "import math, json, re, collections, dataclasses\n"
        "@dataclasses.dataclass\nclass Point:\n    x: int\n"
        "assert __name__ == '__main__'\nassert Point(3).x == math.isqrt(9)\n"
        "open('scratch.txt', 'w').write('mine')\nassert open('/tmp/scratch.txt').read() == 'mine'\nprint('ok')"
    )
    outcome = run_program(program)
    assert (outcome.status, outcome.detail) == ("passed", "")
    assert 0 < outcome.seconds < 10


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("assert 1 + 1 == 3, 'sum'", "AssertionError: sum"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = '\ud800'", "UnicodeEncodeError"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise SystemExit", "SystemExit"),
        ("import os; os._exit(0)", "ended with exit code 0 before its last line"),
        ("import os; os._exit(7)", "ended with exit code 7"),
        ("import os; os.closerange(0, 100)", "ended with exit code 1"),
        ("class Quiet(Exception):\n    def __str__(self): raise SystemExit\nraise Quiet", "Quiet"),
        ("def f(): f()\nf()", "RecursionError"),
        ("assert input() == 'yes'", "EOFError"),
        ("import sys\nassert sys.stdin.read() == ''\n1 / 0", "ZeroDivisionError"),
    ],
)
def test_an_end_before_the_end_fails(program, detail):
    outcome = run_program(program, QUICK)
    assert outcome.status == "failed", outcome
    assert detail in outcome.detail


def test_printing_forges_nothing():
    """Neither words nor bytes on every open descriptor make an early exit a success."""
    program = (
        "import os\nfor fd in range(64):\n"
        "    for word in (b'passed\\n', b'ready\\n', b'{\"exit\": 0, \"note\": \"\"}'):\n"
        "        try: os.write(fd, word)\n        except OSError: pass\nos._exit(0)"
    )
    assert run_program(program, QUICK).status == "failed"


def test_a_patched_exit_is_not_used():
    """A program that rebinds what the end needs still fails or passes by what it does."""
    patch = "import os\nos._exit = lambda code: None\nos.write = lambda *a: None\nos.getpid = lambda: 0\n"
    assert run_program(patch, QUICK).status == "passed"
    assert run_program(patch + "assert False", QUICK).status == "failed"


def test_a_fork_that_goes_on_does_not_pass_for_its_parent():
    assert run_program("import os\nif os.fork(): os._exit(0)", QUICK).status == "failed"


@pytest.mark.parametrize(
    ("program", "limits", "status"),
    [
        ("while True: pass", QUICK, "timed_out"),
        ("import time; time.sleep(60)", Limits(seconds=0.5), "timed_out"),
        ("x = 10 ** 10 ** 10", QUICK, "timed_out"),
        # Deaf to every signal that can be ignored, the one for CPU time included.
        (
            "import signal\nfor n in range(1, 64):\n    try: signal.signal(n, signal.SIG_IGN)\n"
            "    except (OSError, ValueError): pass\nwhile True: pass",
            QUICK,
            "timed_out",
        ),
        ("while True: print('x' * 1000)", QUICK, "killed"),
        ("import os\nwhile True: os.write(2, b'x' * 1000)", QUICK, "killed"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", QUICK, "killed"),
        ("import ctypes; ctypes.string_at(0)", QUICK, "killed"),
        # Alone in its process group, or not: init and the parent are out of reach, so it goes on to its assertion.
        (
            "import os, signal\nos.kill(1, signal.SIGKILL); os.kill(os.getppid(), signal.SIGTERM)\nassert 0",
            QUICK,
            "failed",
        ),
    ],
)
def test_what_does_not_end_by_itself_is_ended(program, limits, status):
    outcome = run_program(program, limits)
    assert outcome.status == status, outcome
    assert outcome.detail


def test_memory_is_limited():
    assert run_program("x = bytearray(10 ** 9)", QUICK).detail == "MemoryError"
    shared = "import mmap\nkept = [mmap.mmap(-1, 2 ** 24) for _ in range(64)]"
    assert run_program(shared, QUICK).status == "failed"


def test_memory_beyond_the_limit_of_a_process_is_refused():
    """System V segments and memory files would outlive or escape RLIMIT_AS."""
    call = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\ntold = ({}, ctypes.get_errno())"
    assert found(call.format("libc.shmget(0, 1 << 20, 0o1600)")) == "(-1, 1)"
    assert "Operation not permitted" in run_program("import os; os.memfd_create('x')", QUICK).detail


def test_files_are_limited_alone_and_together():
    one = run_program("open('big', 'wb').write(bytes(2 ** 22))", QUICK)
    assert "File too large" in one.detail or "No space left" in one.detail
    many = "for n in range(100):\n    with open(f'file{n}', 'wb') as file: file.write(bytes(2 ** 17))"
    assert "No space left" in run_program(many, QUICK).detail
    inodes = "for n in range(5000): open(f'file{n}', 'w').close()"
    assert "No space left" in run_program(inodes, QUICK).detail


def test_a_fork_bomb_is_bounded():
    """First a bomb that stops by itself, then the endless one."""
    counting = (
        "import os, time\ntold = 0\ntry:\n    for _ in range(40):\n"
        "        if os.fork() == 0: time.sleep(5); os._exit(0)\n"
        "        told += 1\nexcept BlockingIOError: pass"
    )
    assert found(counting) == str(QUICK.max_processes - 1)
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert run_program(bomb, Limits(seconds=1.0, cpu_seconds=1.0)).status == "timed_out"
    threads = "import threading, time\nfor _ in range(40): threading.Thread(target=time.sleep, args=(9,)).start()"
    assert "can't start new thread" in run_program(threads, QUICK).detail


def test_nothing_outside_is_written_or_deleted(tmp_path):
    victim = tmp_path / "victim.txt"
    victim.write_text("here")
    tmp_path.chmod(0o777)
    victim.chmod(0o666)
    for program in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(victim)!r}, 'w')",
        f"import os; os.remove({str(victim)!r})",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
    ):
        assert "No such file" in run_program(program, QUICK).detail
    for place in ("/", "/usr", "/usr/lib", "/etc", "/dev", sys.base_prefix):
        outcome = run_program(f"open({place + '/planted'!r}, 'w')", QUICK)
        assert "Read-only file system" in outcome.detail or "Permission denied" in outcome.detail, outcome
    everything = (
        "import shutil\nfor place in ('/usr/bin', '/tmp', '/etc', '/dev'): shutil.rmtree(place, ignore_errors=True)"
    )
    assert run_program(everything, QUICK).status == "passed"
    assert victim.read_text() == "here"
    assert list(tmp_path.iterdir()) == [victim]
    assert Path(sys.base_prefix, "bin").is_dir()


def test_nothing_of_this_machine_is_seen(monkeypatch):
    monkeypatch.setenv("WEDLM_TEST_SECRET", SECRET)
    assert SECRET not in found("import os\ntold = dict(os.environ)")
    assert "No such file" in run_program(f"open('/proc/{os.getpid()}/environ')", QUICK).detail
    assert "No such file" in run_program("import os; open(f'/proc/{os.getppid()}/environ')", QUICK).detail
    assert found("import os\ntold = sorted(set(os.listdir('/')) - {'usr', 'lib', 'lib64', 'etc', 'dev', 'tmp'})") in (
        "[]",
        f"[{sys.base_prefix.split('/')[1]!r}]",
    )
    assert found("import os\ntold = os.listdir('/tmp')") == "[]"
    assert found("import os\ntold = os.getuid() in (0, 1000)") == "False"
    assert "No such process" in run_program(f"import os; os.kill({os.getpid()}, 0)", QUICK).detail


@pytest.mark.parametrize("call", ["unshare(0x10000000)", "setns(0, 0)", "ptrace(16, 1, 0, 0)", "chroot(b'/tmp')"])
def test_doors_of_the_kernel_are_shut(call):
    program = f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\ntold = (libc.{call}, ctypes.get_errno())"
    assert found(program) == "(-1, 1)"


def test_a_process_in_a_namespace_of_its_own_is_refused():
    clone = "import ctypes, platform\nnumber = 56 if platform.machine() == 'x86_64' else 220\n"
    clone += "libc = ctypes.CDLL(None, use_errno=True)\ntold = (libc.syscall({}, 0, 0, 0, 0), ctypes.get_errno())"
    assert found(clone.format("number, 0x10000000 | 17")) == "(-1, 1)"
    assert found(clone.format("435, 0")) == "(-1, 38)"


def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.5)
        port = listener.getsockname()[1]
        outcome = run_program(f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)", QUICK)
        assert outcome.status == "failed"
        assert "Operation not permitted" in outcome.detail
        with pytest.raises(TimeoutError):
            listener.accept()


def test_no_grandchild_outlives():
    """A daemon in a session of its own, deaf to signals, ends with the program; the process list would name it."""
    name = f"outlive{os.getpid()}"
    python = str(Path(sys.base_prefix, "bin", "python3"))
    daemon = (
        "import os, signal, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork(): os._exit(0)\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"    os.execv({python!r}, ['python3', '-I', '-S', '-c', 'import time; time.sleep(60)', '{name}'])\n"
    )
    seen: list[int] = []
    thread = threading.Thread(target=lambda: run_program(daemon + "time.sleep(60)", Limits(seconds=2.0)))
    thread.start()
    while thread.is_alive() and not seen:
        seen = processes_with(name)
        time.sleep(0.02)
    thread.join()
    assert seen, "the daemon never ran, so that its end proves nothing"
    assert run_program(daemon, QUICK).status == "passed"
    deadline = time.monotonic() + 5
    while processes_with(name) and time.monotonic() < deadline:  # the kernel needs a moment
        time.sleep(0.02)
    assert processes_with(name) == []


def test_a_program_does_not_outlive_a_killed_parent(tmp_path):
    name = f"orphan{os.getpid()}"
    jail = shutil.copy(sandbox._JAIL, tmp_path / f"{name}.py")  # a name to be found in the process list
    code = f"from wedlm.evaluate import sandbox\nfrom pathlib import Path\nsandbox._JAIL = Path({str(jail)!r})\n"
    process = subprocess.Popen([sys.executable, "-c", code + "sandbox.run_program('import time; time.sleep(60)')"])
    deadline = time.monotonic() + 20
    while len(processes_with(f"{name}.py")) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(processes_with(f"{name}.py")) >= 3  # who waits, init, the program
    process.kill()
    process.wait()
    while processes_with(f"{name}.py") and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes_with(f"{name}.py") == []


def test_many_run_in_order():
    programs = [f"assert {number} % 3" for number in range(7)]
    statuses = [outcome.status for outcome in run_programs(programs, QUICK, workers=2)]
    assert statuses == ["failed" if n % 3 == 0 else "passed" for n in range(7)]
    assert run_programs([], workers=2) == []


def test_no_protection_no_run(tmp_path, monkeypatch):
    """Where one step of the jail fails, nothing runs, and the reason is told."""
    text = sandbox._JAIL.read_text()
    jail = tmp_path / "jail.py"
    jail.write_text(text.replace('b"old"), "chang', 'b"gone"), "chang'))
    assert jail.read_text() != text
    monkeypatch.setattr(sandbox, "_JAIL", jail)
    with pytest.raises(SandboxUnavailable, match="changing the root failed: No such file"):
        run_program("print(1)")


def test_the_documentation_is_right(capsys):
    """Here, not with the other pages' blocks, because it needs a machine that has the sandbox."""
    page = (Path(__file__).parents[2] / "docs" / "sandbox.md").read_text()
    (block,) = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    expected = re.findall(r"  # (.*)", block)
    exec(compile(block, "sandbox.md", "exec"), {})
    assert capsys.readouterr().out.splitlines() == expected


class TestWithoutTheKernel:
    """What is refused before the kernel is asked, on any machine."""

    @pytest.fixture(autouse=True)
    def sandbox_is_there(self) -> None:
        """It need not be."""

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("seconds", 0),
            ("seconds", float("inf")),
            ("cpu_seconds", float("nan")),
            ("max_processes", 1.5),
            ("memory_bytes", True),
            ("max_output_bytes", -1),
        ],
    )
    def test_bad_limits_are_told(self, name, value):
        with pytest.raises(ValueError, match=f"{name} is {value!r}; expected"):
            Limits(**{name: value})

    def test_no_workers_are_told(self):
        with pytest.raises(ValueError, match="workers is 0; expected"):
            run_programs(["pass"], workers=0)

    def test_a_jail_that_says_nothing_is_none(self, tmp_path, monkeypatch):
        jail = tmp_path / "jail.py"
        jail.write_text("import sys; sys.exit(0)")
        monkeypatch.setattr(sandbox, "_JAIL", jail)
        with pytest.raises(SandboxUnavailable, match="its process ended without a word"):
            run_program("pass")

    def test_a_jail_that_never_starts_is_given_up(self, tmp_path, monkeypatch):
        jail = tmp_path / "jail.py"
        jail.write_text("import time; time.sleep(60)")
        monkeypatch.setattr(sandbox, "_JAIL", jail)
        monkeypatch.setattr(sandbox, "_START_SECONDS", 0.3)
        with pytest.raises(SandboxUnavailable, match="was not ready after"):
            run_program("pass")

    def test_other_systems_are_refused(self, monkeypatch):
        monkeypatch.setattr(sandbox.sys, "platform", "win32")
        with pytest.raises(SandboxUnavailable, match="does not support win32"):
            run_program("pass")
