"""Tokenizers of the `tokenizers` and `transformers` libraries behind our `Tokenizer`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megalodon.data.byte_level import BYTE_TO_CHARACTER, spelled_bytes
from megalodon.data.tokenizer import (
    ByteStreamDecoder,
    ByteTokenizer,
    StreamDecoder,
    TokenIds,
    Tokenizer,
    save_pretrained,
)

# What a bare tokenizer.json may call its end of document; the first that it holds as a special token is taken.
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
CUT_CHARACTERS = 1 << 16
BATCH_CHARACTERS = 1 << 20
# A place between a character that is no white space and a following space or newline.
WORD_START = re.compile(r"(?<=\S)[ \n]")
BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


class PretrainedTokenizer(Tokenizer):
    """A Transformers tokenizer. `transformers` is the wrapped object, for code that wants it.

    Tokens map to bytes for byte-level tokenizers (GPT-2, Llama 3, Qwen ...) and, for SentencePiece-like ones with byte
    fallback (Llama 2, Mistral), up to the space that those put in front of a text. For others `token_bytes` is None.
    Where the tokenizer normalises text, the bytes are those of the normalised text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.transformers = tokenizer
        self.name = name
        self.eos_token_id = tokenizer.eos_token_id
        vocabulary = tokenizer.get_vocab()
        if not vocabulary:
            raise ValueError(f"tokenizer {name!r} has an empty vocabulary")
        self.vocab_size = max(vocabulary.values()) + 1
        self._backend = _plain_backend(tokenizer)
        if self._backend is None:  # a tokenizer written in Python, such as ByT5's
            identity: Any = [type(tokenizer).__name__, sorted(vocabulary.items())]
            spec: dict[str, Any] = {}
        else:
            identity = spec = json.loads(self._backend.to_str())
        written = json.dumps([identity, self.eos_token_id], sort_keys=True)
        self.fingerprint = hashlib.sha256(written.encode()).hexdigest()
        self._cuts_at_words = _cuts_at_words(spec)
        self._byte_level = _decoder_types(spec) == {"ByteLevel"}
        self.token_bytes = self._token_bytes(spec, vocabulary)

    def _token_bytes(self, spec: dict[str, Any], vocabulary: dict[str, int]) -> list[bytes] | None:
        if self._byte_level:
            spell = spelled_bytes
        elif "ByteFallback" in _decoder_types(spec):
            spell = _fallback_bytes
        else:
            return None
        table = [b""] * self.vocab_size
        for token, index in vocabulary.items():
            table[index] = spell(token)
        for added in spec["added_tokens"]:
            table[added["id"]] = b"" if added["special"] else added["content"].encode()
        return table

    def cut(self, pieces: Iterable[str]) -> Iterator[str]:
        """Cuts in front of a space or newline that follows a visible character, where byte-level BPE with GPT-2's
        pattern always ends a word (its pattern looks one character ahead at most, and only past white space). Memory
        is bounded by the longest run without such a place. Other tokenizers keep the text whole."""
        return cut_at_words(pieces) if self._cuts_at_words else super().cut(pieces)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._backend is None:
            plain = {"add_special_tokens": False, "split_special_tokens": True}
            return [np.array(self.transformers.encode(text, **plain), dtype=np.int64) for text in texts]
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]

    def encode_stream(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        group: list[str] = []  # several pieces at once, so that the library can use all cores
        for text in self.cut(pieces):
            group.append(text)
            if sum(map(len, group)) >= BATCH_CHARACTERS:
                yield np.concatenate(self.encode_batch(group))
                group = []
        if group:
            yield np.concatenate(self.encode_batch(group))

    def decode(self, ids: TokenIds) -> str:
        checked = self._check_ids(ids).tolist()
        if self._byte_level and self.token_bytes is not None:
            return b"".join(self.token_bytes[i] for i in checked).decode(errors="replace")
        return str(self.transformers.decode(checked, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def stream_decoder(self) -> StreamDecoder:
        return ByteStreamDecoder(self) if self._byte_level else TextStreamDecoder(self)

    def save(self, folder: Path | str) -> None:
        save_pretrained(self.transformers, folder)


class TextStreamDecoder(StreamDecoder):
    """For any other tokenizer: decodes the ids since the last text given out, after a few ids of what stood before.

    A token's text may depend on its neighbours (spaces between words), so the new text is what the decoding of
    before + new has beyond that of before. It is held back while it ends in U+FFFD, half a character.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._new: list[int] = []

    def feed(self, ids: int | TokenIds) -> str:
        arrived = [int(ids)] if isinstance(ids, int | np.integer) else [int(i) for i in ids]
        return "".join(self._feed_one(i) for i in arrived)

    def _feed_one(self, index: int) -> str:
        self._new.append(index)
        known, text = self._texts()
        if text.endswith("\ufffd") or len(text) <= len(known):
            return ""
        self._before, self._new = self._new, []
        return text[len(known) :]

    def flush(self) -> str:
        known, text = self._texts()
        self._before, self._new = [], []
        return text[len(known) :]

    def _texts(self) -> tuple[str, str]:
        return self._tokenizer.decode(self._before), self._tokenizer.decode(self._before + self._new)


def cut_at_words(pieces: Iterable[str], characters: int = CUT_CHARACTERS) -> Iterator[str]:
    """Text in pieces of about `characters`, each but the first beginning with the space or newline before a word."""
    kept = ""
    for piece in pieces:
        kept += piece
        start = 0
        while (place := WORD_START.search(kept, start + characters)) is not None:
            yield kept[start : place.start()]
            start = place.start()
        kept = kept[start:]
    if kept:
        yield kept


def tokenizer_from_file(path: Path) -> Tokenizer:
    """The tokenizer in a `tokenizer.json`. Its end of document is the first of END_TOKENS that it marks as special."""
    try:
        loaded = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer {str(path)!r}: not a tokenizer.json of the tokenizers library ({error})") from None
    special = {token.content for token in loaded.get_added_tokens_decoder().values() if token.special}
    end = next((token for token in END_TOKENS if token in special), None)
    return _wrap(PreTrainedTokenizerFast(tokenizer_object=loaded, eos_token=end), str(path))


def tokenizer_from_pretrained(name: Path | str) -> Tokenizer:
    """The tokenizer in a folder, or of a name on the Hugging Face hub. No code of the folder is run."""
    if isinstance(name, Path) and not any((name / f).is_file() for f in ("tokenizer.json", "tokenizer_config.json")):
        raise FileNotFoundError(f"tokenizer: folder {str(name)!r} has neither tokenizer.json nor tokenizer_config.json")
    try:
        loaded = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # OSError, ValueError, and the library's bare Exception for a damaged file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"tokenizer {str(name)!r} cannot be loaded ({reason}). Give `bytes`, a tokenizer.json, a folder with a "
            "tokenizer, or a name on the Hugging Face hub"
        ) from error
    return _wrap(loaded, str(name))


def _wrap(loaded: PreTrainedTokenizerBase, name: str) -> Tokenizer:
    """Ours around theirs; the saved byte tokenizer comes back as the built-in one, which is much faster."""
    backend = _plain_backend(loaded)
    if backend is not None and isinstance(backend.model, models.BPE) and backend.get_vocab_size() == 256:
        ours = byte_tokenizer_for_transformers().backend_tokenizer
        if json.loads(backend.to_str())["model"] == json.loads(ours.to_str())["model"]:
            return ByteTokenizer()
    return PretrainedTokenizer(loaded, name)


def byte_tokenizer_for_transformers() -> PreTrainedTokenizerFast:
    """`ByteTokenizer` as a Transformers tokenizer: a byte-level BPE without merges whose ids are the bytes.

    Byte 0 is spelled as itself, not by its character of the alphabet (U+0100, which text may hold), so that it can be
    the special token for end of document and padding.
    """
    vocabulary = {"\0": 0} | {BYTE_TO_CHARACTER[byte]: byte for byte in range(1, 256)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("\0", special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="\0", pad_token="\0", clean_up_tokenization_spaces=False
    )


def _plain_backend(tokenizer: PreTrainedTokenizerBase) -> tokenizers.Tokenizer | None:
    """A copy of the library object that neither truncates nor pads and takes special tokens in text for text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        return None
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def _decoder_types(spec: dict[str, Any]) -> set[str]:
    decoder = spec.get("decoder") or {}
    return {part["type"] for part in decoder.get("decoders", [decoder]) if part}


def _cuts_at_words(spec: dict[str, Any]) -> bool:
    """Whether the tokenizer splits words by GPT-2's pattern and by nothing else, so that `cut_at_words` is safe."""
    splitter = spec.get("pre_tokenizer") or {}
    return (
        splitter.get("type") == "ByteLevel"
        and splitter.get("use_regex", True)
        and not splitter.get("add_prefix_space", True)
        and spec.get("normalizer") is None
        and all(token["special"] for token in spec["added_tokens"])
    )


def _fallback_bytes(token: str) -> bytes:
    """The bytes of a SentencePiece token: `<0x41>` is one byte, U+2581 a space."""
    byte = BYTE_FALLBACK.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()
