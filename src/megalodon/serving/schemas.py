"""What requests may contain: OpenAI's fields, and ours beside them. Unknown fields are refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from megalodon.inference.context_store import NAME
from megalodon.inference.sampling import LEAST, Sampling

Name = Annotated[str, StringConstraints(pattern=f"^{NAME.pattern}$")]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Seconds = Annotated[float, Field(gt=0, le=10 * 366 * 24 * 3600)]


class StreamOptions(BaseModel):
    """What a stream has besides text."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class NewContext(BaseModel):
    """How a context is kept."""

    model_config = ConfigDict(extra="forbid")
    name: Name | None = None
    expires_in: Seconds | None = None


class SaveContext(NewContext):
    """How the context after an answer is kept; `replace`: in place of the one it went on from."""

    replace: bool = False


class _Generating(BaseModel):
    """Fields that completions and chat share. Of OpenAI's fields for other things only their defaults are accepted."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    n: Annotated[int, Field(ge=1, le=128)] | None = 1  # null is the default, here and below, as for OpenAI
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: Annotated[int, Field(ge=-(2**53), le=2**53)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    store: Literal[False] | None = None

    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, lt=1)
    repetition_penalty: float = Field(1.0, ge=LEAST, le=100)
    ignore_end: bool = Field(False, description="go on after the end of a document")
    context: str | None = Field(None, max_length=80, description="id or name of a context to go on from")
    save_context: SaveContext | bool = Field(False, description="keep the context after the answer (n must be 1)")
    resume_generator: bool = Field(False, description="without a seed, draw on as the context would have")

    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        return Sampling(temperature, self.top_k, top_p, self.min_p, self.repetition_penalty)

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(_Generating):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=128)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=128)]
    ) = ""
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None

    @property
    def text(self) -> str:
        """The content in one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(BaseModel):
    """The only format of answers."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]


class ChatRequest(_Generating):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None


class ContextText(BaseModel):
    """A text for a context, as JSON. Long ones are better sent as they are, with `Content-Type: text/plain`."""

    model_config = ConfigDict(extra="forbid")
    text: str
    name: Name | None = None
    expires_in: Seconds | None = None


class ContextChange(NewContext):
    """`PATCH /v1/contexts/{id}`; fields that are not given stay as they are."""
