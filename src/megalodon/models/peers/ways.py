"""How a class of Transformers is asked for documents and for pieces of a text: what `probe` finds out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Ways:
    """How one class, with one config, computes what it should.

    Attributes:
        documents: of a packed batch. "positions": told by position ids that start over; "rows": one document a row,
            padded at the right; "alone": one after another.
        documents_because: why not in a better way; empty where they are told.
        pieces: of a text that goes on. "pieces": from the cache; "tokens": from the cache, token by token; "text": read
            again from its beginning, with no cache.
        pieces_because: why not in a better way; empty for "pieces".
        streaming_problem: why rows are not streamed in training; None where they are.
        cache: what the class calls its cache; None where it has none.
        makes_cache: whether it makes one when it is given none.
    """

    documents: Literal["positions", "rows", "alone"] = "alone"
    documents_because: str = ""
    pieces: Literal["pieces", "tokens", "text"] = "text"
    pieces_because: str = ""
    streaming_problem: str | None = None
    cache: str | None = None
    makes_cache: bool = True

    @property
    def told(self) -> str:
        """One line for the user, of what is not as it should be; empty where all is."""
        words = {
            "rows": "documents of a packed batch are run one a row",
            "alone": "documents of a packed batch are run one after another",
            "tokens": "what goes on is read token by token",
            "text": "what goes on is read again from its beginning",
        }
        pairs = ((self.documents, self.documents_because), (self.pieces, self.pieces_because))
        return "; ".join(f"{words[way]}: {reason}" for way, reason in pairs if reason)
