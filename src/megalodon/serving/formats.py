"""How answers are written: `/v1/completions` and `/v1/chat/completions`, with log-probabilities."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from megalodon.data.pretrained import PretrainedTokenizer
from megalodon.data.tokenizer import StreamDecoder, Tokenizer
from megalodon.inference.hidden import TokenChoice


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """A token as answers show it: its text, `bytes:\\xe2\\x80` if that is half a character, its name if it has none."""
    if tokenizer.token_bytes is None:
        return tokenizer.decode([token]) or _name(tokenizer, token)
    raw = tokenizer.token_bytes[token]
    try:
        return raw.decode() or _name(tokenizer, token)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _name(tokenizer: Tokenizer, token: int) -> str:
    if isinstance(tokenizer, PretrainedTokenizer):
        return str(tokenizer.transformers.convert_ids_to_tokens(token))
    return f"token_id:{token}"


class CompletionFormat:
    """Answers of `/v1/completions`."""

    def __init__(self, model: str, tokenizer: Tokenizer, logprobs: int | None) -> None:
        self._base = {"id": f"cmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self._lengths: dict[int, int] = {}
        self._decoders: dict[int, StreamDecoder] = {}

    def envelope(self, stream: bool) -> dict[str, Any]:
        """What surrounds the choices."""
        return {**self._base, "object": "text_completion"}

    def choice(self, index: int, text: str, tokens: Sequence[TokenChoice], reason: str | None) -> dict[str, Any]:
        """One whole choice, or a part of it."""
        logprobs = None if self._logprobs is None else self._legacy(index, tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    chunk = choice

    def first_chunks(self, choices: int) -> list[dict[str, Any]]:
        """What comes before the text."""
        return []

    def _legacy(self, index: int, tokens: Sequence[TokenChoice]) -> dict[str, Any]:
        return {
            "tokens": [spelled(self._tokenizer, token.token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._likeliest(token) for token in tokens] if self._logprobs else None,
            "text_offset": [self._offset(index, token.token) for token in tokens],
        }

    def _likeliest(self, choice: TokenChoice) -> dict[str, float] | None:
        """By the tokens' texts. The chosen token is always among them, as OpenAI has it; none hides another."""
        if choice.logprob is None:
            return None
        found: dict[str, float] = {}
        for token, value in dict([(choice.token, choice.logprob), *choice.likeliest]).items():
            shown = spelled(self._tokenizer, token)
            found[f"token_id:{token}" if shown in found else shown] = value
        return found

    def _offset(self, index: int, token: int) -> int:
        """Characters of the choice before a token."""
        decoder = self._decoders.setdefault(index, self._tokenizer.stream_decoder())
        before = self._lengths.get(index, 0)
        self._lengths[index] = before + len(decoder.feed(token))
        return before


class ChatFormat:
    """Answers of `/v1/chat/completions`."""

    def __init__(self, model: str, tokenizer: Tokenizer, logprobs: int | None) -> None:
        self._base = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._tokenizer, self._logprobs = tokenizer, logprobs

    def envelope(self, stream: bool) -> dict[str, Any]:
        """What surrounds the choices."""
        return {**self._base, "object": "chat.completion.chunk" if stream else "chat.completion"}

    def choice(self, index: int, text: str, tokens: Sequence[TokenChoice], reason: str) -> dict[str, Any]:
        """One whole choice."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._content(tokens), "finish_reason": reason}

    def first_chunks(self, choices: int) -> list[dict[str, Any]]:
        """Each choice begins with its role."""
        return [
            {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            for index in range(choices)
        ]

    def chunk(self, index: int, text: str, tokens: Sequence[TokenChoice], reason: str | None) -> dict[str, Any]:
        """A part of a choice."""
        delta = {"content": text} if reason is None else {}
        return {"index": index, "delta": delta, "logprobs": self._content(tokens), "finish_reason": reason}

    def _content(self, tokens: Sequence[TokenChoice]) -> dict[str, Any] | None:
        if self._logprobs is None or not tokens:
            return None
        return {"content": logprobs_of(self._tokenizer, tokens), "refusal": None}


def logprobs_of(tokenizer: Tokenizer, tokens: Sequence[TokenChoice]) -> list[dict[str, Any]]:
    """Log-probabilities as chats and responses have them."""

    def one(token: int, logprob: float | None) -> dict[str, Any]:
        raw = None if tokenizer.token_bytes is None else list(tokenizer.token_bytes[token])
        return {"token": spelled(tokenizer, token), "logprob": logprob, "bytes": raw}

    return [
        one(choice.token, choice.logprob) | {"top_logprobs": [one(*other) for other in choice.likeliest]}
        for choice in tokens
    ]
