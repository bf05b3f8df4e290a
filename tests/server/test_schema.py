# SPDX-License-Identifier: Apache-2.0
"""schemathesis: requests made from the server's own OpenAPI document, good and bad; no answer is a 5xx."""

import json
from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode

from tests.server.running import MODEL, Running

OPERATIONS = 20
FIRST, THEN = {"model": MODEL}, {"model": MODEL, "n": 1}
USER, OLLAMA = [{"role": "user", "content": "x"}], {"num_predict": 4}
TALK, PROMPT = {**THEN, "messages": [{"role": "user", "content": "x"}]}, {**THEN, "prompt": "x"}
LORA = {"lora_name": "x"}
FEW = {"max_tokens": 4, "logit_bias": {}, "seed": 1}
# What is put right in a request, one thing after another: most would only learn of the first that is wrong.
TAME = {
    "/v1/chat/completions": [FIRST, THEN, TALK, {**TALK, **FEW, "max_completion_tokens": None}],
    "/v1/completions": [FIRST, THEN, PROMPT, {**PROMPT, **FEW}],
    "/v1/responses": [FIRST, THEN, {**THEN, "input": "x"}, {**THEN, "input": "x", "max_output_tokens": 4}],
    "/v1/messages": [FIRST, FIRST, {**FIRST, "messages": USER}, {**FIRST, "messages": USER, "max_tokens": 4}],
    "/v1/messages/count_tokens": [FIRST, FIRST, FIRST, {**FIRST, "messages": USER}],
    "/api/chat": [FIRST, FIRST, {**FIRST, "messages": USER}, {**FIRST, "messages": USER, "options": OLLAMA}],
    "/api/generate": [FIRST, FIRST, {**FIRST, "prompt": "x"}, {**FIRST, "prompt": "x", "options": OLLAMA}],
    "/tokenize": [FIRST, FIRST, FIRST, {"prompt": "x"}],
    "/detokenize": [FIRST, FIRST, FIRST, {"tokens": [1]}],
    "/v1/load_lora_adapter": [LORA, LORA, LORA, {**LORA, "lora_path": "x"}],
    "/v1/unload_lora_adapter": [LORA] * 4,
}


def check_operations(running: Running, cases: int) -> Counter:
    """``cases`` in all; those that get past the checks generate at most a few tokens. Statuses seen."""
    schema = schemathesis.openapi.from_url(f"{running.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) == OPERATIONS
    statuses: Counter = Counter()
    posts = [operation for operation in operations if operation.method == "post"]
    each = (cases - 10 * (len(operations) - len(posts))) // (2 * len(posts))
    quiet = settings(
        max_examples=each,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for operation in operations:
        for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:
            if operation not in posts and mode is GenerationMode.NEGATIVE:
                continue
            count = each if operation in posts else 10

            @settings(quiet, max_examples=count)
            @given(case=operation.as_strategy(generation_mode=mode), tame=st.integers(0, 4))
            def check(case, tame):
                if tame and isinstance(case.body, dict):
                    case.body = {**case.body, **TAME[case.path][tame - 1]}
                answer = case.call(timeout=60)
                case.validate_response(answer, checks=[not_a_server_error])
                statuses[answer.status_code] += 1

            check()
    return statuses


def test_no_request_fails_the_server(running):
    statuses = check_operations(running, 200)
    assert sum(statuses.values()) >= 150
    assert statuses[400] > 20
    running.settled()


@pytest.mark.long
def test_no_request_of_2000_fails_the_server(running, record_property):
    statuses = check_operations(running, 2200)
    record_property("statuses", json.dumps(dict(sorted(statuses.items()))))
    assert sum(statuses.values()) >= 2000
    assert statuses[200] > 100
    assert statuses[400] > 200
    running.settled()
