"""What requests may contain: OpenAI's fields, those of other servers that clients send, and ours.

Each field is honoured, ignored or refused by name (`fields`); a field that is not here is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from megalodon.inference.context_store import ID, NAME
from megalodon.inference.sampling import LEAST, Sampling
from megalodon.serving.errors import ApiError
from megalodon.serving.fields import ignored, refused
from megalodon.serving.texts import MOST_PROMPTS, NUMBER, PLAIN, Object, Prompts, Text, TokenIds, Written, at_most

MOST_MESSAGES = 4096


def _no_id(name: str) -> str:
    if ID.fullmatch(name):
        raise ValueError("it looks like the id of a context, which no name may")
    return name


Name = Annotated[str, StringConstraints(pattern=f"^{NAME.pattern}$"), AfterValidator(_no_id)]
TokenId = Annotated[int, NUMBER, Field(ge=0, lt=2**31)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Seconds = Annotated[float, NUMBER, Field(gt=0, le=10 * 366 * 24 * 3600)]
Penalty = Annotated[float, NUMBER, Field(ge=-2, le=2)]
Count = Annotated[int, NUMBER, Field(ge=0, le=2**31)]
Model = Annotated[str, Field(max_length=256, description="the name of the model that is served")]
Flag = bool | None
Key = Annotated[str, StringConstraints(max_length=64)]
Value = Annotated[str, StringConstraints(max_length=512)]
MOST_FIELDS = 256
MOST_BIASES = 4096


class Strict(BaseModel):
    """Fields that are not known are refused by name."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown(cls, value: Any) -> Any:
        """Of ten thousand fields that are not known, one is enough of an error."""
        if not isinstance(value, dict) or len(value) <= MOST_FIELDS:
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next(name for name in value if name not in known)
        return {name: one for name, one in value.items() if name in known or name == unknown}


class StreamOptions(Strict):
    """What a stream has besides text."""

    include_usage: Flag = False
    continuous_usage_stats: Flag = Field(False, description="with `include_usage`: usage so far in every chunk")
    include_obfuscation: Any = ignored("padding against eavesdroppers; there is none")


class NewContext(Strict):
    """How a context is kept."""

    name: Name | None = None
    expires_in: Seconds | None = None


class SaveContext(NewContext):
    """How the context after an answer is kept; `replace`: in place of the one it went on from."""

    replace: bool = False


# --- the form of an answer --------------------------------------------------------------------------------------------


class JsonSchema(Strict):
    """A schema with OpenAI's name for it."""

    name: Annotated[str, StringConstraints(max_length=256)] | None = None
    description: Annotated[str, StringConstraints(max_length=1 << 16)] | None = None
    schema_: Object | None = Field(None, alias="schema")
    strict: Any = ignored("schemas are always kept to")


class ResponseFormat(Strict):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


Choices = Annotated[list[str], Field(min_length=1, max_length=1024, fail_fast=True), PLAIN]


class StructuredOutputs(Strict):
    """vLLM's `structured_outputs`: one of these."""

    json_: Object | None = Field(None, alias="json")
    json_object: Flag = None
    regex: Written | None = None
    choice: Choices | None = None
    grammar: Written | None = None


# --- completions and chat ---------------------------------------------------------------------------------------------


