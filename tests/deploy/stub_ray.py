# SPDX-License-Identifier: Apache-2.0
"""Ray's calls that batch work makes, in this process: actors that end when a random number says so."""

import random
import sys
from types import ModuleType, SimpleNamespace

import pytest


class RayActorError(Exception):
    """An actor ended."""


class StubRay(ModuleType):
    """``ends(prompts)``: whether the worker at these prompts, or loading (none), ends; ``started``: all actors."""

    def __init__(self, ends, seed):
        super().__init__("ray")
        self._ends, self._random = ends, random.Random(seed)
        self.started, self._results = [], {}
        self.exceptions = ModuleType("ray.exceptions")
        self.exceptions.RayActorError = RayActorError
        self.exceptions.RayTaskError = type("RayTaskError", (Exception,), {})

    def is_initialized(self):
        return True

    def cluster_resources(self):
        return {"CPU": 8}

    def remote(self, cls):
        return SimpleNamespace(options=lambda **needs: SimpleNamespace(remote=lambda *args: self._actor(cls(*args))))

    def _actor(self, instance):
        actor = StubActor(instance)
        self.started.append(actor)
        return actor

    def kill(self, actor):
        actor.alive = False

    def wait(self, refs, num_returns, timeout):
        """One answer of a random actor: each works through what it was given in order."""
        assert refs, "there is nothing to wait for"
        assert num_returns == 1
        ended = [ref for ref in refs if not ref.actor.alive]
        if ended and self._random.random() < 0.5:
            return [self._random.choice(ended)], []
        heads = [actor.queue[0] for actor in self.started if actor.alive and actor.queue and actor.queue[0] in refs]
        if not heads:
            return [self._random.choice(ended)] if ended else [], []
        ref = self._random.choice(heads)
        if self._ends(ref.prompts):
            ref.actor.alive = False
        else:
            ref.actor.queue.pop(0)
            self._results[ref] = ref.actor.instance.answer(ref.prompts) if ref.prompts else 1
        return [ref], []

    def get(self, ref):
        if ref not in self._results:
            raise RayActorError("the process was killed")
        return self._results.pop(ref)


class StubActor:
    def __init__(self, instance):
        self.instance, self.queue, self.alive = instance, [], True
        self.answer = SimpleNamespace(remote=self._answer)
        self.load = SimpleNamespace(remote=lambda: self._answer([]))

    def _answer(self, prompts):
        ref = Ref(self, list(prompts))
        self.queue.append(ref)
        return ref


class Ref:
    def __init__(self, actor, prompts):
        self.actor, self.prompts = actor, prompts


def install(monkeypatch: pytest.MonkeyPatch, ends=lambda prompts: False, seed: int = 0) -> StubRay:
    ray = StubRay(ends, seed)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", ray.exceptions)
    return ray
