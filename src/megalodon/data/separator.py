"""Separators that stand in a text as words, such as `<|endoftext|>`: counted, and documents cut there when asked to.

A tokenizer takes them for ordinary text, as it must: a text about tokenizers is no end of a document.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


def split_at(pieces: Iterable[str], separator: str) -> Iterator[Iterator[str]]:
    """The texts between the separators of a text in pieces, each in pieces, in order; the separator is left out.

    Nothing but the piece at hand is in memory. Texts come one after another: whoever asks for the next one is done with
    the one before.
    """
    source = iter(pieces)
    held, at = "", 0  # what was read and not given out is held[at:]
    ended, more = False, True

    def until_separator() -> Iterator[str]:
        nonlocal held, at, ended, more
        while True:
            place = held.find(separator, at)
            if place >= 0:
                before, at = held[at:place], place + len(separator)
                ended = True
                if before:
                    yield before
                return
            sure = max(at, len(held) - len(separator) + 1)  # what comes next may complete a separator after that
            before, held, at = held[at:sure], held[sure:], 0
            if before:
                yield before
            piece = next(source, None)
            if piece is None:
                more, ended = False, True
                rest, held = held, ""
                if rest:
                    yield rest
                return
            held += piece

    while more:
        ended = False
        text = until_separator()
        yield text
        while not ended:  # whatever was not read of it
            next(text, None)


class Counter:
    """Counts words in texts that pass through, also where pieces cut them."""

    def __init__(self, words: Sequence[str]) -> None:
        self.counts = dict.fromkeys((word for word in words if word), 0)
        self._longest = max(map(len, self.counts), default=0)

    def through(self, pieces: Iterable[str]) -> Iterator[str]:
        """The same pieces of one text."""
        tail = ""
        for piece in pieces:
            joined = tail + piece
            for word in self.counts:
                # Those that lie in the tail alone were counted with the piece before.
                self.counts[word] += joined.count(word) - tail.count(word)
            tail = joined[-(self._longest - 1) :] if self._longest > 1 else ""
            yield piece

    def told(self) -> str | None:
        """What was found, and what to do if it was meant otherwise; None where nothing was."""
        found = {word: count for word, count in self.counts.items() if count}
        return separators_told(found)


def separators_told(found: dict[str, int]) -> str | None:
    """As `Counter.told`, of counts that were kept."""
    if not found:
        return None
    listed = ", ".join(f"{word} {count:,} time{'s' * (count != 1)}" for word, count in found.items())
    return (
        f"the text spells {listed}: it is read as ordinary text and ends no document; if it separates documents, set "
        f"separator to {next(iter(found))!r}"
    )
