# SPDX-License-Identifier: Apache-2.0
"""Replicas: how requests are cut, and that answers are those of one engine, with a stub of Ray and with Ray itself."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from lm_eval.api.instance import Instance

from tests.engine.tiny_llm import save_tiny
from tests.evaluate.eval_data import write_small_sets
from tests.evaluate.result_files import samples, without_time
from wedlm.engine.llm import LLM
from wedlm.evaluate.harness import EngineBackend
from wedlm.evaluate.provenance import model_provenance
from wedlm.evaluate.run import Evaluation, load_tasks
from wedlm.evaluate.settings import Params, Settings
from wedlm.evaluate.workers import RayBackend, cut

TASKS = ("gsm8k", "arc_e", "mmlu")
PARAMS = Params(max_tokens=12, window_size=4, temperature=0.7, seed=3)


class StubRay(ModuleType):
    """Ray's calls that are used here, in this process; parts come back in the wrong order."""

    def __init__(self, resources):
        super().__init__("ray")
        self.resources, self.actors, self.parts = resources, [], []
        self.util, self.exceptions = ModuleType("ray.util"), ModuleType("ray.exceptions")
        self.util.ActorPool = lambda actors: SimpleNamespace(map_unordered=lambda f, v: self._map(actors, f, v))
        self.exceptions.RayTaskError = type("RayTaskError", (Exception,), {})

    def is_initialized(self):
        return True

    def cluster_resources(self):
        return self.resources

    def remote(self, cls):
        return SimpleNamespace(
            options=lambda **needs: SimpleNamespace(remote=lambda *args: self._actor(cls(*args), needs))
        )

    def get(self, values):
        return values

    def _actor(self, instance, needs):
        self.actors.append(needs)
        return SimpleNamespace(
            **{name: SimpleNamespace(remote=getattr(instance, name)) for name in ("facts", "compute")}
        )

    def _map(self, actors, function, values):
        self.parts.append(len(values))
        return [function(actors[value % len(actors)], value) for value in reversed(values)]


@pytest.fixture
def stub(monkeypatch):
    def install(**resources):
        ray = StubRay(resources)
        for name, module in (("ray", ray), ("ray.util", ray.util), ("ray.exceptions", ray.exceptions)):
            monkeypatch.setitem(sys.modules, name, module)
        return ray

    return install


@pytest.fixture
def directory(tmp_path):
    return save_tiny(tmp_path / "tiny", max_position_embeddings=768)


def options(directory):
    return {"model": str(directory), "device": "cpu", "dtype": "float32", "max_num_seqs": 2}


def results(backend, tmp_path, name):
    settings = Settings(TASKS, write_small_sets(tmp_path / "data"), tmp_path / name, num_fewshot=1)
    evaluation = Evaluation(backend, settings, load_tasks(settings))
    record = evaluation.run(PARAMS, {})
    lines = {task: [without_time(line) for line in samples(evaluation, record, task)] for task in TASKS}
    return record, lines


def of_one_worker(directory, tmp_path):
    llm = LLM(**options(directory))
    return results(EngineBackend(llm, model_provenance(llm, str(directory), None)), tmp_path, "one")


def same(one, many):
    """Everything but times, devices, and how many rows sharing prompts has spared."""
    (record, lines), (others, other_lines) = one, many
    assert others["key"] == record["key"]
    assert other_lines == lines
    for name, task in record["tasks"].items():
        assert others["tasks"][name]["metrics"] == task["metrics"]


@pytest.mark.parametrize(("num_questions", "num_parts", "sizes"), [(7, 3, [3, 3, 1]), (2, 8, [1, 1]), (0, 4, [])])
def test_parts_keep_questions_whole(num_questions, num_parts, sizes):
    requests = [
        Instance("loglikelihood", {}, ("c", str(i)), i, metadata=("t", doc, 1))
        for doc in range(num_questions)
        for i in (0, 1)
    ]

    parts = cut(requests, num_parts)

    assert [request for part in parts for request in part] == requests
    assert [len({request.doc_id for request in part}) for part in parts] == sizes
    assert all(len(part) == 2 * size for part, size in zip(parts, sizes, strict=True))


def test_replicas_answer_as_one_engine(directory, tmp_path, stub):
    ray = stub(CPU=2)

    backend = RayBackend(options(directory), 2)

    assert ray.actors == [{"num_gpus": 0, "num_cpus": 1}] * 2
    many = results(backend, tmp_path, "many")
    assert min(ray.parts) > 2
    assert many[0]["model"]["device"] == "2 x cpu"
    assert many[0]["environment"]["device_name"].startswith("2 x ")
    same(of_one_worker(directory, tmp_path), many)


def test_too_many_workers_are_refused(directory, stub):
    stub(CPU=3)
    with pytest.raises(
        ValueError, match="--workers is 2, and each takes 2 CPU; expected at most the 3 CPUs that Ray has"
    ):
        RayBackend(options(directory), 2, threads=2)
    stub(CPU=8, GPU=1)
    with pytest.raises(ValueError, match="--workers is 2, and each takes 1 GPU"):
        RayBackend({**options(directory), "device": "auto"}, 2)
    with pytest.raises(ValueError, match="--device is cuda:1; expected auto, cuda or cpu with --workers"):
        RayBackend({**options(directory), "device": "cuda:1"}, 1)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_two_workers_of_ray_answer_as_one_engine(directory, tmp_path, record_property):
    import ray

    ray.init(num_cpus=2, address="local", include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        many = results(RayBackend(options(directory), 2), tmp_path, "many")
        with pytest.raises(ValueError, match="bfloat17"):
            RayBackend({**options(directory), "dtype": "bfloat17"}, 1)
    finally:
        ray.shutdown()
    same(of_one_worker(directory, tmp_path), many)
    record_property("answers", sum(task["num_samples"] for task in many[0]["tasks"].values()))
