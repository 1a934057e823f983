"""Perplexity over documents of any length, in constant memory: overall, by document and by position in the document.

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
from megalodon.evaluation.scores import Positions, Score
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
) -> dict[str, Any]:
    """Score documents, each alone. Memory does not depend on their lengths.

    Args:
        model: in evaluation mode.
        documents: read once, in order. One of fewer than two tokens has nothing to score; it is listed without loss.
        piece_length: tokens per forward pass; None for the least multiple of the chunk size from 2048 up. It changes
            speed and memory, not results (beyond rounding).
        max_tokens: read only so many tokens of each document.
        on_progress: called after every piece.

    Returns:
        A dict ready for JSON: `overall` (with `documents`), `by_position` over all documents, and `documents`, each
        with `name`, its own scores and `by_position`. Losses are nats per token; sums are float64.

    Raises:
        ValueError: if the tokenizer has more ids than the model, no document has two tokens, or a loss is not finite.
    """
    check_vocabulary(tokenizer, model.config.vocab_size)
    piece_length = default_piece_length(model.model.dimensions.alignment) if piece_length is None else piece_length
    for name, value in (("piece_length", piece_length), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be 1 or more")
    everything, reports = Positions(), []
    running = Score()
    for number, document in enumerate(documents, 1):
        scores = Positions()
        for first, losses, sizes in document_losses(model, tokenizer, document, piece_length, max_tokens):
            piece = Positions()
            piece.add_losses(first, losses, sizes)
            scores.add(piece)
            running.add(piece.total)
            if on_progress is not None:
                on_progress(Progress(number, document.name, running))
        everything.add(scores)
        reports.append({"name": document.name, **scores.total.report(), "by_position": scores.report()})
    overall = everything.total
    if overall.tokens == 0:
        raise ValueError(f"nothing to score: none of the {len(reports)} documents has two tokens")
    return {
        "overall": {"documents": len(reports), **overall.report()},
        "by_position": everything.report(),
        "documents": reports,
    }


def document_losses(
    model: CausalLM,
    tokenizer: Tokenizer,
    document: Document,
    piece_length: int,
    max_tokens: int | None = None,
) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
    """The losses of a document's tokens, piece by piece.

    Yields:
        (position of the first token predicted, losses in nats float64 [n], bytes of those tokens int64 [n] or None).
    """
    state: State | None = None
    position = 0
    for ids in overlapping_pieces(document_ids(tokenizer, document, max_tokens), piece_length):
        losses, state = _piece_losses(model, ids, state)
        if not np.isfinite(losses).all():
            place = position + 1 + int(np.flatnonzero(~np.isfinite(losses))[0])
            raise ValueError(
                f"the loss of token {place} of {document.name} is not finite: the model's weights are damaged"
            )
        sizes = None if tokenizer.token_lengths is None else tokenizer.token_lengths[ids[1:]]
        yield position + 1, losses, sizes
        position += len(losses)


def document_ids(tokenizer: Tokenizer, document: Document, max_tokens: int | None) -> Iterator[np.ndarray]:
    """The document's ids in pieces of bounded size, ending after `max_tokens`."""
    left = max_tokens
    text = (
        part[start : start + TEXT_AT_ONCE] for part in document.pieces for start in range(0, len(part), TEXT_AT_ONCE)
    )
    for ids in tokenizer.encode_stream(text):
        yield ids if left is None else ids[:left]
        left = None if left is None else left - len(ids)
        if left is not None and left <= 0:
            return


def overlapping_pieces(arrays: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """The same ids in pieces of `length + 1`, each beginning with the last id of the one before; the last may be short.

    So a piece holds `length` ids to read and, one place on, as many to predict. Nothing comes of fewer than two ids.
    """
    held = np.empty(0, dtype=np.int64)
    for array in arrays:
        held = np.concatenate([held, array])
        while len(held) > length:
            yield held[: length + 1]
            held = held[length:]
    if len(held) > 1:
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
