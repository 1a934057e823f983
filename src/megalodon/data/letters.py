"""The letters of a text: what two copies of it have in common that differ in line ends, white space or byte order mark.

These are the bytes of its UTF-8 but for white space, and for the bytes of which a byte order mark and a space that does
not break are made, wherever they stand: a rule for single bytes, so that pieces of a text may be cut anywhere.
"""

from __future__ import annotations

import numpy as np

from megalodon.data.tokenizer import Tokenizer

NO_LETTERS = b"\t\n\v\f\r " + "\ufeff\xa0".encode()
SPACE_MARK = "\u2581"


def letters_of(text: bytes) -> bytes:
    """The letters of a text in UTF-8, or of a piece of one."""
    return text.translate(None, NO_LETTERS)


class TokenLetters:
    """The letters that token ids stand for: `lengths` [vocab_size] int64 says how many each has.

    Where a tokenizer cannot map its tokens to bytes, a token is taken as it is spelled.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        spelled = tokenizer.token_bytes
        if spelled is None:
            spelled = [b""] * tokenizer.vocab_size
            for token, index in tokenizer.vocabulary().items():
                spelled[index] = token.replace(SPACE_MARK, "").encode(errors="surrogatepass")
        own = [letters_of(token) for token in spelled]
        if tokenizer.eos_token_id is not None:
            own[tokenizer.eos_token_id] = b""
        self.lengths = np.array([len(token) for token in own], dtype=np.int64)
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._letters = np.frombuffer(b"".join(own), dtype=np.uint8)

    def of(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(letters uint8 [m], how many of them each id [n] stands for)."""
        counts = self.lengths[ids]
        shift = self._starts[ids] - np.cumsum(counts) + counts
        return self._letters[np.repeat(shift, counts) + np.arange(counts.sum())], counts

    def first(self, tokens: np.ndarray, start: int, stop: int, count: int) -> np.ndarray:
        """The first `count` letters of tokens[start:stop], uint8; fewer where there are no more."""
        size = 2 * count
        while True:
            letters, _ = self.of(tokens[start : min(stop, start + size)])
            if len(letters) >= count or start + size >= stop:
                return letters[:count]
            size *= 8
