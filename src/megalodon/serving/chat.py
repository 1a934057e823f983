"""From messages to tokens: the tokenizer's chat template, one the operator gives, or a plain one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megalodon.data.pretrained import PretrainedTokenizer
from megalodon.data.tokenizer import Tokenizer
from megalodon.serving.errors import ApiError
from megalodon.serving.schemas import Message

PLAIN = "{% for message in messages %}\n{{ message.role }}: {{ message.content }}{% endfor %}\nassistant:"
"""For models that were not trained on conversations: a transcript for them to continue."""
PLAIN_STOPS = ("\nuser:", "\nsystem:")


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
        self._tokenizer = tokenizer
        self._own = None
        if template is None and isinstance(tokenizer, PretrainedTokenizer) and tokenizer.transformers.chat_template:
            self._own = tokenizer.transformers
        self.stops = PLAIN_STOPS if template is None and self._own is None else ()
        try:
            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
            self._template = environment.from_string(template or PLAIN)
        except TemplateError as error:
            raise ValueError(f"the chat template cannot be read: {error}") from None

    def encode(self, messages: Sequence[Message], goes_on: bool) -> np.ndarray:
        """Ids of a conversation up to where the answer begins; `goes_on`: after a context, not at a text's beginning.

        Raises:
            ApiError: 400 if the template refuses the messages.
        """
        plain = [{"role": message.role, "content": message.text} for message in messages]
        try:
            if self._own is not None:
                ids = self._own.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
                return np.asarray(ids, dtype=np.int64)
            text = self._template.render(messages=plain, add_generation_prompt=True)
        except TemplateError as error:
            raise ApiError(
                400, f"messages: the chat template refuses them: {error}", "invalid_value", "messages"
            ) from None
        return self._tokenizer.encode(text if goes_on else text.lstrip("\n"))
