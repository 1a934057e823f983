"""Induction of a trained model: random tokens are read twice, and what the second reading is better at is memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from megalodon.inference.generation import default_piece_length
from megalodon.models import CausalLM

LOGITS_AT_ONCE = 1 << 23


def evaluate_induction(
    model: CausalLM,
    vocab_size: int,
    lengths: Sequence[int],
    trials: int = 4,
    seed: int = 0,
    special: Sequence[int] = (),
    piece_length: int | None = None,
    on_result: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Read uniform random tokens and then the same again. Memory does not depend on the length.

    Args:
        model: in evaluation mode.
        vocab_size: ids are drawn below it. special: ids that are not drawn, such as the end of a document.
        lengths: tokens of both readings together; even.
        trials: rows of each length, read side by side.

    Returns:
        A dict ready for JSON: `results`, one entry a length: `loss_first` and `loss_again` (nats a token of the first
        and of the second reading), `gain` (their difference) and `accuracy` (the share of tokens of the second reading
        that were the likeliest). A reading's first token is not scored: nothing says that the text begins again.

    Raises:
        ValueError: a length is odd or less than 4, or no id may be drawn.
    """
    allowed = np.setdiff1d(np.arange(vocab_size), np.asarray(special, dtype=np.int64))
    if not len(allowed):
        raise ValueError("special: it leaves no id to draw")
    if trials < 1:
        raise ValueError(f"trials is {trials}; it must be 1 or more")
    for length in lengths:
        if length < 4 or length % 2:
            raise ValueError(f"lengths: {length} must be even and 4 or more: it is of two equal readings")
    piece = default_piece_length(model.model.dimensions.alignment) if piece_length is None else piece_length
    if piece < 1:
        raise ValueError(f"piece_length is {piece}; it must be 1 or more")
    results = []
    for length in lengths:
        first, again = _readings(model, allowed, length // 2, trials, seed, piece)
        entry = {
            "length": length,
            "loss_first": first[0],
            "loss_again": again[0],
            "gain": first[0] - again[0],
            "accuracy": again[1],
        }
        results.append(entry)
        if on_result is not None:
            on_result(entry)
    return {"trials": trials, "seed": seed, "drawn_from": len(allowed), "results": results}


def _reading(allowed: np.ndarray, length: int, trials: int, seed: int, piece: int) -> Iterator[np.ndarray]:
    """int64 [trials, n] pieces of the random tokens: the same in every reading."""
    generator = np.random.RandomState(seed)
    for start in range(0, length, piece):
        yield allowed[generator.randint(0, len(allowed), (trials, min(piece, length - start)))]


@torch.inference_mode()
def _readings(
    model: CausalLM, allowed: np.ndarray, length: int, trials: int, seed: int, piece: int
) -> list[tuple[float, float]]:
    """(loss, accuracy) of the tokens of each of the two readings but their first."""
    state, found = None, []
    rows = max(1, LOGITS_AT_ONCE // model.vocab_size)
    for _ in range(2):
        nats, right, last = 0.0, 0, None
        for ids in _reading(allowed, length, trials, seed, piece):
            tokens = torch.from_numpy(ids).to(model.device)
            output = model.model(tokens, past_key_values=state, use_cache=True)
            state = output.past_key_values
            hidden = output.last_hidden_state
            if last is not None:
                hidden = torch.cat([last, hidden], 1)
            last = hidden[:, -1:]
            asked, targets = hidden[:, :-1], tokens[:, tokens.shape[1] - hidden.shape[1] + 1 :]
            pairs = zip(asked.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
            for x, wanted in pairs:
                logits = model.lm_head(x).float()
                nats += float(F.cross_entropy(logits, wanted, reduction="none").double().sum())
                right += int((logits.argmax(-1) == wanted).sum())
        count = trials * (length - 1)
        found.append((nats / count, right / count))
    return found
