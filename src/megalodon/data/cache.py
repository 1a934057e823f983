"""Tokenised once: a corpus as one memory-mapped array of token ids that knows where its documents begin.

A cache is a folder `<root>/tokens/<fingerprint>` with

    tokens.bin          all ids one after another, uint8, uint16 or uint32, little-endian
    index.safetensors   offsets [n+1], document_bytes [n], names (UTF-8, joined) with name_ends [n],
                        token_lengths [vocab_size] where tokens map to bytes
    meta.json           format version, sizes, the index's sha256, and what it was made from

The fingerprint covers corpus, tokenizer and format, so a changed file makes a new cache. A document's ids end with the
tokenizer's end-of-document id, where it has one. Folders appear complete or not at all; builders of the same cache wait
for one another. Truncation and a changed index are noticed; token values carry no checksum, because reading all of a
large corpus at every start would take minutes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from megalodon.data.corpus import Corpus, CorpusConfig
from megalodon.data.tokenizer import Tokenizer

FORMAT = 1
ENVIRONMENT = "MEGALODON_CACHE"
GROUP_CHARACTERS = 1 << 20

logger = logging.getLogger("megalodon.data")


@dataclass(frozen=True)
class TokenizeProgress:
    """How far `tokenize` is. `total_bytes` is None where the corpus's size is not known beforehand."""

    documents: int
    tokens: int
    bytes: int
    total_bytes: int | None


