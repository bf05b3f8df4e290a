# SPDX-License-Identifier: Apache-2.0
"""The inside of the sandbox: it builds a jail out of Linux namespaces, then runs one program in it.

``sandbox.py`` starts this file as a separate script (``python -I -S -B jail.py``), so it only imports the standard
library. Standard input is one JSON object ``{source, token, report_fd, limits}``. ``report_fd`` gets the line ``ready``
when the program starts, then a JSON object: ``{"refused": why}`` or ``{"exit": code, "note": text, "cpu_seconds": s}``,
with code < 0 for a signal, and with the token as note iff the program reached its end.

Processes: this one (outside the new process namespace, waits) → init (process 1 inside; when it ends the kernel kills
all others inside) → the program. Every restriction is in force before the program's process exists.
"""

import ctypes
import errno
import json
import math
import os
import platform
import resource
import signal
import struct
import sys
import traceback
import types
from typing import Any

_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_FS, _NEW_USER, _NEW_PIDS, _NEW_NET = 0x20000, 0x10000000, 0x20000000, 0x40000000
_NEW_IPC, _NEW_NAMES, _NEW_CGROUPS = 0x8000000, 0x4000000, 0x2000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
_ATTR_READ_ONLY, _ATTR_NOSUID, _ATTR_NODEV, _AT_RECURSIVE = 1, 2, 4, 0x8000
_DETACH = 2
_SET_DEATH_SIGNAL, _SET_SECCOMP, _SET_NO_NEW_PRIVILEGES = 1, 22, 38
_NOBODY = 65534
# Each jail has a user id that no other has, so that its processes are counted separately. Above all real ids.
_FIRST_UID = 2**30
_SYSTEM_DIRECTORIES = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_NOTE_BYTES = 4096
# Number of a system call per machine. Refused: sockets, memory that no limit below counts, other processes' memory,
# and doors to parts of the kernel that no program needs. `clone` is looked at, `clone3` (whose flags lie in memory) is
# not there, so that libc falls back to `clone`.
_CALLS: dict[str, dict[str, Any]] = {
    "x86_64": {
        "audit": 0xC000003E, "mount_setattr": 442, "pivot_root": 155, "capset": 126, "clone": 56, "clone3": 435,
        "refused": (
            41, 29, 64, 68, 319, 447, 101, 310, 311, 434, 438, 272, 308, 165, 166, 155, 442, 428, 429, 430, 321, 298,
            323, 248, 249, 250, 425, 161, 304, 175, 313, 246, 320,
        ),
    },
    "aarch64": {
        "audit": 0xC00000B7, "mount_setattr": 442, "pivot_root": 41, "capset": 91, "clone": 220, "clone3": 435,
        "refused": (
            198, 194, 190, 186, 279, 447, 117, 270, 271, 434, 438, 97, 268, 40, 39, 41, 442, 428, 429, 430, 280, 241,
            282, 217, 218, 219, 425, 51, 265, 105, 273, 104, 294,
        ),
    },
}  # fmt: skip


class Refused(Exception):
    """This machine does not offer a protection, so the program must not run."""


def _check(result: int, what: str) -> None:
    if result != 0:
        raise Refused(f"{what} failed: {os.strerror(ctypes.get_errno())}")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    arguments = [None if text is None else text.encode() for text in (source, target, kind)]
    result = _LIBC.mount(*arguments, ctypes.c_ulong(flags), options.encode() or None)
    _check(result, f"mounting {target}")


def _harden(path: str, flags: int) -> None:
    """Set attributes of the mount at ``path``; with ``_AT_RECURSIVE`` also of those below it."""
    attributes = (flags & ~_AT_RECURSIVE) | _ATTR_NOSUID | _ATTR_NODEV
    wanted = struct.pack("QQQQ", attributes, 0, 0, 0)
    number = ctypes.c_long(_CALLS[platform.machine()]["mount_setattr"])
    where = (ctypes.c_long(-100), path.encode(), ctypes.c_ulong(flags & _AT_RECURSIVE))
    _check(_LIBC.syscall(number, *where, wanted, ctypes.c_ulong(len(wanted))), f"making {path} read-only")


