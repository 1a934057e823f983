"""Sets of documents for training and held-out measurement. A text is in one of the two, never in both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from megalodon.data.cache import TokenizeProgress, cache_root, tokenize
from megalodon.data.corpus import Corpus, CorpusConfig
from megalodon.data.documents import DocumentSet
from megalodon.data.separator import separators_told
from megalodon.data.shared import find_shared
from megalodon.data.tokenized import TokenizedCorpus
from megalodon.data.tokenizer import Tokenizer

DEFAULT_FRACTION = 0.05


class HeldOutConfig(BaseModel):
    """What to keep out of training: a fraction of the tokens, a number of documents, or another corpus. One of them;
    with none given, 5 % of the tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fraction: float | None = Field(default=None, gt=0, lt=1, description="of the corpus's tokens, in whole documents")
    documents: int | None = Field(default=None, ge=1, description="this many documents, drawn by the seed")
    corpus: CorpusConfig | None = Field(
        default=None, description="a corpus of its own, no text of which may be in the training corpus"
    )
    shared: Literal["refuse", "remove"] = Field(
        default="refuse",
        description="for texts of `corpus` that the training corpus holds too; remove: do not train on them",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_way(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        ways = [key for key in ("fraction", "documents", "corpus") if given.get(key) is not None]
        if len(ways) > 1:
            raise ValueError(f"give one of fraction, documents and corpus; {' and '.join(ways)} were given")
        return given if ways else given | {"fraction": DEFAULT_FRACTION}


def split_documents(
    corpus: TokenizedCorpus, fraction: float | None = None, documents: int | None = None, seed: int = 0
) -> tuple[DocumentSet, DocumentSet]:
    """(training, held-out) by document, drawn by `seed`; give `fraction` (of the tokens) or `documents` (how many).

    By fraction, documents are drawn in random order, and one is taken if that brings the held-out tokens nearer to the
    fraction, so that one huge document does not swallow the training set; if none does, the smallest is taken. Copies
    of a document that is drawn are held out with it, so that there may be more than `documents`. A corpus of one
    document keeps its tail out (with `documents: 1`, the tail of 5 %). Raises ValueError where nothing would be left to
    train on.
    """
    if (fraction is None) == (documents is None):
        raise ValueError("held out: give either a fraction of the tokens or a number of documents")
    if fraction is not None and not 0 < fraction < 1:
        raise ValueError(f"held out: fraction is {fraction}; it must lie between 0 and 1")
    everything = DocumentSet.of(corpus)
    n = len(everything)
    if n == 1 and documents in (None, 1):
        return _cut_tail(everything, fraction or DEFAULT_FRACTION)
    if documents is not None and not 1 <= documents < n:
        raise ValueError(f"held out: documents is {documents}; the corpus has {n}, so give 1 to {n - 1}")
    group = _copies(everything)
    sizes = np.bincount(group)
    if len(sizes) == 1:
        raise ValueError(f"held out: all {n} documents have the same text, so none can be held out")
    drawn = group[np.random.default_rng([seed, 0x5E1D]).permutation(n)]
    order = drawn[np.sort(np.unique(drawn, return_index=True)[1])]  # each group where the first of its documents is
    if documents is not None:
        before = np.cumsum(sizes[order]) - sizes[order]
        held = order[:-1][before[:-1] < documents]
    else:
        lengths = np.bincount(group, weights=everything.lengths)
        held = _draw_tokens(lengths, order, (fraction or DEFAULT_FRACTION) * everything.num_tokens)
    mask = np.isin(group, held)
    return tuple(DocumentSet.of(corpus, everything.indices[part]) for part in (~mask, mask))  # type: ignore[return-value]


def _copies(documents: DocumentSet) -> np.ndarray:
    """For each document [n] a number from 0 on, the same for those of the same text, in order of the first of them."""
    apart = np.zeros(len(documents), dtype=np.uint64)
    empty = np.flatnonzero(documents.lengths <= (documents.corpus.eos_token_id is not None))
    apart[empty] = np.arange(1, len(empty) + 1)  # documents without text have nothing in common
    keys = np.stack([documents.corpus.document_hashes[documents.indices], apart])
    _, first, group = np.unique(keys, axis=1, return_index=True, return_inverse=True)
    numbers: np.ndarray = np.argsort(np.argsort(first))[group.ravel()]
    return numbers


def _draw_tokens(lengths: np.ndarray, order: np.ndarray, target: float) -> np.ndarray:
    """Groups of documents, in this order, each of which brings the sum of lengths nearer to the target; never all."""
    taken: list[int] = []
    missing = target
    for i in order.tolist():
        if missing <= 0 or len(taken) == len(order) - 1:
            break
        if lengths[i] < 2 * missing:
            taken.append(i)
            missing -= float(lengths[i])
    return np.array(taken or [int(np.argmin(lengths))], dtype=np.int64)


def _cut_tail(whole: DocumentSet, fraction: float) -> tuple[DocumentSet, DocumentSet]:
    border = whole.ends - max(1, round(fraction * whole.num_tokens))
    head = DocumentSet(whole.corpus, whole.indices, whole.starts, border).without_empty()
    return head, DocumentSet(whole.corpus, whole.indices, border, whole.ends)


def check_sizes(training: DocumentSet, held_out: DocumentSet, sequence_length: int) -> None:
    """Raise ValueError unless both sets hold one document and one sequence with its targets."""
    for documents, which, remedy in (
        (training, "training set", "a larger corpus, or hold out less"),
        (held_out, "held-out set", "more held-out documents, a larger fraction, or a larger corpus"),
    ):
        if documents.num_tokens < sequence_length + 1:
            raise ValueError(
                f"the {which} is too small: {documents.num_tokens} tokens in {len(documents)} documents, but "
                f"sequence_length {sequence_length} needs at least {sequence_length + 1}; give {remedy}, or a shorter "
                "sequence_length"
            )


def prepare_documents(
    corpus: CorpusConfig,
    held_out: HeldOutConfig,
    tokenizer: Tokenizer,
    sequence_length: int,
    seed: int = 0,
    cache_folder: Path | str | None = None,
    progress: Callable[[TokenizeProgress], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[DocumentSet, DocumentSet]:
    """(training, held-out) documents of a corpus: found, tokenised or opened from the cache, split and checked.

    Args:
        say: is told what was left out on the way and what a reader might not expect.

    Raises:
        ValueError: as `tokenize` and `check_sizes`, and for a held-out corpus with texts of the training corpus.
    """
    found = Corpus(corpus)
    if held_out.corpus is None:
        tokens = tokenize_and_tell(found, tokenizer, cache_folder, progress, say)
        training, kept = split_documents(tokens, held_out.fraction, held_out.documents, seed)
    else:
        apart = Corpus(held_out.corpus)
        if held_out.shared == "refuse":
            refuse_shared_files(found, apart)
        tokens = tokenize_and_tell(found, tokenizer, cache_folder, progress, say)
        kept = DocumentSet.of(tokenize_and_tell(apart, tokenizer, cache_folder, progress, say))
        memory = cache_root(cache_folder) / "shared"
        training = without_shared(DocumentSet.of(tokens), kept, tokenizer, held_out.shared, memory, say)
    check_sizes(training, kept, sequence_length)
    return training, kept


def tokenize_and_tell(
    corpus: Corpus,
    tokenizer: Tokenizer,
    cache_folder: Path | str | None,
    progress: Callable[[TokenizeProgress], None] | None,
    say: Callable[[str], None],
) -> TokenizedCorpus:
    """`tokenize`, and whatever there is to tell of the corpus."""
    tokens = tokenize(corpus, tokenizer, cache_folder, progress)
    for told in (corpus.found.told(), tokens.bad_rows, separators_told(dict(tokens.separators))):
        if told is not None:
            say(f"{corpus.config.source}: {told}")
    return tokens


def refuse_shared_files(training: Corpus, held_out: Corpus) -> None:
    """Raise ValueError, before anything is read, for a file of both corpora, whatever its names.

    Parts of one file may well be apart: where less than all of it is asked for, its content has to tell.
    """
    one, other = training.config, held_out.config
    if one.field != other.field or one.max_documents or other.max_documents or one.separator != other.separator:
        return
    own = {(stamp[1:3], file.rows): file.name for file, stamp in zip(training.files, training.stamps(), strict=False)}
    for file, stamp in zip(held_out.files, held_out.stamps(), strict=False):
        if (name := own.get((stamp[1:3], file.rows))) is not None:
            raise ValueError(
                f"held_out.corpus: {file.name} is part of the training corpus too ({name}), and a loss on text that "
                "was trained on means nothing: take it out of one of them, or set held_out.shared to remove, which "
                "leaves it out of training"
            )


def without_shared(
    training: DocumentSet,
    held_out: DocumentSet,
    tokenizer: Tokenizer,
    rule: Literal["refuse", "remove"],
    memory: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    what: str = "held_out.corpus",
) -> DocumentSet:
    """The training documents, where none has a text of the held-out ones; with `remove`, those that do not.

    Line ends, other white space, byte order marks, formats and the order of documents make no other text. `tokenizer`
    is that of both; `what` names the held-out ones in an error.

    Raises ValueError, with `refuse`, naming the first such document.
    """
    shared = find_shared(training, held_out, tokenizer, memory, every=rule == "remove")
    if not shared:
        return training
    if rule == "remove":
        left = training.chosen(~np.isin(np.arange(len(training)), shared.training))
        dropped = training.num_tokens - left.num_tokens
        say(
            f"{len(training) - len(left):,} documents with {dropped:,} tokens are not trained on, because the held-out "
            "corpus has their text"
        )
        return left
    tokens = int(held_out.lengths[shared.held_out].sum())
    one, other = held_out.name(shared.held_out[0]), training.name(shared.training[0])
    raise ValueError(
        f"{what}: {len(shared.held_out):,} of its {len(held_out):,} documents ({tokens:,} of "
        f"{held_out.num_tokens:,} tokens) are part of the training corpus by content, such as {one}, which is in "
        f"{other}; a loss on text that was trained on means nothing: take them out of one of the two, or set "
        "held_out.shared to remove, which leaves them out of training"
    )
