"""Answers of a given form: a JSON schema, a regular expression or a list of choices, kept to token by token.

The grammars are llguidance's (extra `serve`). Before each token it says which tokens the form allows; the others cannot
be chosen. What is allowed depends on the tokens so far alone, so the promise of same bits holds as without it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megalodon.data.tokenizer import Tokenizer

MOST_CHOICES, MOST_SCHEMA, MOST_EXPRESSION = 1 << 18, 1 << 16, 1 << 14
"""Characters of a list of choices; of a JSON schema; of a grammar or regular expression, and of all expressions in a
schema: the time and memory to make a grammar of one can grow with its square. None takes a second or 100 MB."""
COMPACT = {"whitespace_flexible": False}
"""JSON without white space between its parts, which a weak model could go on with for ever."""


class FormError(ValueError):
    """A form that turned out, while a text was written, to be too complex to be kept to; `field` asked for it."""

    def __init__(self, message: str, field: str | None) -> None:
        super().__init__(message)
        self.field = field


class Grammar:
    """A form for one tokenizer, known to be usable. Made by `Grammars`; `field` is what asked for it."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        """`matcher` stands at a text's beginning, and knows what may come first."""
        self._matcher, self._vocab_size = matcher, vocab_size
        self.field: str | None = None

    def follow(self) -> Follower:
        """Something that follows one text from its beginning. A copy: to make a large schema's anew takes seconds."""
        return Follower(self._matcher.deep_copy(), self._vocab_size, self.field)


class Follower:
    """One text on its way through a grammar."""

    def __init__(self, matcher: Any, vocab_size: int, field: str | None = None) -> None:
        self._matcher, self._vocab_size, self._field = matcher, vocab_size, field

    @property
    def complete(self) -> bool:
        """The text has the form, and nothing can come after it."""
        return bool(self._matcher.is_stopped())

    def restrict(self, logits: Tensor) -> Tensor:
        """Logits [V] with -inf for every token that cannot come next.

        Raises:
            FormError: if the grammar has become too complex to follow.
        """
        allowed = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8) > 0
        self._check()
        left = torch.zeros(len(logits), dtype=torch.bool)
        left[: self._vocab_size] = torch.from_numpy(allowed[: self._vocab_size])
        return logits.masked_fill(~left.to(logits.device), -torch.inf)

    def take(self, token: int) -> None:
        """`token` has been chosen.

        Raises:
            FormError: as `restrict`.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            why = f"the form of the answer is too complex to be kept to: {_first_line(self._matcher.get_error())}"
            raise FormError(why if self._field is None else f"{self._field}: {why}", self._field)


class Grammars:
    """Makes grammars for one tokenizer. Any thread but an event loop's may ask: it can take a second."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._lock = tokenizer, threading.Lock()
        self._prepared: Any = None

    def json_schema(self, schema: dict[str, Any] | bool) -> Grammar:
        """JSON that a schema allows, without white space between its parts; see `closed`.

        Raises:
            ValueError: if the schema is none, is too large or too complex, or uses what cannot be kept to.
            ImportError: without llguidance. NotImplementedError: if the tokenizer's tokens do not map to bytes.
        """
        library, written = _library(), _checked(json.dumps(closed(schema)), MOST_SCHEMA)
        _checked("".join(_expressions(schema)), MOST_EXPRESSION, "its patterns have")
        return self._grammar(library.LLMatcher.grammar_from_json_schema(written, overrides=COMPACT))

    def json_object(self) -> Grammar:
        """Any JSON object. Errors as `json_schema`."""
        return self.json_schema({"type": "object"})

    def regex(self, pattern: str) -> Grammar:
        """Text that a regular expression (Rust's syntax, `\\d` for 0 to 9) matches whole. Errors as `json_schema`."""
        library, checked = _library(), _checked(pattern, MOST_EXPRESSION)
        return self._grammar(library.LLMatcher.grammar_from_lark(f"start: /{library.regex_to_lark(checked, 'd')}/"))

    def choice(self, choices: Sequence[str]) -> Grammar:
        """One of several strings. Errors as `json_schema`."""
        if any("\0" in choice for choice in choices):
            raise ValueError("a choice holds a NUL character, which cannot be part of a text")
        library, written = _library(), " | ".join(json.dumps(choice) for choice in choices)
        return self._grammar(library.LLMatcher.grammar_from_lark(f"start: {_checked(written, MOST_CHOICES)}"))

    def lark(self, source: str) -> Grammar:
        """A grammar in llguidance's variant of Lark. Errors as `json_schema`."""
        return self._grammar(_library().LLMatcher.grammar_from_lark(_checked(source, MOST_EXPRESSION)))

    def _grammar(self, source: str) -> Grammar:
        matcher = _matcher(self._for_library(), source)
        matcher.compute_logit_bias()  # the slowest step of all, so not in the engine's thread
        _refuse_error(matcher)
        return Grammar(matcher, self._tokenizer.vocab_size)

    def _for_library(self) -> Any:
        with self._lock:
            if self._prepared is None:
                library = _library()
                self._prepared = library.LLTokenizer(library.TokenizerWrapper(_Described(self._tokenizer)))
        return self._prepared


