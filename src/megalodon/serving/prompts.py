"""Prompts on their way to the engine: short ones are tokenized at once, long ones while they are read."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
from anyio import to_thread

from megalodon.data.tokenizer import Tokenizer
from megalodon.inference.feed import TokenFeed
from megalodon.serving.errors import ApiError
from megalodon.serving.texts import LongText, Prompt

AT_ONCE = 1 << 16
"""Characters, or token ids, that are made a feed of in one go."""
WAIT = 0.01
"""Seconds between two looks at whether the engine has taken what was put into a feed."""


def check(prompt: Prompt, tokenizer: Tokenizer, most: int, param: str = "prompt") -> None:
    """Refuse a prompt that cannot be read, before anything begins.

    Raises:
        ApiError: 400 for ids that the tokenizer does not have, 413 for what must be more than `most` tokens.
    """
    if isinstance(prompt, np.ndarray):
        if prompt.max(initial=0) >= tokenizer.vocab_size:
            raise ApiError(400, f"{param}: token ids go up to {tokenizer.vocab_size - 1}", "invalid_value", param)
        least = len(prompt)
    else:
        size = prompt.nbytes if isinstance(prompt, LongText) else len(prompt)
        least = size // tokenizer.longest_token if tokenizer.longest_token else 0
    if least > most:
        raise ApiError(413, f"the text has more than {most} tokens", "prompt_too_long", param)


def is_empty(prompt: Prompt) -> bool:
    """Whether a prompt says nothing."""
    return not isinstance(prompt, LongText) and len(prompt) == 0


async def feed(
    prompt: Prompt, tokenizer: Tokenizer, marks: Sequence[int] = ()
) -> tuple[TokenFeed, asyncio.Task[None] | None]:
    """A feed of the prompt's ids, and the task that fills it if it is long; cancel that when nobody reads any more.

    `marks` are `TokenFeed`'s.
    """
    if isinstance(prompt, np.ndarray):
        if len(prompt) <= AT_ONCE:
            return TokenFeed(prompt, marks=marks), None
        ids: Iterator[np.ndarray] = (prompt[start : start + AT_ONCE] for start in range(0, len(prompt), AT_ONCE))
    elif isinstance(prompt, str) and len(prompt) <= AT_ONCE:
        return TokenFeed(await to_thread.run_sync(tokenizer.encode, prompt), marks=marks), None
    else:
        ids = encoded(prompt, tokenizer)
    filled = TokenFeed(marks=marks)
    return filled, asyncio.create_task(_pour(ids, filled))


def encoded(prompt: Prompt, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The prompt's ids, in pieces."""
    return iter([prompt]) if isinstance(prompt, np.ndarray) else tokenizer.encode_stream(pieces(prompt))


def pieces(text: str | LongText) -> Iterator[str]:
    """A text in pieces of at most `AT_ONCE` bytes or characters."""
    if isinstance(text, LongText):
        return iter(text)
    return (text[start : start + AT_ONCE] for start in range(0, len(text), AT_ONCE))


async def _pour(ids: Iterator[np.ndarray], target: TokenFeed) -> None:
    nothing = np.array([], np.int64)
    rest = chain(ids, [None])
    while (some := await to_thread.run_sync(next, rest)) is not None:
        for start in range(0, len(some), AT_ONCE):
            while target.full:
                await asyncio.sleep(WAIT)
            target.put(some[start : start + AT_ONCE])
    target.put(nothing)
    target.close()
