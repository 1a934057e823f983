"""Tokenised once: a corpus as one memory-mapped array of token ids that knows where its documents begin.

A cache is a folder `<root>/tokens/<fingerprint>` with

    tokens.bin          all ids one after another, uint8, uint16 or uint32, little-endian
    sizes.bin           bytes of text for each of them, uint32, where ids alone do not tell
    index.safetensors   offsets [n+1], document_bytes [n], document_hashes [n], names (UTF-8, joined) with
                        name_ends [n], token_lengths [vocab_size] where ids map to bytes
    meta.json           format version, sizes, the index's sha256, and what it was made from

The fingerprint covers the contents of the corpus, its documents' names, tokenizer and format: a changed file makes a
new cache, whatever its name and time say, and one that was merely touched does not. A document's ids end with the
tokenizer's end-of-document id, where it has one. Folders appear complete or not at all; builders of the same cache wait
for one another. Truncation and a changed index are noticed; token values carry no checksum, because reading all of a
large corpus at every start would take minutes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from megalodon.data.corpus import Corpus, CorpusConfig
from megalodon.data.separator import Counter
from megalodon.data.tokenized import SIZE_DTYPE, ContentDigest, DocumentNames, TokenizedCorpus, id_dtype
from megalodon.data.tokenizer import Tokenizer
from megalodon.files import disk_errors, is_full

FORMAT = 4
ENVIRONMENT = "MEGALODON_CACHE"
GROUP_CHARACTERS = 1 << 18

logger = logging.getLogger("megalodon.data")


@dataclass(frozen=True)
class TokenizeProgress:
    """How far `tokenize` is. `total_bytes` is None where the corpus's size is not known beforehand."""

    documents: int
    tokens: int
    bytes: int
    total_bytes: int | None


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
    root = cache_root(cache_folder)
    try:
        return _tokenized(found, tokenizer, root, progress)
    except OSError as error:
        if is_full(error):
            message = "disk full while writing the token cache; free space, or set another cache folder with"
            raise OSError(error.errno, f"{message} {ENVIRONMENT}", str(root)) from None
        raise


def _tokenized(
    found: Corpus, tokenizer: Tokenizer, root: Path, progress: Callable[[TokenizeProgress], None] | None
) -> TokenizedCorpus:
    known, before = found.fingerprint(root / "content"), found.stamps()
    key = hashlib.sha256(json.dumps([FORMAT, known, tokenizer.fingerprint]).encode()).hexdigest()
    folder = root / "tokens" / key[:32]
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
            _build(found, tokenizer, partial, progress)
            if found.stamps() != before:
                raise ValueError(f"source {found.config.source!r} was changed while it was read: wait until it is done")
            shutil.rmtree(folder, ignore_errors=True)
            partial.replace(folder)
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
        sizes_path = folder / "sizes.bin" if meta["has_sizes"] else None
        if sizes_path is not None and sizes_path.stat().st_size != meta["num_tokens"] * SIZE_DTYPE.itemsize:
            raise ValueError("sizes.bin is truncated")
        index = load_file(index_path)
        # A plain view: slicing np.memmap itself costs several times more.
        tokens = np.memmap(tokens_path, dtype=dtype, mode="r").view(np.ndarray)
        sizes = None if sizes_path is None else np.memmap(sizes_path, dtype=SIZE_DTYPE, mode="r").view(np.ndarray)
        return TokenizedCorpus(
            tokens=tokens,
            offsets=index["offsets"],
            document_bytes=index["document_bytes"],
            document_hashes=index["document_hashes"],
            names=DocumentNames(index["names"], index["name_ends"]),
            token_lengths=index.get("token_lengths"),
            sizes=sizes,
            folder=folder,
            **{key: meta[key] for key in _META_FIELDS},
        )
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise ValueError(f"the token cache {folder} is damaged ({error}): delete it to have it built again") from error


