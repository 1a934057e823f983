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
from tokenizers import models
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megalodon.data.byte_level import spelled_bytes
from megalodon.data.byte_transformers import byte_tokenizer_for_transformers
from megalodon.data.cutting import CUT_CHARACTERS, Cutter
from megalodon.data.tokenizer import (
    ByteStreamDecoder,
    ByteTokenizer,
    Encoded,
    StreamDecoder,
    TokenIds,
    Tokenizer,
    save_pretrained,
)

# What a bare tokenizer.json may call its end of document; the first that it holds as a special token is taken.
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
WHITE_SPACE = re.compile(r"\s")
SPACE_MARK = "\u2581"
"""SentencePiece's spelling of a space."""
DROPPING = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit")
"""Splitters that leave white space or delimiters out."""
BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


class PretrainedTokenizer(Tokenizer):
    """A Transformers tokenizer. `transformers` is the wrapped object, for code that wants it.

    Ids map to bytes for byte-level tokenizers (GPT-2, Llama 3, Qwen ...) and, for SentencePiece-like ones with byte
    fallback (Llama 2, Mistral), up to the space that those put in front of a text. For others `token_bytes` is None.
    The sizes of `encode_pieces` are those of the text as it stands: a space that was put in front counts nothing, one
    that is spelled with three bytes counts one, and normalised text counts as before it was normalised.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        self.transformers = tokenizer
        self.name = name
        self.eos_token_id = tokenizer.eos_token_id
        vocabulary = tokenizer.get_vocab()
        if not vocabulary:
            raise ValueError(f"tokenizer {name!r} has an empty vocabulary")
        self.vocab_size = max(vocabulary.values()) + 1
        self._backend = plain_backend(tokenizer)
        if self._backend is None:  # a tokenizer written in Python, such as ByT5's
            identity: Any = [type(tokenizer).__name__, sorted(vocabulary.items())]
            spec: dict[str, Any] = {}
        else:
            identity = spec = json.loads(self._backend.to_str())
        written = json.dumps([identity, self.eos_token_id], sort_keys=True)
        self.fingerprint = hashlib.sha256(written.encode()).hexdigest()
        self._vocabulary = vocabulary
        self._byte_level = _decoder_types(spec) == {"ByteLevel"}
        self.token_bytes = self._token_bytes(spec, vocabulary)
        self.sizes_by_id = self._byte_level and _keeps_text(spec)
        self._space = tuple(vocabulary.get(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode())
        self._continuing, self._inside_word = self._backend, self._backend
        if self._backend is not None:
            self._continuing, self._inside_word = _continuing_backends(self._backend, spec)
        ends = [tokenizer.eos_token, *super().separators]
        self.separators = tuple(dict.fromkeys(word for word in ends if isinstance(word, str)))

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

    def vocabulary(self) -> dict[str, int]:
        return dict(self._vocabulary)

    def cut(self, pieces: Iterable[str], continues: bool = False) -> Iterator[str]:
        """Pieces that, encoded one by one, give the ids of the whole: see `Cutter`."""
        return Cutter(self._encode, self._ends, CUT_CHARACTERS).cut(pieces, continues)

    def _encode(self, text: str, continues: bool) -> np.ndarray:
        return self.encode_pieces([text], [continues], sized=False)[0].ids

    def _ends(self, text: str, continues: bool) -> list[int]:
        if self._backend is None:
            return list(range(1, len(text)))
        head = self._word_left(text) if continues else 0
        ends, start = set[int](), 0
        for part, backend in ((text[:head], self._inside_word), (text[head:], self._backend_for(continues))):
            if part and backend is not None:
                ends |= {start + end for _, end in encoding_of(backend, part).offsets}
            start += len(part)
        return sorted(ends - {0, len(text)})

    def _word_left(self, text: str) -> int:
        """Length of the end of a word with which a text that goes on begins, if words need another treatment inside."""
        if self._inside_word is self._continuing or text[:1].isspace():
            return 0
        found = WHITE_SPACE.search(text)
        return len(text) if found is None else found.start()

    def _backend_for(self, continues: bool) -> tokenizers.Tokenizer:
        assert self._backend is not None and self._continuing is not None
        return self._continuing if continues else self._backend

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [encoded.ids for encoded in self.encode_pieces(texts, [False] * len(texts), sized=False)]

    def encode_pieces(self, texts: Sequence[str], continues: Sequence[bool], sized: bool = True) -> list[Encoded]:
        if self._backend is None:
            plain = {"add_special_tokens": False, "split_special_tokens": True}
            ids = [self.transformers.encode(text, **plain) for text in texts]
            return [Encoded(np.array(each, dtype=np.int64), None) for each in ids]
        if self._inside_word is not self._continuing:
            heads = [self._word_left(text) if goes_on else 0 for text, goes_on in zip(texts, continues, strict=True)]
            if any(heads):
                return [self._in_parts(*piece, sized) for piece in zip(texts, continues, heads, strict=True)]
        with_offsets = sized and self.token_bytes is None
        encoded: dict[int, Encoded] = {}
        for goes_on in set(continues):
            backend = self._backend_for(goes_on)
            places = [i for i, other in enumerate(continues) if other == goes_on]
            encode = backend.encode_batch if with_offsets else backend.encode_batch_fast
            # The library's objects are large, so they are let go one by one.
            encodings = encode([texts[i] for i in places], add_special_tokens=False)[::-1]
            for i in places:
                encoding = encodings.pop()
                own = np.array(encoding.ids, dtype=np.int64)
                sizes: np.ndarray | None = None
                if with_offsets:
                    sizes = sizes_by_offsets(texts[i], encoding.offsets)
                elif sized:
                    sizes = self._sizes(texts[i], own, goes_on)
                encoded[i] = Encoded(own, sizes)
        return [encoded[i] for i in range(len(texts))]

    def _in_parts(self, text: str, continues: bool, head: int, sized: bool) -> Encoded:
        """A piece that may begin inside a word: the end of that word and the words after it, each in its own way."""
        if not head:
            return self.encode_pieces([text], [continues], sized)[0]
        assert self._inside_word is not None
        encoding = encoding_of(self._inside_word, text[:head])
        ids = np.array(encoding.ids, dtype=np.int64)
        sizes = sizes_by_offsets(text[:head], encoding.offsets) if sized else None
        rest = self.encode_pieces([text[head:]], [True], sized)[0]
        if sizes is not None:
            sizes = None if rest.sizes is None else np.concatenate([sizes, rest.sizes])
        return Encoded(np.concatenate([ids, rest.ids]), sizes)

    def _sizes(self, text: str, ids: np.ndarray, continues: bool) -> np.ndarray:
        """Bytes of the text for each id, by what ids stand for as far as that adds up to the text, else by offsets."""
        assert self.token_lengths is not None and self.token_bytes is not None
        sizes: np.ndarray = self.token_lengths[ids]
        if self.sizes_by_id:
            return sizes
        first, second, third = self._space
        if first is not None and len(ids) > 2:  # no token for a space: three bytes stand for it
            marks = np.flatnonzero((ids[:-2] == first) & (ids[1:-1] == second) & (ids[2:] == third))
            sizes[marks] = sizes[marks + 1] = 0
        surplus = int(sizes.sum()) - len(text.encode())
        if surplus == 1 and not continues:  # a space in front that is not in the text
            front = int(np.flatnonzero(sizes)[0])
            if front in (0, 2) and (front == 2 or self.token_bytes[ids[0]].startswith(b" ")):
                sizes[front] -= 1
                surplus = 0
        if surplus == 0:
            return sizes
        return sizes_by_offsets(text, encoding_of(self._backend_for(continues), text).offsets)

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
    backend = plain_backend(loaded)
    if backend is not None and isinstance(backend.model, models.BPE) and backend.get_vocab_size() == 256:
        ours = byte_tokenizer_for_transformers().backend_tokenizer
        if json.loads(backend.to_str())["model"] == json.loads(ours.to_str())["model"]:
            return ByteTokenizer()
    return PretrainedTokenizer(loaded, name)


def encoding_of(backend: tokenizers.Tokenizer, text: str) -> Any:
    """The library's encoding of a text. Its `encode` keeps all other threads from running meanwhile; this does not."""
    return backend.encode_batch([text], add_special_tokens=False)[0]