class Generating(Strict):
    """Fields that completions and chat share."""

    model: Model
    n: Annotated[int, NUMBER, Field(ge=1, le=128)] | None = Field(1, description="answers to each prompt; null is 1")
    stream: Flag = Field(False, description="server-sent events")
    stream_options: StreamOptions | None = Field(None, description="`include_usage`, `continuous_usage_stats`")
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None = Field(
        None, description="up to 16 strings that end the answer and are no part of it"
    )
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True), PLAIN] | None = Field(
        None, description="tokens that end the answer and are no part of it"
    )
    seed: Annotated[int, NUMBER, Field(ge=-(2**63), lt=2**63)] | None = Field(
        None, description="the same seed gives the same answer; any 64-bit number"
    )
    temperature: Annotated[float, NUMBER, Field(ge=0, le=100)] | None = Field(
        None, description=f"0, and what is below {LEAST:g}, takes the likeliest token; null is 1"
    )
    top_p: Annotated[float, NUMBER, Field(gt=0, le=1)] | None = Field(None, description="null is 1, off")
    top_k: Annotated[int, NUMBER, Field(ge=-1, le=2**31)] | None = Field(None, description="0, -1 and null are off")
    min_p: Annotated[float, NUMBER, Field(ge=0, lt=1)] | None = Field(None, description="0 and null are off")
    repetition_penalty: Annotated[float, NUMBER, Field(ge=LEAST, le=100)] | None = Field(
        None, description="over the last 256 tokens, prompt included; 1 is off"
    )
    repeat_penalty: Annotated[float, NUMBER, Field(ge=LEAST, le=100)] | None = Field(
        None, description="llama.cpp's name for `repetition_penalty`"
    )
    frequency_penalty: Penalty | None = Field(None, description="over the tokens of the answer")
    presence_penalty: Penalty | None = Field(None, description="over the tokens of the answer")
    logit_bias: Annotated[dict[str, Annotated[float, NUMBER, Field(ge=-100, le=100)]], at_most(MOST_BIASES)] | None = (
        Field(None, description=f"token id to what is added to its logit, -100 to 100, up to {MOST_BIASES:,} tokens")
    )
    ignore_end: Flag = Field(False, description="go on after the end of a document")
    ignore_eos: Flag = Field(False, description="vLLM's and llama.cpp's name for `ignore_end`")
    min_tokens: Count | None = Field(None, description="until so many, nothing but `max_tokens` ends the answer")
    response_format: ResponseFormat | None = Field(None, description="`text`, `json_object` or `json_schema`")
    structured_outputs: StructuredOutputs | None = Field(
        None, description="one of `json`, `json_object`, `regex`, `choice`, `grammar` (llguidance's Lark)"
    )
    guided_json: Object | None = Field(None, description="a JSON schema that the answer must have")
    guided_regex: Written | None = Field(None, description="a regular expression that must match the whole answer")
    guided_choice: Choices | None = Field(None, description="strings one of which the answer must be")
    guided_grammar: Written | None = Field(None, description="a grammar in llguidance's Lark")
    context: str | None = Field(None, max_length=80, description="id or name of a context to go on from")
    save_context: SaveContext | bool | None = Field(
        False, description="keep the context after the answer: `true`, or `name`, `expires_in`, `replace`"
    )
    resume_generator: Flag = Field(False, description="without a seed, draw on as the context would have")

    store: Any = ignored("nothing but contexts is kept")
    metadata: Any = ignored("nothing is kept that it could describe")
    user: Any = ignored("keys tell users apart")
    safety_identifier: Any = ignored("keys tell users apart")
    service_tier: Any = ignored("there is one")
    priority: Any = ignored("keys take turns")
    request_id: Any = ignored("answers have ids of their own")
    prompt_cache_key: Any = ignored("known beginnings are always found")
    prompt_cache_retention: Any = ignored("known beginnings are always found")
    prompt_cache_options: Any = ignored("known beginnings are always found")
    cache_prompt: Any = ignored("known beginnings are always found, and change no bit")
    cache_salt: Any = ignored("known beginnings belong to their key")
    prediction: Any = ignored("a guess that makes other servers quicker")
    skip_special_tokens: Any = ignored("special tokens have no text")
    spaces_between_special_tokens: Any = ignored("special tokens have no text")
    guided_decoding_backend: Any = ignored("there is one, llguidance")
    guided_whitespace_pattern: Any = ignored("JSON has no white space between its parts")
    id_slot: Any = ignored("slots make no difference")
    timings_per_token: Any = ignored("timings are in /metrics")

    parallel_tool_calls: Any = ignored("there are no tool calls")
    reasoning_effort: Any = ignored("the model does not think before it answers")
    reasoning: Any = ignored("the model does not think before it answers")
    include_reasoning: Any = ignored("the model does not think before it answers")
    enable_thinking: Any = ignored("the model does not think before it answers")
    thinking: Any = ignored("the model does not think before it answers")
    verbosity: Any = ignored("ask for it in words")

    tools: list[Any] | None = Field(
        None,
        description="this model calls no tools; taken when empty, and with `tool_choice` none",
        json_schema_extra={"policy": "refused"},
    )
    tool_choice: refused("this model calls no tools", "none", "auto") = None  # type: ignore[valid-type]
    functions: refused("this model calls no tools", []) = None  # type: ignore[valid-type]
    function_call: refused("this model calls no tools", "none", "auto") = None  # type: ignore[valid-type]
    use_beam_search: refused("tokens are sampled one after another", False) = None  # type: ignore[valid-type]
    length_penalty: refused("there is no beam search", 1, 0) = None  # type: ignore[valid-type]
    early_stopping: refused("there is no beam search", False) = None  # type: ignore[valid-type]
    include_stop_str_in_output: refused("a stop string is no part of the answer", False) = None  # type: ignore[valid-type]
    truncate_prompt_tokens: refused("prompts are read whole") = None  # type: ignore[valid-type]
    prompt_logprobs: refused("use `echo` with `logprobs` of /v1/completions") = None  # type: ignore[valid-type]
    allowed_token_ids: refused("use `logit_bias` or a grammar") = None  # type: ignore[valid-type]
    bad_words: refused("use `logit_bias`", []) = None  # type: ignore[valid-type]
    moderation: refused("nothing is moderated here") = None  # type: ignore[valid-type]
    typical_p: refused("this sampler does not exist here", 1) = None  # type: ignore[valid-type]
    tfs_z: refused("this sampler does not exist here", 1) = None  # type: ignore[valid-type]
    mirostat: refused("this sampler does not exist here", 0) = None  # type: ignore[valid-type]
    return_tokens_as_token_ids: refused("tokens are given as text and bytes", False) = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _no_tools(self) -> Generating:
        if self.tools and self.tool_choice != "none":
            raise ApiError(400, "tools: this model calls no tools: leave them out", "invalid_value", "tools")
        return self

    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        penalty = next((one for one in (self.repetition_penalty, self.repeat_penalty) if one is not None), 1.0)
        temperature = temperature if temperature >= LEAST else 0.0
        return Sampling(temperature, max(0, self.top_k or 0), top_p, self.min_p or 0.0, penalty)

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def goes_past_end(self) -> bool:
        """Whether the end of a document ends nothing."""
        return bool(self.ignore_end or self.ignore_eos)

    @property
    def saving(self) -> SaveContext | None:
        """How the context after the answer is kept, if it is."""
        return (
            self.save_context
            if isinstance(self.save_context, SaveContext)
            else (SaveContext() if self.save_context else None)
        )


