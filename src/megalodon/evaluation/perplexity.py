"""Perplexity over documents of any length, in constant memory: overall, by document, by position in the document, by
place in the chunk and by how long ago the state was cut.

Each document is read from its beginning with a fresh state, in pieces that carry the state, so every token is predicted
from all that precedes it. A document's first token has nothing to be predicted from and is not scored; neither is the
end of the document, which is not text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megalodon.data import Document, Tokenizer, check_vocabulary
from megalodon.evaluation.scores import Distances, Places, Positions, Score
from megalodon.inference.generation import default_piece_length
from megalodon.models import CausalLM, State

LOGITS_AT_ONCE = 1 << 23
TEXT_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Progress:
    """How far an evaluation is: documents begun, predictions scored, and the score so far."""

    documents: int
    name: str
    score: Score


def evaluate_perplexity(
    model: CausalLM,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    piece_length: int | None = None,
    max_tokens: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    reset_every: int | None = None,
    on_losses: Callable[[int, Losses], None] | None = None,
    forget: str | None = None,
) -> dict[str, Any]:
    """Score documents, each alone. Memory does not depend on their lengths.

    Args:
        model: in evaluation mode.
        documents: read once, in order. One of fewer than two tokens has nothing to score; it is listed without loss.
        piece_length: tokens per forward pass; None for the least multiple of the chunk size from 2048 up. It changes
            speed and memory, not results (beyond rounding).
        max_tokens: read only so many tokens of each document.
        on_progress: called after every piece.
        reset_every: forget everything after every so many tokens; None: never.
        on_losses: called with a document's number, from 0 on, and the losses of each piece of it.
        forget: the one of `State.parts` that is forgotten after every `reset_every` tokens, while the others go on;
            None: everything.

    Returns:
        A dict ready for JSON: `overall` (with `documents`), `by_position` over all documents, `by_chunk_place` (None
        for an architecture without chunks), `by_distance` since the state was cut (None without `reset_every`), and
        `documents`, each with `name`, its own scores and `by_position`. Losses are nats per token; sums are float64.

    Raises:
        ValueError: if the tokenizer has more ids than the model, no document has two tokens, a loss is not finite, or
            the state has no such part or cannot forget it there.
    """
    check_vocabulary(tokenizer, model.config.vocab_size)
    chunk_size: int | None = getattr(model.config, "chunk_size", None)
    piece_length = default_piece_length(model.model.dimensions.alignment) if piece_length is None else piece_length
    for name, value in (("piece_length", piece_length), ("max_tokens", max_tokens), ("reset_every", reset_every)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more")
    everything, reports = Positions(), []
    places = None if chunk_size is None else Places(chunk_size)
    distances = None if reset_every is None else Distances(reset_every)
    running = Score()
    for number, document in enumerate(documents):
        scores = Positions()
        for losses in document_losses(model, tokenizer, document, piece_length, max_tokens, reset_every, forget):
            piece = Positions()
            piece.add_losses(losses.first, losses.nats, losses.sizes)
            scores.add(piece)
            running.add(piece.total)
            for ranges in (places, distances):
                if ranges is not None:
                    ranges.add_losses(losses.first - 1, losses.nats, losses.sizes)
            if on_losses is not None:
                on_losses(number, losses)
            if on_progress is not None:
                on_progress(Progress(number + 1, document.name, running))
        everything.add(scores)
        reports.append({"name": document.name, **scores.total.report(), "by_position": scores.report()})
    overall = everything.total
    if overall.tokens == 0:
        raise ValueError(f"nothing to score: none of the {len(reports)} documents has two tokens")
    return {
        "overall": {"documents": len(reports), **overall.report()},
        "by_position": everything.report(),
        "by_chunk_place": None if places is None else places.report(),
        "by_distance": None if distances is None else distances.report(),
        "documents": reports,
    }


@dataclass(frozen=True)
class Losses:
    """Losses of the tokens at positions `first`, `first + 1`, ... of a document: `nats` float64 [n], their `ids` int64
    [n], and the bytes of text `sizes` int64 [n] that they stand for, or None where nobody can tell."""

    first: int
    nats: np.ndarray
    ids: np.ndarray
    sizes: np.ndarray | None


def document_losses(
    model: CausalLM,
    tokenizer: Tokenizer,
    document: Document,
    piece_length: int,
    max_tokens: int | None = None,
    reset_every: int | None = None,
    forget: str | None = None,
) -> Iterator[Losses]:
    """The losses of a document's tokens, piece by piece."""
    state: State | None = None
    position = 0
    for piece in overlapping_pieces(document_tokens(tokenizer, document, max_tokens), piece_length):
        for ids, sizes in _between_resets(piece, position, reset_every):
            if reset_every is not None and position % reset_every == 0:
                state = None if forget is None or state is None else state.forget(forget)
            nats, state = _piece_losses(model, ids, state)
            if not np.isfinite(nats).all():
                place = position + 1 + int(np.flatnonzero(~np.isfinite(nats))[0])
                raise ValueError(
                    f"the loss of token {place} of {document.name} is not finite: the model's weights are damaged"
                )
            yield Losses(position + 1, nats, ids[1:], None if (sizes < 0).any() else sizes[1:])
            position += len(nats)