def _is_mapped(uid: int) -> bool:
    with open("/proc/self/uid_map") as lines:
        return any(int(first) <= uid < int(first) + int(count) for first, _, count in map(str.split, lines))


def _enter_namespaces() -> int:
    """Leave the machine's namespaces, and return the user id for the program. Root keeps its rights until
    ``_drop_rights``; other users get rights in a new user namespace, where these have no effect outside."""
    uid = _FIRST_UID + os.getpid()
    flags = _NEW_FS | _NEW_PIDS | _NEW_NET | _NEW_IPC | _NEW_NAMES | _NEW_CGROUPS
    as_root = os.geteuid() == 0 and _is_mapped(uid)
    outer_uid, outer_gid = os.geteuid(), os.getegid()
    _check(_LIBC.unshare(ctypes.c_int(flags if as_root else flags | _NEW_USER)), "entering new namespaces")
    if as_root:
        return uid
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{_NOBODY} {outer_uid} 1"),
        ("gid_map", f"{_NOBODY} {outer_gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return _NOBODY


def _show(path: str) -> None:
    """Show a file or directory of the old root at the same place of the new one, read-only."""
    old = "/old" + path
    if os.path.islink(old):
        os.symlink(os.readlink(old), path)
    elif os.path.exists(old):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if os.path.isdir(old):
            os.mkdir(path)
        else:
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
        _mount(old, path, None, _MS_BIND | _MS_REC)
        if path not in _DEVICES:
            _harden(path, _ATTR_READ_ONLY | _AT_RECURSIVE)


def _build_root(uid: int, max_file_bytes: int) -> None:
    """Build a new root: the system's libraries and Python, read-only, and an empty /tmp in memory, without /proc and
    /home."""
    python, real_python = sys.base_prefix, os.path.realpath(sys.base_prefix)
    os.umask(0o022)
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID, "size=1m,nr_inodes=256,mode=755")
    os.chdir("/tmp")
    os.mkdir("old")
    number = ctypes.c_long(_CALLS[platform.machine()]["pivot_root"])
    _check(_LIBC.syscall(number, b".", b"old"), "changing the root")
    os.chdir("/")
    for path in (*_SYSTEM_DIRECTORIES, *_DEVICES, real_python):
        if not os.path.lexists(path):  # Python's is often below /usr
            _show(path)
    if not os.path.lexists(python):
        os.makedirs(os.path.dirname(python), exist_ok=True)
        os.symlink(real_python, python)
    os.mkdir("/tmp")
    options = f"size={max_file_bytes},nr_inodes=1024,mode=700,uid={uid},gid={uid}"
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    _check(_LIBC.umount2(b"/old", ctypes.c_int(_DETACH)), "leaving the old root")
    os.rmdir("/old")
    _harden("/", _ATTR_READ_ONLY)
    os.chdir("/tmp")


def _drop_rights(uid: int) -> None:
    if os.geteuid() != uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    _check(_LIBC.syscall(ctypes.c_long(_CALLS[platform.machine()]["capset"]), header, none), "dropping capabilities")
    # Changing the user clears a death signal, so it is set only now.
    _prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    _prctl(_SET_NO_NEW_PRIVILEGES, 1)


def _prctl(option: int, *values: object) -> None:
    words = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in values]
    words += [ctypes.c_ulong(0)] * (4 - len(words))
    _check(_LIBC.prctl(ctypes.c_int(option), *words), f"prctl {option}")


def _limit(limits: dict, processes_outside: int) -> None:
    cpu = math.ceil(limits["cpu_seconds"])
    for what, soft, hard in (
        (resource.RLIMIT_AS, limits["memory_bytes"], limits["memory_bytes"]),
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_NPROC, *[limits["max_processes"] + processes_outside] * 2),
        (resource.RLIMIT_FSIZE, limits["max_file_bytes"], limits["max_file_bytes"]),
        (resource.RLIMIT_NOFILE, 64, 64),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
    ):
        allowed = resource.getrlimit(what)[1]
        if allowed != resource.RLIM_INFINITY:
            soft, hard = min(soft, allowed), min(hard, allowed)
        resource.setrlimit(what, (soft, hard))