def plain_backend(tokenizer: PreTrainedTokenizerBase, special: bool = False) -> tokenizers.Tokenizer | None:
    """A copy of the library object that neither truncates nor pads; None for a tokenizer written in Python.

    `special`: special tokens in a text stand for themselves; else they are text.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        return None
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = not special
    return copy


def _decoder_types(spec: dict[str, Any]) -> set[str]:
    decoder = spec.get("decoder") or {}
    return {part["type"] for part in decoder.get("decoders", [decoder]) if part}


def _parts(step: dict[str, Any] | None, *keys: str) -> list[dict[str, Any]]:
    """A normaliser or pre-tokenizer and, of a sequence, all its parts."""
    if step is None:
        return []
    return [step, *(part for key in keys for inner in step.get(key) or [] for part in _parts(inner, *keys))]


def _keeps_text(spec: dict[str, Any]) -> bool:
    """Whether a byte-level tokenizer's tokens spell the text and nothing else."""
    splitters = _parts(spec.get("pre_tokenizer"), "pretokenizers")
    return (
        spec.get("normalizer") is None
        and not any(part.get("add_prefix_space") for part in splitters)
        and not any(part.get("behavior") == "Removed" or part["type"] in DROPPING for part in splitters)
        and not any(token["lstrip"] or token["rstrip"] for token in spec["added_tokens"] if not token["special"])
    )