def _between_resets(piece: np.ndarray, position: int, reset_every: int | None) -> Iterator[np.ndarray]:
    """A piece [2, n + 1] in parts that overlap by one and hold no cut of the state but at their beginning."""
    start, end = 0, piece.shape[1] - 1
    while start < end:
        left = end - start if reset_every is None else reset_every - (position + start) % reset_every
        yield piece[:, start : min(end, start + left) + 1]
        start += left


def document_tokens(tokenizer: Tokenizer, document: Document, max_tokens: int | None) -> Iterator[np.ndarray]:
    """The document's ids and the bytes of text that they stand for (-1 if unknown), int64 [2, n], in pieces of bounded
    size, ending after `max_tokens`."""
    left = max_tokens
    text = (
        part[start : start + TEXT_AT_ONCE] for part in document.pieces for start in range(0, len(part), TEXT_AT_ONCE)
    )
    for ids, sizes in tokenizer.encode_stream_sized(text):
        both = np.stack([ids, np.full_like(ids, -1) if sizes is None else sizes])
        yield both if left is None else both[:, :left]
        left = None if left is None else left - len(ids)
        if left is not None and left <= 0:
            return


def overlapping_pieces(arrays: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """The same [..., n] in pieces of `length + 1` along the last axis, each beginning with the last place of the one
    before; the last may be short.

    So a piece holds `length` ids to read and, one place on, as many to predict. Nothing comes of fewer than two ids.
    """
    held: np.ndarray | None = None
    for array in arrays:
        held = array if held is None else np.concatenate([held, array], axis=-1)
        while held.shape[-1] > length:
            yield held[..., : length + 1]
            held = held[..., length:]
    if held is not None and held.shape[-1] > 1:
        yield held


@torch.inference_mode()
def _piece_losses(model: CausalLM, ids: np.ndarray, state: State | None) -> tuple[np.ndarray, State]:
    """Loss of each of ids[1:], nats, float64 [n]; and the state after ids[:-1]. Logits exist for a few rows at once."""
    tokens = torch.from_numpy(ids).to(model.device)
    output = model.model(tokens[None, :-1], past_key_values=state, use_cache=True)
    hidden: Tensor = output.last_hidden_state[0]
    rows = max(1, LOGITS_AT_ONCE // model.vocab_size)
    losses = [
        F.cross_entropy(model.lm_head(x).float(), targets, reduction="none").double().cpu()
        for x, targets in zip(hidden.split(rows), tokens[1:].split(rows), strict=True)
    ]
    return torch.cat(losses).numpy(), output.past_key_values