def _filter_calls() -> None:
    """Install a seccomp filter: no sockets, no new namespaces, no shared memory beyond the limits."""
    calls = _CALLS[platform.machine()]
    kill, allow, refuse = 0x80000000, 0x7FFF0000, 0x50000
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    rules = [
        (load, 0, 0, 4),  # the machine whose calls these are
        (equal, 1, 0, calls["audit"]),
        (give, 0, 0, kill),
        (load, 0, 0, 0),  # the call's number
        (at_least, 0, 1, 0x40000000),  # x32's second table of the same calls
        (give, 0, 0, kill),
        (equal, 0, 1, calls["clone3"]),
        (give, 0, 0, refuse | errno.ENOSYS),
    ]
    for number in calls["refused"]:
        rules += [(equal, 0, 1, number), (give, 0, 0, refuse | errno.EPERM)]
    namespaces = _NEW_FS | _NEW_USER | _NEW_PIDS | _NEW_NET | _NEW_IPC | _NEW_NAMES | _NEW_CGROUPS
    rules += [
        (equal, 0, 3, calls["clone"]),
        (load, 0, 0, 16),  # its first argument: flags
        (any_bit, 0, 1, namespaces),
        (give, 0, 0, refuse | errno.EPERM),
        (give, 0, 0, allow),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    program = struct.pack("HP", len(rules), ctypes.addressof(code))
    _prctl(_SET_SECCOMP, 2, program)


def _program(source: str, token: str, end_fd: int) -> None:
    """Run the source as ``__main__`` and never return. Names that the end needs are bound now, because the source may
    rebind them."""
    write, leave, process, own_process = os.write, os._exit, os.getpid(), os.getpid
    describe, note_bytes = traceback.format_exception_only, _NOTE_BYTES
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        exec(compile(source, "program.py", "exec"), module.__dict__)
    except BaseException as error:  # SystemExit and all: the program did not reach its end
        lines = [line for line in describe(error) if line.strip()]
        write(end_fd, lines[-1].strip().encode(errors="replace")[:note_bytes])
    else:
        if own_process() == process:
            write(end_fd, token.encode())
        leave(0)
    finally:
        leave(1)


def _init(order: dict, report_fd: int, uid: int) -> None:
    """Process 1: build, restrict, run, report. When it ends, every process inside ends."""
    limits = order["limits"]
    _build_root(uid, limits["max_file_bytes"])
    _drop_rights(uid)
    # Init itself counts, and outside of it, with the same user, the process that waits for it.
    _limit(limits, processes_outside=1 if uid != _NOBODY else 2)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    _filter_calls()
    end, end_write = os.pipe()
    os.write(report_fd, b"ready\n")
    child = os.fork()
    if child == 0:
        os.close(report_fd)
        os.close(end)
        _program(order["source"], order["token"], end_write)
    os.close(end_write)
    pid = 0
    while pid != child:
        pid, status = os.wait()
    os.set_blocking(end, False)
    try:
        note = os.read(end, _NOTE_BYTES)
    except BlockingIOError:  # nothing in it, and somebody still holds the other end
        note = b""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = {
        "exit": os.waitstatus_to_exitcode(status),
        "note": note.decode(errors="replace"),
        "cpu_seconds": used.ru_utime + used.ru_stime,
    }
    os.write(report_fd, json.dumps(report).encode())


def main() -> None:
    """Run, without ever letting its own exception look like the program's."""
    order = json.load(sys.stdin)
    report_fd = order["report_fd"]
    try:
        if platform.machine() not in _CALLS:
            raise Refused(f"this machine is {platform.machine()}; expected one of {', '.join(_CALLS)}")
        _prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
        uid = _enter_namespaces()
        init = os.fork()
        if init == 0:
            _init(order, report_fd, uid)
        else:
            os.close(report_fd)
            os.waitpid(init, 0)
    except (Refused, OSError, ValueError) as error:
        os.write(report_fd, json.dumps({"refused": str(error)}).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
