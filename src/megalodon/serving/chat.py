"""From messages to a prompt: the tokenizer's chat template, one the operator gives, or a plain one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megalodon.data.pretrained import PretrainedTokenizer
from megalodon.data.special_text import SpecialText
from megalodon.data.tokenizer import Tokenizer
from megalodon.serving.errors import ApiError
from megalodon.serving.prompts import pieces
from megalodon.serving.schemas import Message
from megalodon.serving.texts import Prompt

PLAIN = (
    "{% for message in messages %}\n{{ message.role }}: {{ message.content }}"
    "{% for call in message.tool_calls %}{{ call | tojson }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}\nassistant:{% endif %}"
)
"""For models that were not trained on conversations: a transcript for them to continue."""
PLAIN_STOPS = ("\nuser:", "\nsystem:", "\ntool:")
RESERVED = ("messages", "tools", "documents", "conversation", "chat_template", "tokenize", "return_dict")
"""Names that `chat_template_kwargs` cannot give."""


MARKED = 1 << 20
"""Conversations of more characters have no marks."""
FOUND_BY = 200
"""Characters by which a message is found in the written conversation."""


@dataclass(frozen=True)
class Written:
    """A conversation for the model; `marks`: tokens before the ends of its messages."""

    prompt: Prompt
    marks: tuple[int, ...]


@dataclass(frozen=True)
class Template:
    """How a conversation is to be written.

    Attributes:
        goes_on: after a context, not at a text's beginning.
        answer_begins: end where an answer begins.
        last_goes_on: end with the last message's content, to be continued.
        more: variables for the template.
    """

    goes_on: bool = False
    answer_begins: bool = True
    last_goes_on: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(body: Any, goes_on: bool) -> Template:
        """What the fields of a request say.

        Raises:
            ApiError: 400 for a variable that the template has already.
        """
        more = body.chat_template_kwargs or {}
        for name in RESERVED:
            if name in more:
                message = f"chat_template_kwargs: {name} is not for it to give"
                raise ApiError(400, message, "invalid_value", "chat_template_kwargs")
        last = bool(body.continue_final_message)
        begins = False if last else body.add_generation_prompt is not False
        return Template(goes_on, begins, last, more)


class ChatTemplate:
    """How conversations are written for the model.

    Attributes:
        stops: strings that end an answer, with the plain template.
    """

    def __init__(self, tokenizer: Tokenizer, template: str | None = None) -> None:
        """
        Args:
            tokenizer: whose own template is used if it has one and no other is given.
            template: Jinja source; it sees `messages` and `add_generation_prompt`.

        Raises:
            ValueError: if it is no template.
        """
        self._tokenizer, self._given = tokenizer, template
        self._own = self._special = None
        if isinstance(tokenizer, PretrainedTokenizer) and (template or tokenizer.transformers.chat_template):
            self._own, self._special = tokenizer.transformers, SpecialText(tokenizer)
        self.stops = PLAIN_STOPS if template is None and self._own is None else ()
        try:
            as_transformers = template is not None  # which drops the newline after a block
            environment = ImmutableSandboxedEnvironment(trim_blocks=as_transformers, lstrip_blocks=as_transformers)
            self._template = environment.from_string(template or PLAIN)
        except TemplateError as error:
            raise ValueError(f"the chat template cannot be read: {error}") from None

    def write(self, messages: Sequence[Message], template: Template) -> Written:
        """The conversation as a prompt. Must run in a thread: long ones take a while.

        Raises:
            ApiError: 400 if the template refuses the messages.
        """
        plain = [_described(message) for message in messages]
        variables = {**template.more, "add_generation_prompt": template.answer_begins}
        try:
            if self._own is not None:
                variables["continue_final_message"] = template.last_goes_on
                write: Any = self._own.apply_chat_template
                text = write(plain, tokenize=False, chat_template=self._given, **variables)
                assert self._special is not None
                return Written(self._special.encode(str(text)), self._marks(str(text), plain))
            text = self._template.render(messages=plain, **variables)
            if template.last_goes_on:
                text = _cut_after(text, plain[-1]["content"])
        except (TemplateError, ValueError, TypeError) as error:
            message = f"messages: the chat template refuses them: {str(error)[:300]}"
            raise ApiError(400, message, "invalid_value", "messages") from None
        text = text if template.goes_on else text.lstrip("\n")
        return Written(text, self._marks(text, plain))

    def _marks(self, text: str, messages: Sequence[dict[str, Any]]) -> tuple[int, ...]:
        """About how many tokens lie before the end of each message but the last, where a later text may part from this
        one. They only decide what is kept, so being off by a few costs nothing but time."""
        if len(text) > MARKED:
            return ()
        marks: list[int] = []
        begin = tokens = 0
        for message in messages[:-1]:
            said = message["content"].strip()
            place = text.find(said[:FOUND_BY], begin)
            end = place + len(said)
            if place < 0 or text[end - min(len(said), FOUND_BY) : end] != said[-FOUND_BY:]:
                return tuple(marks)
            tokens += sum(map(len, self._tokenizer.encode_stream(pieces(text[begin:end]))))
            marks.append(tokens)
            begin = end
        return tuple(marks)


def _described(message: Message) -> dict[str, Any]:
    """A message as templates know it."""
    role = "system" if message.role == "developer" else message.role
    said: dict[str, Any] = {"role": role, "content": message.text}
    for name in ("name", "tool_calls", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            said[name] = value
    if message.function_call is not None:
        said.setdefault("tool_calls", [{"type": "function", "function": message.function_call}])
    return said


def _cut_after(text: str, last: str) -> str:
    place = text.rfind(last.strip())
    return text if place < 0 else text[: place + len(last.strip())]