def _continuing_backends(
    backend: tokenizers.Tokenizer, spec: dict[str, Any]
) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
    """Tokenizers for text that goes on from text before: where white space begins it, and inside a word.

    The second puts no space in front. It is the first as well, but where the tokenizer puts a space in front of every
    word, as those do that split at white space and leave it out.
    """
    changed = json.loads(json.dumps(spec))
    steps = _parts(changed.get("normalizer"), "normalizers") + _parts(changed.get("pre_tokenizer"), "pretokenizers")
    for part in steps:
        if part["type"] == "Prepend":
            part["prepend"] = ""
        if "prepend_scheme" in part:
            part["prepend_scheme"] = "never"
        if "add_prefix_space" in part:
            part["add_prefix_space"] = False
    if changed == spec:
        return backend, backend
    _remove_empty_prepend(changed)
    other = tokenizers.Tokenizer.from_str(json.dumps(changed))
    other.encode_special_tokens = True

    def ids(of: tokenizers.Tokenizer, text: str) -> list[int]:
        return list(of.encode(text, add_special_tokens=False).ids)

    for candidate in (other, backend):
        if all(ids(backend, a + b) == ids(backend, a) + ids(candidate, b) for a, b in (("ab", " ab"), ("a a", " b a"))):
            return candidate, other
    return other, other


def _remove_empty_prepend(spec: dict[str, Any]) -> None:
    """Take out the normalisers that were made to prepend nothing, which the library does not take."""
    normalizer = spec.get("normalizer")
    if normalizer is None:
        return
    if normalizer.get("prepend") == "":
        spec["normalizer"] = None
    for part in _parts(normalizer, "normalizers"):
        if "normalizers" in part:
            part["normalizers"] = [inner for inner in part["normalizers"] if inner.get("prepend") != ""]


def sizes_by_offsets(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Bytes of UTF-8 text that each token stands for, int64 [n], by the places of the text that it came from.

    A character that several tokens share counts for the first, text that no token came from for the next token (for the
    last, at the end), so that they add up to the text.
    """
    if not offsets:
        return np.zeros(0, dtype=np.int64)
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    before = np.concatenate([[0], np.cumsum(widths, dtype=np.int64)])
    ends = np.maximum.accumulate(np.array(offsets, dtype=np.int64)[:, 1])
    ends[-1] = len(text)
    return np.diff(before[ends], prepend=0)


def _fallback_bytes(token: str) -> bytes:
    """The bytes of a SentencePiece token: `<0x41>` is one byte, U+2581 a space."""
    byte = BYTE_FALLBACK.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE_MARK, " ").encode()
