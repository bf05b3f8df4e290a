# SPDX-License-Identifier: Apache-2.0
"""The parts of a request that concern tools and the form of the answer."""

from functools import cache, partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, PydanticKnownError

from wedlm.engine.sampling_params import MAX_SCHEMA_DEPTH, depth_within
from wedlm.server.neutral import Place, described, without_neutral

MAX_TOOLS, MAX_FIELDS = 128, 256
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


def _flat_enough(schema: dict[str, Any]) -> dict[str, Any]:
    if not depth_within(schema, MAX_SCHEMA_DEPTH - 8):  # it becomes a part of a larger one
        raise ValueError(f"a JSON schema nested at most {MAX_SCHEMA_DEPTH - 8} deep")
    return schema


Schema = Annotated[dict[str, Any], AfterValidator(_flat_enough)]


def _add_neutral(schema: dict[str, Any], model: "type[Strict]") -> None:
    schema["properties"] = {**described(model.places), **schema.get("properties", {})}


class Strict(BaseModel):
    """Refuses unknown fields and converts nothing: "5" is not a number. Fields that ask for nothing are dropped
    (``neutral.py``)."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_add_neutral)
    places: ClassVar[tuple[Place, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        value = _at_most(MAX_FIELDS, value)
        return without_neutral(cls.places, value, cls._names()) if isinstance(value, dict) else value

    @classmethod
    @cache
    def _names(cls) -> frozenset[str]:
        return frozenset(field.alias or name for name, field in cls.model_fields.items())


def _at_most(count: int, value: Any) -> Any:
    """Checks the number of entries before each is checked, because pydantic makes an error of each wrong one, and only
    one is ever shown."""
    if isinstance(value, dict) and len(value) > count:
        raise PydanticCustomError("too_many_fields", f"an object of at most {count} fields")
    return value


def few(count: int) -> BeforeValidator:
    """At most ``count`` entries in a dict."""
    return BeforeValidator(partial(_at_most, count))


class Function(Strict):
    """A tool's name, what it is for, and the JSON schema of its arguments (default: an object of any kind)."""

    places: ClassVar[tuple[Place, ...]] = ("tool",)
    name: ToolName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None  # arguments keep to the schema in any case where the call is forced


class Tool(Strict):
    """A function, the only kind of tool."""

    places: ClassVar[tuple[Place, ...]] = ("tool",)
    type: Literal["function"]
    function: Function


class FunctionName(Strict):
    """A function that must be called."""

    name: ToolName


class NamedChoice(Strict):
    """A ``tool_choice`` that names the tool."""

    type: Literal["function"]
    function: FunctionName


class CalledFunction(Strict):
    """A call in a message; ``arguments`` is JSON text."""

    places: ClassVar[tuple[Place, ...]] = ("call",)
    name: str
    arguments: str


class ToolCall(Strict):
    """A call that an earlier answer made, as clients send it back."""

    places: ClassVar[tuple[Place, ...]] = ("call",)
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class JsonSchema(Strict):
    """The ``json_schema`` of a ``response_format``; without a schema any JSON object will do."""

    name: ToolName
    description: str | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None  # the answer keeps to the schema in any case


class ResponseFormat(Strict):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[JsonSchema | None, Field(validate_default=True)] = None

    @field_validator("json_schema")
    @classmethod
    def _belongs_to_its_type(cls, value: JsonSchema | None, info: ValidationInfo) -> JsonSchema | None:
        kind = info.data.get("type")
        if kind == "json_schema" and value is None:
            raise PydanticKnownError("missing")
        if kind in ("text", "json_object") and value is not None:
            raise ValueError("no json_schema with this type")
        return value

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The schema of the answer; None if it is free."""
        if self.type == "text":
            return None
        given = None if self.json_schema is None else self.json_schema.schema_
        return {"type": "object"} if given is None else given