class CompletionRequest(Generating):
    """`POST /v1/completions`."""

    prompt: Prompts = Field(
        "", validate_default=True, description=f"a text, token ids, or up to {MOST_PROMPTS:,} of either"
    )
    max_tokens: Count | None = Field(16, description="0 generates nothing, for `echo` with `logprobs`")
    logprobs: Annotated[int, NUMBER, Field(ge=0, le=20)] | None = Field(
        None, description="and so many likeliest tokens"
    )
    echo: Flag = Field(False, description="the prompt before the answer; with `logprobs`, its tokens' too")
    best_of: Annotated[int, NUMBER, Field(ge=1, le=128)] | None = Field(None, description="only as many as `n`")
    suffix: refused("the model only goes on", "") = None  # type: ignore[valid-type]
    add_special_tokens: refused("prompts are encoded as they are", False) = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _agree(self) -> CompletionRequest:
        if self.best_of not in (None, self.choices):
            raise ApiError(
                400,
                f"best_of: {self.best_of} is not n={self.choices}: answers are not ranked",
                "invalid_value",
                "best_of",
            )
        if self.echo and self.logprobs is not None and self.saving is not None:
            raise ApiError(400, "echo: with logprobs, no context can be saved", "invalid_value", "echo")
        return self


class Part(Strict):
    """A part of a message; those of answers are taken back."""

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: Text | None = None
    refusal: Text | None = None
    annotations: Any = ignored("nothing for the model")
    logprobs: Any = ignored("nothing for the model")
    parsed: Any = ignored("what openai-python made of the text")
    cache_control: Any = ignored("known beginnings are always found")
    prompt_cache_breakpoint: Any = ignored("known beginnings are always found")

    @model_validator(mode="after")
    def _whole(self) -> Part:
        if (self.refusal if self.type == "refusal" else self.text) is None:
            raise ValueError(
                f"a part of type {self.type} needs the field {'refusal' if self.type == 'refusal' else 'text'}"
            )
        return self


