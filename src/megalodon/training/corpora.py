"""The texts of a run: one corpus or a weighted mixture of several, what each keeps out of training, and how a process
reads its part of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from megalodon.data import (
    Batch,
    DocumentSet,
    Loader,
    Mixture,
    TokenizeProgress,
    Tokenizer,
    another_text,
    cache_root,
    held_out_batches,
    prepare_documents,
    without_shared,
)
from megalodon.training.config import TrainConfig
from megalodon.training.data_section import MixtureSource
from megalodon.training.progress import SECONDS_BETWEEN_LINES, Display


@dataclass(frozen=True)
class Texts:
    """Documents to train on, and those held out of each source, by its name (`""` where there is one only)."""

    training: Mixture
    held_out: dict[str, DocumentSet]

    def summary(self) -> dict[str, Any]:
        """What is the same on every process that has the same texts."""
        return {"training": self.training.identity(), "held-out": held_out_identities(self.held_out)}


@dataclass(frozen=True)
class HeldOut:
    """Held-out documents: `read` gives their batches anew at each call, `weight` is that of their source."""

    documents: DocumentSet
    read: Callable[[], Iterator[Batch]]
    weight: float = 1.0


def prepare(config: TrainConfig, tokenizer: Tokenizer, display: Display) -> Texts:
    """The texts of a run, found, tokenised or opened from the cache, and split.

    Raises:
        ValueError: naming the source, as `prepare_documents`; and if one source holds out what another trains on.
    """
    data = config.data
    alone = {"": MixtureSource(corpus=data.corpus, held_out=data.held_out)}
    sources: dict[str, MixtureSource] = data.mixture or alone
    training, held_out = {}, {}
    for name, source in sources.items():
        with _named(name):
            training[name], held_out[name] = prepare_documents(
                source.corpus,
                source.held_out,
                tokenizer,
                data.sequence_length,
                config.run.seed,
                data.cache_folder,
                progress=_tokenizing(display),
                say=display.say,
            )
    memory = cache_root(data.cache_folder) / "shared"
    for name, kept in held_out.items():
        for other in sources.keys() - {name}:
            what = f"data.mixture.{name}.held_out, beside data.mixture.{other}"
            rule = sources[name].held_out.shared
            training[other] = without_shared(training[other], kept, tokenizer, rule, memory, display.say, what)
    texts = Texts(Mixture.weighted(training, {name: source.weight for name, source in sources.items()}), held_out)
    for name, kept in held_out.items():
        own, label = training[name], f"text {name}:" if name else "text:"
        display.say(
            f"{label} {len(own):,} documents with {own.num_tokens:,} tokens to train on, "
            f"{len(kept):,} with {kept.num_tokens:,} held out"
        )
    return texts


class _named:
    """Puts a source's name in front of what is wrong with it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.name and type(error) in (ValueError, FileNotFoundError):
            raise type(error)(f"data.mixture.{self.name}: {error}") from error  # type: ignore[misc]


def _tokenizing(display: Display) -> Callable[[TokenizeProgress], None]:
    """Shows every few seconds how far the tokenizer has come, the first time that a corpus is read."""
    last = time.monotonic()

    def show(done: TokenizeProgress) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            of = "" if done.total_bytes is None else f" of {done.total_bytes / 1e6:,.0f}"
            display.say(f"tokenizing: {done.bytes / 1e6:,.0f}{of} MB, {done.documents:,} documents")

    return show


def build_loader(config: TrainConfig, training: Mixture, rank: int, world_size: int) -> Loader:
    """The loader of a data rank."""
    data = config.data
    return Loader(
        training,
        mode=data.mode,
        batch_size=data.batch_size,
        sequence_length=data.sequence_length,
        seed=config.run.seed,
        isolate=data.isolate,
        shuffle=data.shuffle,
        rank=rank,
        world_size=world_size,
    )


def held_out_sets(config: TrainConfig, texts: Texts, rank: int, world_size: int, rows: int) -> dict[str, HeldOut]:
    """What to measure on, by source; each the first `evaluation.max_tokens` of it.

    Args:
        rows: in a batch. It changes speed and memory, not losses.
    """
    weights = dict(zip(texts.training.names, texts.training.weights, strict=True))
    return {
        name: HeldOut(
            documents,
            partial(
                held_out_batches,
                documents,
                batch_size=rows,
                sequence_length=config.data.sequence_length,
                max_tokens=config.evaluation.max_tokens,
                rank=rank,
                world_size=world_size,
                carry=config.data.mode != "reset",
            ),
            weights[name],
        )
        for name, documents in texts.held_out.items()
    }


def held_out_rows(config: TrainConfig, texts: Texts) -> int:
    """Rows for one process to measure with: as many as a part of a step has, and no more than there are documents."""
    most = max(len(documents) for documents in texts.held_out.values())
    return max(1, min(config.data.batch_size // config.run.accumulation_steps, most))


def held_out_identities(held_out: dict[str, DocumentSet]) -> dict[str, Any]:
    """What a checkpoint keeps of the held-out documents, to know them again."""
    return {name: Mixture.of(documents).identity() for name, documents in held_out.items()}


def another_held_out(saved: dict[str, Any], now: dict[str, Any]) -> str | None:
    """One sentence on held-out documents that are others than those that were saved; None if all are the same."""
    for name, identity in now.items():
        what = f"the held-out text of {name}" if name else "the held-out text"
        if name in saved and (told := another_text(saved[name], identity, what)) is not None:
            return f"{told}, so that its losses could not be compared. Put the old one back, or start a new run"
    return None


def another_rank(first: dict[str, Any], own: dict[str, Any]) -> str | None:
    """One sentence on how the texts of a process differ from rank 0's, by their summaries; None if they are equal."""
    pairs = {"the training text": (first["training"], own["training"])}
    for name, identity in first["held-out"].items():
        pairs[f"the held-out text {name}".rstrip()] = (identity, own["held-out"][name])
    words = ("than rank 0's", "on rank 0", "here")
    told = (another_text(one, other, what, words) for what, (one, other) in pairs.items())
    return next((sentence for sentence in told if sentence is not None), None)
