"""Cutting a long text where encoding the parts one by one gives the ids of the whole, for any tokenizer.

Most tokenizers encode words apart from each other, but each has its own notion of a word, and some join a space with
what stands before it. So a place is taken only where the tokenizer itself shows that it is one: the text around it,
encoded in one go, equals its two halves encoded one after the other. Such places are looked for in front of white space
first. Where none is (a script without spaces, digits, a file of one line) the ends of tokens are tried, with all of the
text since the last cut, because what splits digits by threes counts from where they began.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

CUT_CHARACTERS = 1 << 16
CONTEXT = 512
"""Characters on each side of a place that are encoded to try it; no token reaches so far."""
TRIES = 8

# A place between a character that is no white space and a following space or newline.
WORD_START = re.compile(r"(?<=\S)[ \n]")

Encode = Callable[[str, bool], np.ndarray]
"""(text, whether it goes on from text before) -> ids."""
Ends = Callable[[str, bool], "list[int]"]
"""The same -> the places in the text at which tokens end, ascending."""


class Cutter:
    """Cuts texts for one tokenizer. `characters` is the least length of a piece but the last."""

    def __init__(self, encode: Encode, ends: Ends, characters: int = CUT_CHARACTERS, context: int = CONTEXT) -> None:
        self.encode, self.ends = encode, ends
        self.characters, self.context = characters, context

    def cut(self, pieces: Iterable[str], continues: bool = False) -> Iterator[str]:
        """The text in pieces of about `characters`; only the first begins it, the others go on from the one before
        (with `continues`, the first goes on too).

        Holds the text back from the last cut to the next place that can be one, which for text of words is near.
        """
        least = self.characters + 2 * self.context + self.characters // 8
        parts: list[str] = []
        held, wanted, begun = 0, least, continues
        for piece in pieces:
            parts.append(piece)
            held += len(piece)
            if held < wanted:
                continue
            text, start = "".join(parts), 0
            while len(text) - start >= wanted:
                place = self._place(text, start, begun)
                if place is None:
                    wanted *= 2
                else:
                    yield text[start:place]
                    start, begun, wanted = place, True, least
            parts, held = [text[start:]], len(text) - start
        if rest := "".join(parts):
            yield rest

    def _place(self, text: str, start: int, begun: bool) -> int | None:
        """A place to cut at, at least `characters` after `start`, or None where none was found."""
        stop = len(text) - self.context
        for number, match in enumerate(WORD_START.finditer(text, start + self.characters, stop)):
            if number == TRIES:
                break
            place = match.start()
            if self._splits(text, self._word_before(text, start, place), place, start, begun):
                return place
        # Some tries only, of the text until not far behind them: it is encoded as often.
        stop = min(stop, max(start + self.characters + 8 * self.context, start + (len(text) - start) // 2))
        window = text[start : stop + self.context]
        ends = [end for end in self.ends(window, begun) if self.characters <= end < stop - start]
        # Neighbours, because every third may be right, and others far from them.
        for end in dict.fromkeys(ends[:TRIES] + ends[:: max(1, len(ends) // TRIES)][:TRIES]):
            if self._equal(window, end, begun):
                return start + end
        return None

    def _word_before(self, text: str, start: int, place: int) -> int:
        """Where to begin to encode for a try at `place`: in front of a word, or at the last cut."""
        lowest = max(start, place - 4 * self.context)
        found = None
        for match in WORD_START.finditer(text, lowest, max(lowest, place - self.context)):
            found = match.start()
        return start if found is None else found

    def _splits(self, text: str, first: int, place: int, start: int, begun: bool) -> bool:
        return self._equal(text[first : place + self.context], place - first, begun or first > start)

    def _equal(self, text: str, place: int, continues: bool) -> bool:
        whole = self.encode(text, continues)
        before, after = self.encode(text[:place], continues), self.encode(text[place:], True)
        return len(whole) == len(before) + len(after) and np.array_equal(whole, np.concatenate([before, after]))


def cut_at_words(pieces: Iterable[str], characters: int = CUT_CHARACTERS, longest: int | None = None) -> Iterator[str]:
    """Text in pieces of about `characters`, each but the first beginning with the space or newline before a word.

    Byte-level BPE with GPT-2's pattern always ends a word there (it looks one character ahead at most, and only past
    white space). With `longest`, a run of so many characters without such a place is cut anywhere.
    """
    kept = ""
    for piece in pieces:
        kept += piece
        start = 0
        while (place := WORD_START.search(kept, start + characters)) is not None:
            yield kept[start : place.start()]
            start = place.start()
        kept = kept[start:]
        while longest is not None and len(kept) > longest:
            yield kept[:longest]
            kept = kept[longest:]
    if kept:
        yield kept
