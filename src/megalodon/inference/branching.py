"""Where a text will be left by the next one: which states of it are worth keeping.

Chats are edited, answered again and branched, and a state cannot be cut back: whoever leaves a known text at a token
reads on from the last state kept before it. So states are kept where messages begin, and inside long texts at distances
that grow with the distance from the end: whoever changes a text `d` tokens before its end reads those again anyway, and
at most `d / 8` more.
"""

from __future__ import annotations

MOST_APART = 1 << 15
"""Kept states of one text are at most so many tokens apart, so that a text arriving in pieces meets the next one."""


def spacing(distance: int, block: int) -> int:
    """Tokens between kept states at `distance` tokens from the end: a power of two of blocks.

    The positions kept are its multiples. Those of a longer text are a part of those of a shorter one, so that a text
    whose end is not known yet only ever has some given up. Whoever leaves the text `d` tokens before its end finds a
    multiple in the `max(d / 8, block)` tokens before.
    """
    blocks = min(max(distance // 9, block), max(MOST_APART, block)) // block
    return (1 << (blocks.bit_length() - 1)) * block
