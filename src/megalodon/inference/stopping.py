"""Stop strings in text that arrives in pieces: found wherever the pieces are cut, and never shown."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on until one of the strings occurs in it. What could be the beginning of one is held back meanwhile.

    Attributes:
        stopped: whether one has occurred. Nothing is passed on any more.
    """

    def __init__(self, strings: Sequence[str], before: str = "") -> None:
        """`before` is text that was given out earlier, in which a string may have begun.

        Raises:
            ValueError: for an empty string.
        """
        if not all(strings):
            raise ValueError("stop: a stop string is empty; give at least one character")
        self.strings = tuple(strings)
        self.stopped = False
        self._longest = max(map(len, self.strings), default=0)
        self._given = self._tail(before)
        self._held = ""

    def feed(self, text: str) -> str:
        """What may be shown now that `text` has arrived."""
        if self.stopped:
            return ""
        window, given = self._given + self._held + text, len(self._given)
        places = [window.find(string, max(0, given - len(string) + 1)) for string in self.strings]
        found = [place for place in places if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return window[given : max(given, min(found))]
        end = len(window) - min(self._possible_beginning(window), len(window) - given)
        self._given, self._held = self._tail(window[:end]), window[end:]
        return window[given:end]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        self._given = self._tail(self._given + held)
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(string.startswith(text[-length:]) for string in self.strings):
                return length
        return 0

    def _tail(self, text: str) -> str:
        return text[len(text) - min(self._longest - 1, len(text)) :] if self._longest > 1 else ""
