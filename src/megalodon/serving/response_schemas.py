"""What requests to `/v1/responses` may contain: items of many kinds, which answers have and clients send back.

Fields are honoured, ignored or refused by name as in `schemas`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, Union

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, model_validator

from megalodon.serving.errors import ApiError
from megalodon.serving.fields import ignored, refused
from megalodon.serving.schemas import MOST_MESSAGES, Flag, Generating, JsonSchema, Key, Message, Part, Strict, Value
from megalodon.serving.texts import NUMBER, Text, Written, at_most, short


class InputMessage(Message):
    """A message, as a person writes it or as an answer had it. Its roles are fewer than those in chats."""

    role: Literal["system", "developer", "user", "assistant"]
    type: Literal["message"] | None = None
    status: Any = ignored("they are complete")
    phase: Any = ignored("nothing for the model")


class InputReference(Strict):
    """A kept answer, by its id."""

    type: Literal["item_reference"]
    id: Annotated[str, Field(max_length=256)]


class InputCall(Strict):
    """A call of a tool, as other models make it: for the model it is one of `tool_calls`."""

    type: Literal["function_call"]
    name: Annotated[str, Field(max_length=256)]
    arguments: Written
    call_id: str
    namespace: str | None = None
    id: Any = ignored("items are told apart by their place")
    status: Any = ignored("they are complete")
    caller: Any = ignored("nothing for the model")
    async_: Any = Field(None, alias="async", json_schema_extra={"policy": "ignored"})

    def as_message(self) -> Message:
        """It, as chats have it."""
        name = self.name if self.namespace is None else f"{self.namespace}.{self.name}"
        called = {"name": name, "arguments": self.arguments}
        return Message(role="assistant", tool_calls=[{"id": self.call_id, "type": "function", "function": called}])


class InputCallOutput(Strict):
    """What a tool gave: for the model a message of role `tool`."""

    type: Literal["function_call_output"]
    output: Text | Annotated[list[Part], Field(min_length=1, max_length=4096, fail_fast=True)]
    call_id: str | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    namespace: Any = ignored("the call has it")
    id: Any = ignored("items are told apart by their place")
    status: Any = ignored("they are complete")
    caller: Any = ignored("nothing for the model")

    def as_message(self) -> Message:
        """It, as chats have it."""
        return Message(role="tool", content=self.output, tool_call_id=self.call_id, name=self.name)


class InputReasoning(BaseModel):
    """What a model thought: not shown to the model again, whatever it holds."""

    type: Literal["reasoning"]


ITEMS: dict[str, type[BaseModel]] = {
    "message": InputMessage,
    "item_reference": InputReference,
    "function_call": InputCall,
    "function_call_output": InputCallOutput,
    "reasoning": InputReasoning,
}
"""The items of `input` by their `type`; one without is a message. Others, of tools that are not here, are refused."""


def _tag_of(value: Any) -> str | None:
    """Which of `ITEMS` a value is to be; with a space, so that it is no part of a field's name in errors."""
    kind = value.get("type") if isinstance(value, dict) else None  # the error says that an object is expected
    kind = "message" if kind is None else kind
    return f"an {kind}" if isinstance(kind, str) and kind in ITEMS else None


_TAGGED: Any = Union[tuple(Annotated[model, Tag(f"an {name}")] for name, model in ITEMS.items())]  # noqa: UP007
InputItem: TypeAlias = Annotated[
    _TAGGED,
    Discriminator(
        _tag_of,
        custom_error_type="item_type",
        custom_error_message=f"the field type of an item is one of {', '.join(ITEMS)}",
    ),
]
Items = Annotated[list[InputItem], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]


class ResponseTextFormat(JsonSchema):
    """The form of a response's text."""

    type: Literal["text", "json_object", "json_schema"] = "text"


class ResponseText(Strict):
    """`text` of a response."""

    format: ResponseTextFormat | None = None
    verbosity: Any = ignored("ask for it in words")


class ResponsesRequest(Generating):
    """`POST /v1/responses`."""

    input: Text | Items = Field(
        description="a text, or messages, kept answers, calls of tools and what those gave; `reasoning` is left out"
    )
    instructions: Annotated[Text, BeforeValidator(short)] | None = Field(
        None, description="a system message before the input"
    )
    max_output_tokens: Annotated[int, NUMBER, Field(ge=1, le=2**31)] | None = Field(
        None, description="`--default-tokens` if not given"
    )
    previous_response_id: str | None = Field(None, max_length=80, description="go on after this one, kept as a context")
    store: Flag = Field(True, description="keep the response as a context, to go on from")
    metadata: Annotated[dict[Key, Value], at_most(16)] | None = Field(None, description="up to 16 strings, given back")
    text: ResponseText | None = Field(None, description="`format`: `text`, `json_object` or `json_schema`")
    top_logprobs: Annotated[int, NUMBER, Field(ge=0, le=20)] | None = Field(None, description="with `include`")
    include: list[str] | None = Field(
        None, max_length=16, description="`message.output_text.logprobs`; nothing else is there"
    )
    truncation: Literal["auto", "disabled"] | None = Field(None, description="nothing is ever cut off")

    n: refused("a response has one answer", 1) = None  # type: ignore[valid-type]
    response_format: refused("use `text.format`") = None  # type: ignore[valid-type]
    save_context: refused("use `store`", False) = False  # type: ignore[valid-type]
    background: refused("answers are given at once", False) = None  # type: ignore[valid-type]
    conversation: refused("use `previous_response_id`") = None  # type: ignore[valid-type]
    background_options: refused("answers are given at once") = None  # type: ignore[valid-type]
    prompt: refused("prompts are not kept here") = None  # type: ignore[valid-type]
    context_management: refused("nothing is cut off or summed up", []) = None  # type: ignore[valid-type]
    image: refused("this model sees and makes no pictures") = None  # type: ignore[valid-type]
    access_programs: refused("there are none", []) = None  # type: ignore[valid-type]
    max_tool_calls: Any = ignored("there are no tool calls")

    @model_validator(mode="after")
    def _one_beginning(self) -> ResponsesRequest:
        if self.previous_response_id is not None and self.context is not None:
            message = "previous_response_id: give it or context, not both"
            raise ApiError(400, message, "invalid_value", "previous_response_id")
        return self
