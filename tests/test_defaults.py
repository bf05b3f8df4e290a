# SPDX-License-Identifier: Apache-2.0
"""One home for defaults: wherever a decoding parameter or an option of the engine can be given, it has the same name
and default, or a difference that stands here with its reason."""

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

import pytest
import typer

from wedlm import LLM
from wedlm.algorithm.params import DecodeParams
from wedlm.bench.settings import Settings as BenchSettings
from wedlm.bench.settings import Workload
from wedlm.cli import app
from wedlm.cli.options import option_of
from wedlm.engine.options import EngineConfig, EngineOptions
from wedlm.engine.sampling_params import SamplingParams
from wedlm.evaluate.settings import PARAM_NAMES, Params, make_params


def defaults(of: Any) -> dict[str, Any]:
    return {field.name: field.default for field in fields(of)}


def sampling(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in HOME}


def command(name: str) -> dict[str, Any]:
    """The options of a command and their defaults."""
    parameters = typer.main.get_command(app).commands[name].params  # type: ignore[attr-defined]
    return {parameter.name: parameter.default for parameter in parameters}


ENGINE = defaults(EngineOptions)
HOME = defaults(SamplingParams)
# What text depends on. Each place must have all of these.
DECODING = (
    "decoding",
    "wedlm_window_size",
    "wedlm_entropy_threshold",
    "wedlm_pos_penalty_factor",
    "wedlm_next_token",
    "wedlm_draft_entropy",
    "temperature",
    "top_p",
    "top_k",
)
SHORT = {option_of(name): name for name in HOME}  # as the command line, results and DecodeParams have them


def long(found: Mapping[str, Any]) -> dict[str, Any]:
    """Under the names of SamplingParams, where it has them."""
    return {SHORT[name]: value for name, value in found.items() if name in SHORT}


def check(found: Mapping[str, Any], on_purpose: Mapping[str, Any], lacking: tuple[str, ...] = ()) -> None:
    """``on_purpose``: defaults that differ; ``lacking``: names of DECODING that the place does not have."""
    assert set(found) <= set(HOME)
    assert set(DECODING) - set(found) == set(lacking)
    meaning = {
        "decoding": EngineConfig(2, 1, (), 9).decoding,
        "wedlm_window_size": EngineConfig(2, 1, (), 9).window_size("auto"),
        "wedlm_next_token": EngineConfig(2, 1, (), 9).next_token,
        "wedlm_entropy_threshold": EngineConfig(2, 1, (), 9).entropy_threshold,
    }  # of None, and of "auto"
    for name, default in found.items():
        default = meaning.get(name) if default in (None, (), "auto") else default
        home = meaning.get(name, HOME[name]) if HOME[name] in (None, "auto") else HOME[name]
        assert default == on_purpose.get(name, home), name
        assert name not in on_purpose or on_purpose[name] != home, f"{name} differs no more"


def test_drift_is_found():
    """A test that sees no difference passes always."""
    found = sampling(SamplingParams())
    check(found, {})
    for name in DECODING:
        with pytest.raises(AssertionError):
            check({**found, name: 0.123}, {})
        with pytest.raises(AssertionError):
            check({other: found[other] for other in found if other != name}, {})
    with pytest.raises(AssertionError):
        check({**found, "temprature": 0.0}, {})


def test_decode_params():
    found = {name: default for name, default in long(defaults(DecodeParams)).items() if default is not MISSING}
    # It is made once a request is known: its mode is given, and its seed drawn.
    check(found, {"seed": 0, "wedlm_lookup_drafts": 0}, lacking=("decoding",))


def test_generate_in_transformers():
    from wedlm.hf.arguments import Arguments

    renamed = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
    found = {renamed.get(name, name): default for name, default in defaults(Arguments).items()}
    assert found.pop("max_tokens") is None  # it, or max_length, must be given
    assert found["temperature"] is None  # 1 with do_sample, which transformers' users expect, and otherwise ours
    found["temperature"] = HOME["temperature"]
    check({name: default for name, default in found.items() if name in HOME}, {})


def test_params_of_an_evaluation():
    # Benchmarks want a mode whose rows do not depend on the load, a seed, and room for a worked answer.
    on_purpose = {"decoding": "verified", "seed": 0, "max_tokens": 512}
    check(long(defaults(Params)), on_purpose)
    check(long(vars(make_params("default", {}))), on_purpose)
    params = sampling(Params().sampling_params())
    check({name: params[name] for name in DECODING}, {"decoding": "verified"})


def test_the_servers_requests():
    from wedlm.server.protocol import CompletionRequest

    # OpenAI's default temperature is 1; the server gives the limit of tokens.
    found = sampling(CompletionRequest(model="m", prompt="p").sampling_params(HOME["max_tokens"]))
    check(found, {"temperature": 1.0})
    ours = set(DECODING) | {"seed", "stop", "min_tokens", "ignore_eos", "stop_token_ids", "logit_bias"}
    assert ours <= set(CompletionRequest.model_fields), "a parameter that no client can give"


@pytest.mark.parametrize(
    ("name", "on_purpose", "lacking"),
    [
        ("generate", {}, ()),
        ("chat", {"max_tokens": 512}, ()),  # one answer at a time, and nothing else waits
        ("bench", {}, ("decoding", "temperature", "top_p", "top_k")),  # it has --modes, at temperature 0
    ],
)
def test_commands(name, on_purpose, lacking):
    check(long(command(name)), on_purpose, lacking)


def test_eval_has_every_parameter_and_leaves_it_to_the_protocol():
    found = command("eval")
    assert {name: found[name] for name in PARAM_NAMES} == dict.fromkeys(PARAM_NAMES)


def test_settings_of_a_bench():
    amounts = Workload.of(on_gpu=False, random_weights=False)
    settings = BenchSettings((), (), amounts)
    check(sampling(settings.params("auto", HOME["max_tokens"])), {})
    assert settings.dtype == ENGINE["dtype"]
    assert settings.device == ENGINE["device"]


@pytest.mark.parametrize("name", ["generate", "chat", "demo", "serve", "eval", "bench"])
def test_options_of_the_engine(name):
    """What a command has of them it has under their name and with their default."""
    found = command(name)
    own = {option_of(option): option for option in ENGINE}
    shared = {short: option for short, option in own.items() if short in found and option not in DECODING}
    assert {"dtype", "device", "adapter"} <= set(shared)
    for short, option in shared.items():
        assert found[short] == ENGINE[option], option


def test_serve_has_every_option_of_the_engine():
    found = command("serve")
    assert {option_of(option): default for option, default in ENGINE.items()} == {
        option_of(option): found[option_of(option)] for option in ENGINE
    }


def test_the_engine_and_llm_take_them():
    assert EngineConfig(2, 1, (), 9).options == EngineOptions()
    assert [p.kind for p in inspect.signature(LLM).parameters.values()][-1] is inspect.Parameter.VAR_KEYWORD
    with pytest.raises(TypeError, match="expected one of dtype,"):
        LLM("demo", dtyp="float32")