_META_FIELDS = (
    *("vocab_size", "eos_token_id", "tokenizer_name", "tokenizer_fingerprint", "fingerprint", "max_token_id"),
    *("bad_rows", "separators"),
)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class _Writer:
    """Appends documents to tokens.bin and sizes.bin and remembers where they begin."""

    def __init__(self, tokens: BinaryIO, sizes: BinaryIO, tokenizer: Tokenizer) -> None:
        self.tokens, self.sizes, self.tokenizer = tokens, sizes, tokenizer
        self.dtype = id_dtype(tokenizer.vocab_size)
        self.digest = ContentDigest(tokenizer)
        self.offsets, self.document_bytes, self.name_ends = array("q", [0]), array("q"), array("q")
        self.names = bytearray()
        self.num_tokens = self.num_bytes = self.max_token_id = 0
        self.has_sizes = not tokenizer.sizes_by_id

    def write(self, ids: np.ndarray, sizes: np.ndarray | None, text: str = "") -> None:
        """Ids of the present document, bytes of text for each, and their text."""
        if not len(ids):
            return
        self.max_token_id = max(self.max_token_id, int(ids.max()))
        written = ids.astype(self.dtype)
        self.tokens.write(written.tobytes())
        self.digest.add(written, text)
        self.has_sizes &= sizes is not None
        if self.has_sizes and sizes is not None:
            self.sizes.write(sizes.astype(SIZE_DTYPE).tobytes())
        self.num_tokens += len(ids)

    def end_document(self, name: str, num_bytes: int) -> None:
        if self.num_tokens == self.offsets[-1]:
            return  # an empty document
        if self.tokenizer.eos_token_id is not None:
            self.write(np.array([self.tokenizer.eos_token_id], dtype=np.int64), np.zeros(1, dtype=np.int64))
        self.digest.end_document()
        self.offsets.append(self.num_tokens)
        self.document_bytes.append(num_bytes)
        self.num_bytes += num_bytes
        self.names += name.encode(errors="surrogateescape")
        self.name_ends.append(len(self.names))

    def index(self) -> dict[str, np.ndarray]:
        arrays: dict[str, np.ndarray] = {
            "offsets": np.array(self.offsets, dtype=np.int64),
            "document_bytes": np.array(self.document_bytes, dtype=np.int64),
            "document_hashes": self.digest.document_hashes(),
            "names": np.frombuffer(bytes(self.names), dtype=np.uint8),
            "name_ends": np.array(self.name_ends, dtype=np.int64),
        }
        lengths = self.tokenizer.token_lengths
        return arrays if lengths is None else arrays | {"token_lengths": lengths}


def _build(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, progress: Callable[[TokenizeProgress], None] | None
) -> None:
    counter = Counter([] if corpus.config.separator else tokenizer.separators)
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "sizes.bin").open("wb") as sizes:
        writer = _Writer(tokens, sizes, tokenizer)
        _write_documents(corpus, counter, writer, progress)
        for stream in (tokens, sizes):
            stream.flush()
            os.fsync(stream.fileno())
    if not writer.num_tokens:
        rows = corpus.bad_rows.told()
        why = f"; {rows}" if rows else ""
        raise ValueError(f"source {corpus.config.source!r} has no text: it is empty, or each of its documents is{why}")
    if not writer.has_sizes:
        (folder / "sizes.bin").unlink()
    index = writer.index()
    with disk_errors(folder / "index.safetensors"):
        save_file(index, folder / "index.safetensors")
    meta = {
        "format": FORMAT,
        "fingerprint": writer.digest.fingerprint(index["offsets"]),
        "dtype": writer.dtype.str,
        "has_sizes": writer.has_sizes,
        "num_tokens": writer.num_tokens,
        "num_documents": len(writer.document_bytes),
        "num_bytes": writer.num_bytes,
        "max_token_id": writer.max_token_id,
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "tokenizer_name": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "corpus": corpus.config.model_dump(mode="json", exclude_defaults=True),
        "bad_rows": corpus.bad_rows.told(),
        "separators": {word: count for word, count in counter.counts.items() if count},
        "index_sha256": _sha256(folder / "index.safetensors"),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _write_documents(
    corpus: Corpus, counter: Counter, writer: _Writer, progress: Callable[[TokenizeProgress], None] | None
) -> None:
    read = 0
    for group in _groups(corpus, counter, writer.tokenizer):
        encoded = writer.tokenizer.encode_pieces([part.text for part in group], [part.continues for part in group])
        for piece, part in zip(encoded, group, strict=True):
            writer.write(piece.ids, piece.sizes, part.text)
            if part.ends is not None:
                writer.end_document(part.ends, part.num_bytes)
        read += sum(len(part.text.encode()) for part in group)
        if progress is not None:
            done = len(writer.document_bytes)
            progress(TokenizeProgress(done, writer.num_tokens, read, corpus.total_bytes))


@dataclass(frozen=True)
class _Part:
    """A piece of a document's text; the last, which is empty, has the document's name and its size in bytes."""

    text: str
    continues: bool
    ends: str | None = None
    num_bytes: int = 0


def _groups(corpus: Corpus, counter: Counter, tokenizer: Tokenizer) -> Iterator[list[_Part]]:
    """Groups of parts of some hundred thousand characters, so that a tokenizer can use all cores on each. A document
    longer than a group comes in several."""
    group: list[_Part] = []
    characters = 0
    for document in corpus.documents():
        num_bytes, continues = 0, False
        for text in tokenizer.cut(counter.through(document.pieces)):
            group.append(_Part(text, continues))
            continues = True
            num_bytes += len(text.encode())
            characters += len(text)
            if characters >= GROUP_CHARACTERS:
                yield group
                group, characters = [], 0
        group.append(_Part("", True, document.name, num_bytes))
    if group:
        yield group
