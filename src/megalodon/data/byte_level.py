"""The byte-level alphabet of GPT-2: each of the 256 bytes written as one printable character.

Byte-level tokenizers spell their tokens in it, so it is what maps tokens to bytes. Printable Latin-1 characters stand
for themselves, the other 68 bytes take U+0100 upwards in order.
"""

from __future__ import annotations

PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTE_TO_CHARACTER = {byte: chr(byte) for byte in PRINTABLE}
BYTE_TO_CHARACTER |= {byte: chr(0x100 + i) for i, byte in enumerate(b for b in range(256) if b not in PRINTABLE)}
CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}


def spelled_bytes(token: str) -> bytes:
    """The bytes that a byte-level token spells. A token outside the alphabet is literal text, taken as UTF-8."""
    try:
        return bytes(CHARACTER_TO_BYTE[character] for character in token)
    except KeyError:
        return token.encode()
