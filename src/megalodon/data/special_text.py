"""Texts in which special tokens stand for themselves, as chat templates write them, encoded piece by piece.

The libraries take such a text in one call, and list what they found in another, during which nobody else can run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain

import numpy as np
from tokenizers import AddedToken

from megalodon.data.cutting import CONTEXT, CUT_CHARACTERS
from megalodon.data.pretrained import PretrainedTokenizer, encoding_of, plain_backend

NO_RUST_SPACE = "\x1c\x1d\x1e\x1f"
"""White space to Python, but not to the library."""


class SpecialText:
    """Encodes texts of one tokenizer as its `encode(text, add_special_tokens=False)` does.

    The library first finds the added tokens, then works on what lies between two of them by itself. So a text is cut in
    front of them, into groups of about `characters`. What is long between two is cut as plain text, if trying both ways
    on its ends shows how it must be encoded; else, and where tokens are found in more than one way, all is one call.
    """

    def __init__(self, tokenizer: PretrainedTokenizer, characters: int = CUT_CHARACTERS) -> None:
        self._tokenizer, self._characters = tokenizer, characters
        own = tokenizer.transformers
        self._backend = plain_backend(own, special=not getattr(own, "split_special_tokens", False))
        self._pattern: re.Pattern[str] | None = None
        self._longest = 0
        self._wide: dict[str, tuple[bool, bool]] = {}
        if self._backend is None:
            return
        added = _found_first(list(own.added_tokens_decoder.values()), json.loads(self._backend.to_str())["normalizer"])
        if added:
            texts = sorted((token.content for token in added), key=len, reverse=True)  # the longest is meant
            self._pattern, self._longest = re.compile("|".join(map(re.escape, texts))), len(texts[0])
            self._wide = {token.content: (token.lstrip, token.rstrip) for token in added}

    def encode(self, text: str) -> np.ndarray:
        """Ids [n] int32 of a text. Must run in a thread: it lets others run, but a long text takes a while."""
        if self._backend is None:
            return np.asarray(self._tokenizer.transformers.encode(text, add_special_tokens=False), dtype=np.int32)
        parts = None
        if self._pattern is not None and len(text) > self._characters:
            parts = self._in_parts(text)
        return self._whole(text) if parts is None else np.concatenate(parts)

    def _whole(self, text: str) -> np.ndarray:
        assert self._backend is not None
        return np.array(encoding_of(self._backend, text).ids, dtype=np.int32)

    def _in_parts(self, text: str) -> list[np.ndarray] | None:
        """Ids of the groups, or None where it does not show how a part must be encoded."""
        ids: list[np.ndarray] = []
        first = last = token = 0  # where the group begins; where the token before ends and begins
        for start, end in chain(self._tokens(text), [(len(text), len(text))]):
            if start - last > self._characters:  # the part between two tokens is a group of its own
                continues = self._continues(text, token, last, start, end)
                if continues is None:
                    return None
                ids.append(self._whole(text[first:last]))
                steps = range(last, start, self._characters)
                pieces = (text[begin : min(begin + self._characters, start)] for begin in steps)
                ids += (part.astype(np.int32) for part in self._tokenizer.encode_stream(pieces, continues))
                first = start
            elif start - first > self._characters:
                ids.append(self._whole(text[first:start]))
                first = start
            token, last = start, end
        ids.append(self._whole(text[first:]))
        return ids

    def _tokens(self, text: str) -> Iterator[tuple[int, int]]:
        """(begin, end) of added tokens, with the white space that they take in. Looks at a piece at a time: a search
        through all of a text would hold up others."""
        assert self._pattern is not None
        place = after = 0
        while place < len(text):
            stop = min(place + self._characters, len(text))
            match = self._pattern.search(text, place, min(stop + self._longest, len(text)))
            if match is None or match.start() >= stop:
                place = stop
                continue
            start, end = match.span()
            wide_left, wide_right = self._wide[match[0]]
            while wide_left and start > after and _is_space(text[start - 1]):
                start -= 1
            while wide_right and end < len(text) and _is_space(text[end]):
                end += 1
            yield start, end
            place = after = end

    def _continues(self, text: str, token: int, last: int, start: int, end: int) -> bool | None:
        """Whether the part from `last` to `start`, between two tokens, is encoded as one that goes on rather than one
        that begins a text; None if as neither."""
        before, head = text[token:last], text[last : min(last + CONTEXT, start)]
        tail, after = text[max(last, start - CONTEXT) : start], text[start:end]
        if not self._same(tail + after, [self._plain(tail, False), self._whole(after)]):
            return None
        for continues in (False, True):
            if self._same(before + head, [self._whole(before), self._plain(head, continues)]):
                return continues
        return None

    def _plain(self, text: str, continues: bool) -> np.ndarray:
        return self._tokenizer.encode_pieces([text], [continues], sized=False)[0].ids

    def _same(self, text: str, parts: list[np.ndarray]) -> bool:
        return np.array_equal(self._whole(text), np.concatenate(parts))


def _found_first(added: list[AddedToken], normalizer: object) -> list[AddedToken]:
    """The tokens that are found before anything else is done with a text; none if it is not sure which those are."""
    raw = [token for token in added if not token.normalized]
    late = [token for token in added if token.normalized]  # found in a second pass, in normalised text
    if normalizer is None:  # which is the text as it is
        if any(_overlap(one.content, other.content) for one in raw for other in late):
            return []
        raw += late
    elif any(token.special for token in late):
        return []
    strips = any(token.lstrip or token.rstrip for token in raw)
    if any(token.single_word or (strips and token.content != token.content.strip()) for token in raw):
        return []
    return raw


def _overlap(one: str, other: str) -> bool:
    """Whether both can be found in a text where they share characters."""
    if one in other or other in one:
        return True
    sizes = range(1, min(len(one), len(other)))
    return any(one[-size:] == other[:size] or other[-size:] == one[:size] for size in sizes)


def _is_space(character: str) -> bool:
    return character.isspace() and character not in NO_RUST_SPACE
