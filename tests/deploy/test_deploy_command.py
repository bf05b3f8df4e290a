# SPDX-License-Identifier: Apache-2.0
"""What ``wedlm deploy ray`` ends when it ends: its own deployment, and no other one. Ray's calls are stubs."""

from types import SimpleNamespace

import pytest

pytest.importorskip("ray.serve")
import ray
from ray import serve

from tests.cli.command import wedlm
from tests.engine.tiny_llm import save_tiny
from wedlm.cli import deploy


class StubServe:
    """Serve with one application at most; ``then``: what happens once it runs."""

    def __init__(self, monkeypatch, deployed_at=None, fails=False, then=lambda serve: None):
        self.deployed_at, self.fails, self.then = deployed_at, fails, then
        self.deleted, self.surge, self.is_running, self.by = 0, None, False, "another command"
        self.message = "Traceback\nValueError: the replica's own words"
        for name in ("start", "run", "status", "delete", "shutdown", "get_app_handle"):
            monkeypatch.setattr(serve, name, getattr(self, name))
        monkeypatch.setattr(ray, "is_initialized", lambda: self.is_running)
        monkeypatch.setattr(ray, "shutdown", lambda: None)
        given = {"CPU": 2.0}
        one = SimpleNamespace(cluster_resources=lambda: given, available_resources=lambda: {"CPU": 1.0})
        monkeypatch.setattr(deploy, "join_ray", self.join)
        monkeypatch.setattr("wedlm.cluster.join_ray", lambda: one)
        stopping = SimpleNamespace(wait=self.wait)
        monkeypatch.setattr(deploy, "threading", SimpleNamespace(Event=lambda: stopping))

    def join(self):
        self.is_running = True

    def start(self, http_options):
        pass

    def run(self, app, name, route_prefix):
        replica = app._bound_deployment.init_args[0]._bound_deployment
        self.surge = replica._deployment_config.max_surge_percent
        self.deployed_at = (self.deployed_at or 0) + 1
        if self.fails:
            self.by = None if self.deployed_at == 1 else self.by
            raise RuntimeError("Deploying application wedlm failed")
        self.by = app._bound_deployment.init_args[2]

    def status(self):
        replica = SimpleNamespace(message=self.message)
        app = SimpleNamespace(deployments={"Replica": replica})
        return SimpleNamespace(applications={} if self.deployed_at is None else {"wedlm": app})

    def get_app_handle(self, name):
        def result(timeout_s):
            if self.by is None:
                raise TimeoutError
            return self.by

        return SimpleNamespace(deployed_by=SimpleNamespace(remote=lambda: SimpleNamespace(result=result)))

    def delete(self, name, _blocking):
        self.deleted, self.deployed_at = self.deleted + 1, None

    def shutdown(self):
        assert self.deployed_at is None

    def wait(self):
        self.then(self)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("deploy") / "tiny"))


def run(checkpoint):
    return wedlm("deploy", "ray", "--model", checkpoint, "--device", "cpu")


@pytest.mark.parametrize("before", [None, 7.0])
def test_it_ends_what_it_has_deployed(monkeypatch, checkpoint, before):
    one = StubServe(monkeypatch, before)
    assert run(checkpoint).exit_code == 0
    assert one.deleted == 1
    assert one.surge == 1  # Ray has a processor to spare


def test_it_does_not_end_what_replaced_that(monkeypatch, checkpoint):
    def replace(one):
        one.by = "another command"

    one = StubServe(monkeypatch, then=replace)
    result = run(checkpoint)
    assert result.exit_code == 0
    assert "which goes on" in result.stderr
    assert one.deleted == 0


@pytest.mark.parametrize("before", [None, 7.0])
def test_a_failure_ends_nothing_that_was_there(monkeypatch, checkpoint, before):
    one = StubServe(monkeypatch, before, fails=True)
    result = run(checkpoint)
    assert result.exit_code == 2
    assert "cannot be served: ValueError: the replica's own words" in " ".join(result.stderr.split())
    assert one.deleted == (before is None)


def test_a_wrong_path_is_told_before_serve_hears_of_it(monkeypatch, tmp_path):
    one = StubServe(monkeypatch, 7.0)
    assert run(str(tmp_path / "nothing")).exit_code == 2
    assert (one.deployed_at, one.deleted) == (7.0, 0)