class Message(Strict):
    """One turn of a conversation: what people and tools say, and what the server answered before."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | Annotated[list[Part], Field(min_length=1, max_length=4096, fail_fast=True)] | None = None
    name: str | None = None
    refusal: Text | None = None
    tool_calls: Annotated[list[Object], Field(max_length=128, fail_fast=True)] | None = None
    function_call: Object | None = None
    tool_call_id: str | None = None
    type: Any = ignored("messages have no other type")
    annotations: Any = ignored("nothing for the model")
    audio: refused("this model hears nothing") = None  # type: ignore[valid-type]
    reasoning_content: Any = ignored("not shown to the model again")
    reasoning: Any = ignored("not shown to the model again")
    thinking_blocks: Any = ignored("not shown to the model again")
    id: Any = ignored("messages are told apart by their place")
    index: Any = ignored("of the choice that it was")
    parsed: Any = ignored("what openai-python made of the content")
    cache_control: Any = ignored("known beginnings are always found")
    provider_specific_fields: Any = ignored("LiteLLM's own")

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role} needs content")
        return self

    @property
    def text(self) -> str:
        """The content in one string."""
        if self.content is None:
            return "" if self.refusal is None else str(self.refusal)
        if isinstance(self.content, list):
            return "".join(str(part.refusal if part.type == "refusal" else part.text) for part in self.content)
        return str(self.content)


Messages = Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]


class _Templated(Strict):
    """Fields that the chat template sees."""

    add_generation_prompt: Flag = Field(True, description="end where an answer begins")
    continue_final_message: Flag = Field(False, description="go on with the last message; no new one is begun")
    chat_template_kwargs: Object | None = Field(None, description="more variables for the template")

    @model_validator(mode="after")
    def _one_end(self) -> _Templated:
        if (
            self.continue_final_message
            and self.add_generation_prompt
            and "add_generation_prompt" in self.model_fields_set
        ):
            message = "continue_final_message: with it, add_generation_prompt must be false"
            raise ApiError(400, message, "invalid_value", "continue_final_message")
        return self


class ChatRequest(Generating, _Templated):
    """`POST /v1/chat/completions`."""

    messages: Messages = Field(description=f"up to {MOST_MESSAGES:,}; whatever the server answered is taken back")
    max_tokens: Count | None = Field(None, description="OpenAI's older name for `max_completion_tokens`")
    max_completion_tokens: Count | None = Field(None, description="`--default-tokens` if not given")
    logprobs: Flag = Field(None, description="of the answer's tokens")
    top_logprobs: Annotated[int, NUMBER, Field(ge=0, le=20)] | None = Field(None, description="needs `logprobs`")
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = Field(None, description="only text")

    audio: refused("this model says nothing aloud") = None  # type: ignore[valid-type]
    web_search_options: refused("this model searches nothing") = None  # type: ignore[valid-type]
    documents: refused("put them into the messages", []) = None  # type: ignore[valid-type]
    echo: refused("use /v1/completions", False) = None  # type: ignore[valid-type]
    add_special_tokens: refused("the template writes them", False) = None  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _names_tokens(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs to be true", "invalid_value", "top_logprobs")
        return self


# --- embeddings and tokens --------------------------------------------------------------------------------------------


class EmbeddingsRequest(Strict):
    """`POST /v1/embeddings`."""

    model: Model
    input: Prompts = Field(description=f"a text, token ids, or up to {MOST_PROMPTS:,} of either")
    encoding_format: Literal["float", "base64"] | None = Field("float", description="base64 of float32 little-endian")
    dimensions: Annotated[int, NUMBER, Field(ge=1)] | None = Field(None, description="only the model's own number")
    user: Any = ignored("keys tell users apart")
    add_special_tokens: refused("texts are encoded as they are", False) = None  # type: ignore[valid-type]
    truncate_prompt_tokens: refused("texts are read whole") = None  # type: ignore[valid-type]


class TokenizeRequest(_Templated):
    """`POST /tokenize`, as vLLM and llama.cpp have it."""

    model: Model | None = None
    prompt: Text | None = Field(None, description="a text")
    content: Text | None = Field(None, description="llama.cpp's name for `prompt`")
    messages: Messages | None = Field(None, description="a conversation, written by the chat template")
    return_token_strs: Flag = Field(False, description="the tokens' texts too")
    with_pieces: Flag = Field(False, description="llama.cpp's name for `return_token_strs`")
    add_special_tokens: Any = ignored("texts are encoded as they are")
    add_special: Any = ignored("texts are encoded as they are")
    parse_special: Any = ignored("special tokens in a text are text")

    @model_validator(mode="after")
    def _one_text(self) -> TokenizeRequest:
        if sum(one is not None for one in (self.prompt, self.content, self.messages)) != 1:
            raise ApiError(400, "prompt: give one of prompt, content and messages", "invalid_value", "prompt")
        return self


class DetokenizeRequest(Strict):
    """`POST /detokenize`, as vLLM and llama.cpp have it."""

    model: Model | None = None
    tokens: TokenIds = Field(description="token ids")


class ExplainRequest(Strict):
    """`POST /v1/explain`, which no other server has."""

    model: Model
    prompt: Prompts = Field(description="a text or token ids, of which the last token is explained; only one")

    @model_validator(mode="after")
    def _one_text(self) -> ExplainRequest:
        if len(self.prompt) != 1:
            raise ApiError(400, "prompt: give one text or one list of token ids", "invalid_value", "prompt")
        return self


# --- contexts ---------------------------------------------------------------------------------------------------------


class ContextText(Strict):
    """A text for a context, as JSON. Long ones are better sent as they are, with `Content-Type: text/plain`."""

    text: Text
    name: Name | None = None
    expires_in: Seconds | None = None


class ContextChange(NewContext):
    """`PATCH /v1/contexts/{id}`; fields that are not given stay as they are."""
