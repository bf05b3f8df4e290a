# SPDX-License-Identifier: Apache-2.0
"""The manifests name only what exists here, and fit each other; and the gauges that the endpoint picker reads."""

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.tiny_llm import save_tiny
from tests.server.running import serving
from wedlm import LLM
from wedlm.cli.serve import serve

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"


@pytest.fixture(scope="module")
def objects():
    """By kind."""
    found = [one for path in FOLDER.glob("*.yaml") for one in yaml.safe_load_all(path.read_text())]
    assert len({one["kind"] for one in found}) == len(found) == 6
    return {one["kind"]: one for one in found}


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    with serving(LLM(save_tiny(tmp_path_factory.mktemp("tiny")), device="cpu")) as running:
        assert running.text("abc")
        page = running.http.get("/metrics").text
    return {family.name: family for family in text_string_to_metric_families(page)}


def test_the_objects_fit_each_other(objects):
    deployment, service = objects["Deployment"], objects["Service"]
    template = deployment["spec"]["template"]
    labels = template["metadata"]["labels"]
    (container,) = template["spec"]["containers"]
    (port,) = container["ports"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    pool = objects["InferencePool"]["spec"]
    assert pool["selector"]["matchLabels"] == labels
    assert pool["targetPorts"] == [{"number": port["containerPort"]}]
    (rule,) = objects["HTTPRoute"]["spec"]["rules"]
    assert rule["backendRefs"][0]["name"] == objects["InferencePool"]["metadata"]["name"]
    for kind in ("HorizontalPodAutoscaler", "ScaledObject"):
        assert objects[kind]["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    mounts = {one["name"] for one in container["volumeMounts"]}
    assert mounts == {one["name"] for one in template["spec"]["volumes"]}
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])


def test_options_ports_and_users_are_ours(objects):
    app = typer.Typer()
    app.command()(serve)
    known = {option for parameter in typer.main.get_command(app).params for option in parameter.opts}
    spec = objects["Deployment"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert {word for word in container["args"] if word.startswith("--")} <= known
    image = (ROOT / "deploy/Dockerfile").read_text()
    assert f"EXPOSE {container['ports'][0]['containerPort']}" in image
    assert f"--uid {spec['securityContext']['runAsUser']}" in image
    entry = next(line for line in image.splitlines() if line.startswith("ENTRYPOINT"))
    assert "serve" in shlex.split(entry.replace(",", " ").replace("[", "").replace("]", ""))
    drain = float(container["args"][container["args"].index("--shutdown-timeout") + 1])
    assert spec["terminationGracePeriodSeconds"] > drain


def test_metrics_of_the_autoscalers_are_ours(objects, families):
    metric = objects["HorizontalPodAutoscaler"]["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert families[metric].type == "gauge"
    query = objects["ScaledObject"]["spec"]["triggers"][0]["metadata"]["query"]
    assert set(re.findall(r"wedlm_\w+", query)) == {metric}


def test_gauges_of_the_endpoint_picker(families):
    named = re.findall(r"vllm:\w+", (FOLDER / "inference_pool.yaml").read_text())
    assert len(named) == 3
    for name in [*named, "vllm:num_requests_running"]:
        assert families[name].type == "gauge"
    (waiting,) = families["vllm:num_requests_waiting"].samples
    (usage,) = families["vllm:kv_cache_usage_perc"].samples
    (info,) = families["vllm:lora_requests_info"].samples
    assert waiting.value == 0
    assert 0 <= usage.value <= 1
    assert info.labels == {"max_lora": "8", "running_lora_adapters": "", "waiting_lora_adapters": ""}
    assert info.value > 1.7e9
