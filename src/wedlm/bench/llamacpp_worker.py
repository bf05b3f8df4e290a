# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's server in a separate process: ``python -m wedlm.bench.llamacpp_worker TASK``, as called by
``wedlm.bench.llamacpp``.

TASK is JSON. The first line on standard output is JSON with the server's address and what its build uses. Then it
serves until standard input ends, so that it never outlives the process that started it.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import traceback
from typing import Any


def serve_wheel(task: dict[str, Any]) -> Any:
    """A server from the wheel ``xllamacpp``. It lives as long as the returned object."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = task["model"]
    params.n_ctx, params.n_parallel = task["context"] * task["slots"], task["slots"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = task["threads"]
    params.fit_params, params.warmup, params.verbosity = False, True, 0
    if task["speculation"]:
        params.speculative.types = [
            getattr(xllamacpp.common_speculative_type, f"COMMON_SPECULATIVE_TYPE_{task['speculation'].upper()}")
        ]
    server = xllamacpp.Server(params)
    tell(server.listening_address, xllamacpp.get_system_info(), f"xllamacpp {xllamacpp.__version__}")
    return server


def serve_binary(task: dict[str, Any], children: "list[subprocess.Popen[bytes]]") -> None:
    """A ``llama-server`` that the user has built, noted in ``children``; it answers once the weights are loaded."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    threads = str(task["threads"])
    command = [
        *(task["binary"], "--model", task["model"], "--host", "127.0.0.1", "--port", str(port)),
        *("--ctx-size", str(task["context"] * task["slots"]), "--parallel", str(task["slots"])),
        *("--threads", threads, "--threads-batch", threads, "--fit", "off"),
        *(["--spec-type", task["speculation"].replace("_", "-")] if task["speculation"] else []),
    ]
    version = subprocess.run([task["binary"], "--version"], capture_output=True, text=True, check=False, timeout=20)
    lines = [line for line in version.stderr.splitlines() if line.startswith("version")]
    children.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr))
    tell(f"http://127.0.0.1:{port}", "a build of your own", (lines or ["llama-server"])[0])


def tell(address: str, system: str, version: str) -> None:
    """Print one line for the process that started this one."""
    print(json.dumps({"address": address, "system": system.strip(), "version": version}), flush=True)


def end_with_input(children: "list[subprocess.Popen[bytes]]") -> None:
    """End the process when standard input ends, whatever it is doing, because nothing else ends the wheel's threads."""
    try:
        sys.stdin.buffer.read()
    finally:
        for child in children:
            child.kill()
            child.wait()
        os._exit(0)


def main() -> None:
    task, children = json.loads(sys.argv[1]), []  # type: ignore[var-annotated]
    watch = threading.Thread(target=end_with_input, args=(children,))
    watch.start()
    try:
        if task["binary"]:
            serve_binary(task, children)
        else:
            kept = serve_wheel(task)  # noqa: F841
    except BaseException:
        traceback.print_exc()
        for child in children:
            child.kill()
        os._exit(1)
    watch.join()


if __name__ == "__main__":
    main()