class _Described:
    """The tokenizer as llguidance wants it described; a token that begins with 0xFF stands for no text."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.token_bytes is None or tokenizer.eos_token_id is None:
            missing = "an end of document" if tokenizer.token_bytes is not None else "bytes for its tokens"
            raise NotImplementedError(f"tokenizer {tokenizer.name!r} has not {missing}, which forms of answers need")
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.eos_token_id
        self.tokens = [spelled or b"\xff<%d>" % index for index, spelled in enumerate(tokenizer.token_bytes)]
        self.special_token_ids = [index for index, spelled in enumerate(tokenizer.token_bytes) if not spelled]

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).tolist()
        return ids


def closed(schema: Any) -> Any:
    """A schema whose objects have the properties that it names and no others, where it does not say what others may be.

    What such a schema allows, the one that was given allows too; and a weak model does not go on inventing properties.
    A property that is only required may be anything. Schemas that others complete (`allOf`, `$ref` with siblings), or
    that may ask for more properties than they name, stay as they are.
    """
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for key in ("properties", "patternProperties", "$defs", "definitions"):
        if isinstance(made.get(key), dict):
            made[key] = {name: closed(one) for name, one in made[key].items()}
    for key in ("items", "additionalProperties", "prefixItems", "anyOf", "oneOf"):
        if key in made:
            made[key] = [closed(one) for one in made[key]] if isinstance(made[key], list) else closed(made[key])
    completed = {
        "additionalProperties",
        "unevaluatedProperties",
        "patternProperties",
        "allOf",
        "anyOf",
        "oneOf",
        "$ref",
        *("$dynamicRef", "not", "if", "dependencies", "dependentRequired", "dependentSchemas"),
        *("minProperties", "propertyNames"),
    }
    named, required = made.get("properties"), made.get("required", [])
    if isinstance(named, dict) and isinstance(required, list) and not completed & made.keys():
        unnamed: dict[str, Any] = {name: {} for name in required if isinstance(name, str) and name not in named}
        made |= {"properties": {**named, **unnamed}, "additionalProperties": False}
    return made


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ImportError("forms of answers need llguidance: pip install 'megalodon-lm[serve]'") from None
    return llguidance


def _matcher(tokenizer: Any, source: str) -> Any:
    library = _library()
    matcher = library.LLMatcher(tokenizer, source, log_level=0, limits=library.LLParserLimits(verbose_errors=False))
    _refuse_error(matcher)
    return matcher


def _refuse_error(matcher: Any) -> None:
    if matcher.is_error():
        raise ValueError(_first_line(matcher.get_error()))


def _checked(written: str, most: int, what: str = "it has") -> str:
    if len(written) > most:
        raise ValueError(f"{what} {len(written):,} characters; {most:,} is the most that is accepted")
    return written


def _expressions(schema: Any) -> Iterator[str]:
    """All regular expressions in a schema."""
    if isinstance(schema, dict):
        if isinstance(schema.get("pattern"), str):
            yield schema["pattern"]
        if isinstance(schema.get("patternProperties"), dict):
            yield from schema["patternProperties"]
    for part in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _expressions(part)


def _first_line(message: str) -> str:
    if message.startswith("panic"):  # an assertion of the library
        return "it is too complex"
    first, *more = message.strip().splitlines() or ["it is not usable"]
    if first.endswith(":"):  # what is wrong with an expression comes below a drawing of where
        found = (line.strip().removeprefix("error: ") for line in more if line.strip().startswith("error: "))
        first += " " + next(found, "")
    return first.strip()[:300]
