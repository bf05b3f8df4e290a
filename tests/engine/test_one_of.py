# SPDX-License-Identifier: Apache-2.0
"""``oneOf``: alternatives called exclusive are; those of common schemas are found to be; others are refused."""

import itertools
import json
import random
from typing import Annotated, Literal

import jsonschema
import pytest
from pydantic import BaseModel, Field

from tests.engine.alternatives import EXCLUSIVE, OVERLAPPING
from tests.engine.random_schemas import random_schema
from tests.engine.tiny_llm import save_tiny
from wedlm import LLM, SamplingParams
from wedlm.engine.constraints.one_of import check_one_of, exclude


class Closed(BaseModel, extra="forbid"):
    """Without further properties, of which there could be any number."""


class Cat(Closed):
    kind: Literal["cat"]
    lives: int = Field(ge=1, le=9)


class Dog(Closed):
    kind: Literal["dog", "hound"]
    good: bool


class Owner(Closed):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]


@pytest.mark.parametrize("alternatives", EXCLUSIVE, ids=str)
def test_exclusive(alternatives):
    check_one_of({"oneOf": alternatives})
    check_one_of({"type": "array", "items": {"oneOf": alternatives[::-1]}})


@pytest.mark.parametrize("alternatives", OVERLAPPING, ids=str)
def test_overlapping(alternatives):
    schema = {"type": "object", "properties": {"x": {"oneOf": alternatives}}}
    with pytest.raises(ValueError, match="oneOf has alternatives that may both hold"):
        check_one_of(schema)


def test_only_schemas_are_looked_at():
    check_one_of({"const": 5, "default": [{"oneOf": [1, 1]}], "properties": {"oneOf": {"type": "string"}}})


def test_no_instance_is_valid_under_exclusive_schemas():
    """Random schemas and values: what is called exclusive is so for jsonschema, too."""
    rng = random.Random(0)
    schemas = [random_schema(rng) for _ in range(60)] + [one for few in EXCLUSIVE for one in few]
    schemas += [
        value for schema in schemas if isinstance(schema, dict) for value in schema.get("properties", {}).values()
    ]
    schemas = [one for one in schemas if "$ref" not in json.dumps(one)]
    values = [
        None,
        True,
        False,
        0,
        1,
        1.0,
        5,
        7,
        -3,
        "",
        "x",
        "red",
        "ax",
        "fixed",
        "1",
        [],
        [1],
        {},
        {"k": "a"},
        {"k": 1},
    ]
    values += [{"k": True}, {"ok": None}, {"name": "x", "x": 1}, [None], ["ab"], [True]]
    valid = [{i for i, v in enumerate(values) if jsonschema.Draft202012Validator(s).is_valid(v)} for s in schemas]
    found = 0
    for (a, good), (b, fine) in itertools.combinations(zip(schemas, valid, strict=True), 2):
        if exclude(a, b, {}):
            found += 1
            assert not good & fine, (a, b)
    assert found > 500


@pytest.mark.parametrize("decoding", ["verified", pytest.param("streaming", marks=pytest.mark.long)])
def test_tagged_unions_of_pydantic(tmp_path, decoding):
    llm = LLM(save_tiny(tmp_path, max_position_embeddings=512), device="cpu")
    schema = Owner.model_json_schema()
    assert "oneOf" in json.dumps(schema)
    kinds = set()
    for seed in range(8):
        params = SamplingParams(json_schema=schema, temperature=1, seed=seed, max_tokens=200, decoding=decoding)
        (output,) = llm.generate("x", params)
        kinds.add(Owner.model_validate_json(output.text).pet.kind)
    assert len(kinds) > 1


def test_a_request_is_refused_alone(tmp_path):
    llm = LLM(save_tiny(tmp_path), device="cpu")
    with pytest.raises(ValueError, match=r"^json_schema is not usable: oneOf has alternatives"):
        llm.generate("x", SamplingParams(json_schema={"oneOf": OVERLAPPING[0]}))