class DocumentNames(Sequence[str]):
    """Names of documents, kept as one UTF-8 array so that millions of them stay small."""

    def __init__(self, joined: np.ndarray, ends: np.ndarray) -> None:
        self.joined, self.ends = joined, ends

    @classmethod
    def of(cls, names: Sequence[str]) -> DocumentNames:
        encoded = [name.encode(errors="surrogateescape") for name in names]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        start = int(self.ends[i - 1]) if i else 0
        return self.joined[start : int(self.ends[i])].tobytes().decode(errors="replace")


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """Documents as token ids.

    `tokens` [T] (unsigned, usually memory-mapped), `offsets` [n+1] int64: document i is
    tokens[offsets[i]:offsets[i+1]], its end-of-document id included; `document_bytes` [n] int64: size of each text in
    UTF-8; `token_lengths` [vocab_size] int64: bytes per id, or None where the tokenizer cannot tell.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    document_bytes: np.ndarray
    names: Sequence[str]
    vocab_size: int
    eos_token_id: int | None
    token_lengths: np.ndarray | None
    tokenizer_name: str
    fingerprint: str
    max_token_id: int
    folder: Path | None = None

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def document(self, index: int) -> np.ndarray:
        """The ids of one document, a view."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @classmethod
    def from_documents(cls, documents: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> TokenizedCorpus:
        """A corpus in memory from (name, text) pairs, for texts that are not worth a cache."""
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        encoded = [np.append(tokenizer.encode(text), np.array(end, dtype=np.int64)) for _, text in documents]
        tokens = np.concatenate([*encoded, np.zeros(0, np.int64)]).astype(id_dtype(tokenizer.vocab_size))
        if not len(tokens):
            raise ValueError("no text: every document is empty")
        digest = hashlib.sha256(tokenizer.fingerprint.encode() + tokens.tobytes())
        return cls(
            tokens=tokens,
            offsets=np.cumsum([0, *map(len, encoded)], dtype=np.int64),
            document_bytes=np.array([len(text.encode()) for _, text in documents], dtype=np.int64),
            names=[name for name, _ in documents],
            vocab_size=tokenizer.vocab_size,
            eos_token_id=tokenizer.eos_token_id,
            token_lengths=tokenizer.token_lengths,
            tokenizer_name=tokenizer.name,
            fingerprint=digest.hexdigest(),
            max_token_id=int(tokens.max()),
        )


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint8, uint16, uint32 (little-endian) that holds ids below `vocab_size`."""
    return np.dtype(np.min_scalar_type(vocab_size - 1)).newbyteorder("<")


def cache_root(folder: Path | str | None = None) -> Path:
    """Where caches live: `folder`, else the environment variable MEGALODON_CACHE, else ~/.cache/megalodon."""
    chosen = folder or os.environ.get(ENVIRONMENT) or Path.home() / ".cache" / "megalodon"
    return Path(chosen).expanduser()


def tokenize(
    corpus: Corpus | CorpusConfig | dict[str, Any],
    tokenizer: Tokenizer,
    cache_folder: Path | str | None = None,
    progress: Callable[[TokenizeProgress], None] | None = None,
) -> TokenizedCorpus:
    """The corpus as token ids: from its cache where there is one, built now otherwise, in constant memory.

    A damaged cache is built again, with a warning. Empty documents are left out. Raises ValueError for bad text and for
    a corpus without any, FileNotFoundError for one that does not exist, OSError where the cache cannot be written.
    """
    found = corpus if isinstance(corpus, Corpus) else Corpus(corpus)
    fingerprint = hashlib.sha256(json.dumps([FORMAT, found.fingerprint(), tokenizer.fingerprint]).encode()).hexdigest()
    folder = cache_root(cache_folder) / "tokens" / fingerprint[:32]
    if (ready := _open_or_none(folder)) is not None:
        return ready
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (ready := _open_or_none(folder)) is not None:  # another process built it while this one waited
            return ready
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)  # left by a builder that was killed
        partial.mkdir()
        try:
            _build(found, tokenizer, partial, fingerprint, progress)
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                message = "disk full while writing the token cache; free space, or set another cache folder with"
                raise OSError(error.errno, f"{message} {ENVIRONMENT}", str(folder.parent)) from None
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return open_tokenized(folder)


def _open_or_none(folder: Path) -> TokenizedCorpus | None:
    if not folder.is_dir():
        return None
    try:
        return open_tokenized(folder)
    except ValueError as error:
        logger.warning("%s; building it again", error)
        return None


def open_tokenized(folder: Path | str) -> TokenizedCorpus:
    """A finished cache. Raises FileNotFoundError, or ValueError for one that is truncated or corrupt."""
    folder = Path(folder)
    meta_path, index_path, tokens_path = (folder / n for n in ("meta.json", "index.safetensors", "tokens.bin"))
    if not folder.is_dir():
        raise FileNotFoundError(f"no token cache at {folder}")
    try:
        meta = json.loads(meta_path.read_text())
        if meta["format"] != FORMAT:
            raise ValueError(f"it has format {meta['format']}, this version reads {FORMAT}")
        if _sha256(index_path) != meta["index_sha256"]:
            raise ValueError("the checksum of index.safetensors differs")
        dtype = np.dtype(meta["dtype"])
        expected, size = meta["num_tokens"] * dtype.itemsize, tokens_path.stat().st_size
        if size != expected:
            raise ValueError(f"tokens.bin has {size} bytes, not {expected}")
        index = load_file(index_path)
        # A plain view: slicing np.memmap itself costs several times more.
        tokens = np.memmap(tokens_path, dtype=dtype, mode="r").view(np.ndarray)
        return TokenizedCorpus(
            tokens=tokens,
            offsets=index["offsets"],
            document_bytes=index["document_bytes"],
            names=DocumentNames(index["names"], index["name_ends"]),
            token_lengths=index.get("token_lengths"),
            folder=folder,
            **{key: meta[key] for key in _META_FIELDS},
        )
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise ValueError(f"the token cache {folder} is damaged ({error}): delete it to have it built again") from error


_META_FIELDS = ("vocab_size", "eos_token_id", "tokenizer_name", "fingerprint", "max_token_id")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class _Writer:
    """Appends documents to tokens.bin and remembers where they begin."""

    def __init__(self, stream: BinaryIO, tokenizer: Tokenizer) -> None:
        self.stream, self.tokenizer = stream, tokenizer
        self.dtype = id_dtype(tokenizer.vocab_size)
        self.offsets, self.document_bytes, self.name_ends = array("q", [0]), array("q"), array("q")
        self.names = bytearray()
        self.num_tokens = self.num_bytes = self.max_token_id = 0

    def write(self, ids: np.ndarray) -> None:
        if not len(ids):
            return
        self.max_token_id = max(self.max_token_id, int(ids.max()))
        self.stream.write(ids.astype(self.dtype).tobytes())
        self.num_tokens += len(ids)

    def end_document(self, name: str, num_bytes: int) -> None:
        if self.num_tokens == self.offsets[-1]:
            return  # an empty document
        if self.tokenizer.eos_token_id is not None:
            self.write(np.array([self.tokenizer.eos_token_id], dtype=np.int64))
        self.offsets.append(self.num_tokens)
        self.document_bytes.append(num_bytes)
        self.num_bytes += num_bytes
        self.names += name.encode(errors="surrogateescape")
        self.name_ends.append(len(self.names))

    def index(self) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {
            "offsets": np.array(self.offsets, dtype=np.int64),
            "document_bytes": np.array(self.document_bytes, dtype=np.int64),
            "names": np.frombuffer(bytes(self.names), dtype=np.uint8),
            "name_ends": np.array(self.name_ends, dtype=np.int64),
        }
        lengths = self.tokenizer.token_lengths
        return arrays if lengths is None else arrays | {"token_lengths": lengths}


def _build(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    fingerprint: str,
    progress: Callable[[TokenizeProgress], None] | None,
) -> None:
    read = 0
    with (folder / "tokens.bin").open("wb") as stream:
        writer = _Writer(stream, tokenizer)
        for group in _groups(corpus, tokenizer):
            for ids, (_, name, num_bytes) in zip(
                tokenizer.encode_batch([text for text, *_ in group]), group, strict=True
            ):
                writer.write(ids)
                if name is not None:
                    writer.end_document(name, num_bytes)
            read += sum(len(text.encode()) for text, *_ in group)
            if progress is not None:
                done = len(writer.document_bytes)
                progress(TokenizeProgress(done, writer.num_tokens, read, corpus.total_bytes))
        stream.flush()
        os.fsync(stream.fileno())
    if not writer.num_tokens:
        raise ValueError(f"source {corpus.config.source!r} has no text: it is empty, or each of its documents is")
    save_file(writer.index(), folder / "index.safetensors")
    meta = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "dtype": writer.dtype.str,
        "num_tokens": writer.num_tokens,
        "num_documents": len(writer.document_bytes),
        "num_bytes": writer.num_bytes,
        "max_token_id": writer.max_token_id,
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "tokenizer_name": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "corpus": corpus.config.model_dump(mode="json", exclude_defaults=True),
        "index_sha256": _sha256(folder / "index.safetensors"),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _groups(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[list[tuple[str, str | None, int]]]:
    """Groups of (text, name, bytes) of about a million characters, so that a tokenizer can use all cores on each.

    A document longer than a group comes in several texts; its name and its size in bytes stand with the last, the
    others have None and 0.
    """
    group: list[tuple[str, str | None, int]] = []
    characters = 0
    for document in corpus.documents():
        num_bytes = 0
        for text in tokenizer.cut(document.pieces):
            group.append((text, None, 0))
            num_bytes += len(text.encode())
            characters += len(text)
            if characters >= GROUP_CHARACTERS:
                yield group
                group, characters = [], 0
        group.append(("", document.name, num_bytes))
    if group:
        yield group


def check_vocabulary(source: Tokenizer | TokenizedCorpus, vocab_size: int) -> None:
    """Raise ValueError unless every id of a tokenizer or of a tokenised corpus is below the model's `vocab_size`."""
    if isinstance(source, TokenizedCorpus):
        largest, what = source.max_token_id, f"the corpus (tokenizer {source.tokenizer_name!r})"
    else:
        largest, what = source.vocab_size - 1, f"tokenizer {source.name!r}"
    if largest >= vocab_size:
        raise ValueError(
            f"token ids out of range: {what} has ids up to {largest}, the model's vocab_size is {vocab_size}; "
            f"set vocab_size to {largest + 1} or more, or use the tokenizer that the model was made for"
        )
