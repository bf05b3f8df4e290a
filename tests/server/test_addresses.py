# SPDX-License-Identifier: Apache-2.0
"""TLS, unix sockets, and a path that a proxy adds."""

import os
import shutil
import signal
import socket
import ssl
import subprocess
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest

from tests.server.asking import TEXT
from tests.server.processes import process_of
from tests.server.running import serving
from wedlm.server.config import ServerConfig
from wedlm.server.run import AddressError, tls_context, unix_socket

ASKED = {"model": "tiny", "prompt": "abc", "max_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Of localhost and 127.0.0.1, with its key in a file of its own, and both in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    files = {name: str(folder / f"{name}.pem") for name in ("cert", "key", "both", "locked")}
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", files["key"], "-out", files["cert"]]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    lock = ["openssl", "ec", "-aes128", "-passout", "pass:x", "-in", files["key"], "-out", files["locked"]]
    subprocess.run(lock, check=True, capture_output=True)
    Path(files["both"]).write_text(Path(files["cert"]).read_text() + Path(files["key"]).read_text())
    return files


@pytest.mark.parametrize("in_one_file", [False, pytest.param(True, marks=pytest.mark.long)])
def test_tls(llm, certificate, in_one_file):
    options = {"ssl_certfile": certificate["both"]}
    if not in_one_file:
        options = {"ssl_certfile": certificate["cert"], "ssl_keyfile": certificate["key"]}
    with serving(llm, header_timeout_s=1.0, **options) as running:
        trusted = ssl.create_default_context(cafile=certificate["cert"])
        with httpx2.Client(base_url=f"https://127.0.0.1:{running.port}", verify=trusted) as client:
            answer = client.post(TEXT, json=ASKED)
            assert answer.status_code == 200
            with client.stream("POST", TEXT, json={**ASKED, "stream": True}) as stream:
                assert list(stream.iter_lines())[-2] == "data: [DONE]"
            origin = {"Origin": f"https://127.0.0.1:{running.port}"}
            assert client.get("/", headers=origin).status_code == 200
        with pytest.raises(httpx2.TransportError):
            running.http.get("/health")
        # Who never shakes hands is cut off like who never sends a head.
        for told in (b"", b"\x16\x03\x01"):
            with socket.create_connection(("127.0.0.1", running.port), timeout=30) as silent:
                silent.sendall(told)
                with suppress(ConnectionResetError):
                    assert silent.recv(1) == b""


def test_files_that_are_no_certificate(certificate, tmp_path):
    (tmp_path / "x.pem").write_text("no PEM")
    files = [(str(tmp_path / "x.pem"), None), (certificate["cert"], None), (str(tmp_path / "none"), certificate["key"])]
    for cert, key in [*files, (certificate["cert"], certificate["locked"])]:
        with pytest.raises(ValueError, match=r"which cannot be used: .*; expected a certificate and its key in PEM"):
            tls_context(ServerConfig(ssl_certfile=cert, ssl_keyfile=key))
    assert tls_context(ServerConfig()) is None


def test_a_unix_socket(directory, tmp_path):
    path = str(tmp_path / "wedlm.sock")
    with process_of(directory, "--uds", path) as (process, url, _):
        assert url == f"unix:{path}"
        with httpx2.Client(transport=httpx2.HTTPTransport(uds=path), base_url="http://localhost") as client:
            answer = client.post(TEXT, json={**ASKED, "model": directory.name}).json()
            assert answer["usage"]["completion_tokens"] == 4
            assert client.get("/health").status_code == 200
        with pytest.raises(AddressError, match="cannot be used: address already in use"), unix_socket(path):
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert not os.path.exists(path)


def test_paths_of_unix_sockets(tmp_path):
    path = str(tmp_path / "x.sock")
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(path)
    with unix_socket(path) as (one,):
        assert one.getsockname() == path
    (tmp_path / "file").write_text("kept")
    for wrong in (str(tmp_path / "file"), str(tmp_path / "no" / "folder"), str(tmp_path / ("x" * 200))):
        with pytest.raises(AddressError, match="cannot be used"), unix_socket(wrong):
            pass
    assert (tmp_path / "file").read_text() == "kept"


def test_a_path_that_a_proxy_adds(llm):
    """Whether the proxy takes it off or not; and no way around the keys."""
    with serving(llm, root_path="/llm/a", api_keys=("key",)) as running:
        key = {"Authorization": "Bearer key"}
        for prefix in ("", "/llm/a"):
            assert running.http.get(f"{prefix}/v1/models", headers=key).status_code == 200
            assert running.http.post(f"{prefix}{TEXT}", json=ASKED, headers=key).status_code == 200
            for guarded in ("/v1/models", "/metrics", "/api/tags"):
                assert running.http.get(prefix + guarded).status_code == 401
            assert "<title>wedlm" in running.http.get(f"{prefix}/").text
            assert running.http.get(f"{prefix}/vendor/purify.min.js").status_code == 200
        bare = running.http.get("/llm/a")
        assert (bare.status_code, bare.headers["Location"]) == (307, "/llm/a/")
        for wrong in ("/llm", "/llm/av1/models", "/llm/a/llm/a/v1/models", "/llm/b/v1/models"):
            assert running.http.get(wrong, headers=key).status_code == 404
        assert running.http.get("/openapi.json").json()["servers"] == [{"url": "/llm/a"}]
        wrong_key = running.http.post("/llm/a/v1/messages", json={}, headers={"x-api-key": "no"})
        assert wrong_key.json()["type"] == "error", "in the form of the API whose path it is"


@pytest.mark.parametrize("root", ["llm", "/", "/llm/", "/a b", "/a//b", "/ä", "/a?b"])
def test_wrong_root_paths(root):
    with pytest.raises(ValueError, match="root_path is"):
        ServerConfig(root_path=root)
