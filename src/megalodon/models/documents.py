"""Which tokens of a batch are one document, by whatever names a library says it.

A document is isolated from what came before it in its row. Six names are in use, and all are brought into one thing,
`segment_ids`:

- `segment_ids` and `seq_idx` [B, L]: a change along L starts a document;
- `position_ids` [B, L] or [1, L]: going back, or not going on, starts a document; so does 0 after a carried state;
- `cu_seq_lens_q` and `cu_seq_lens_k` [documents + 1]: where each document of a flattened batch begins and ends;
- `max_length_q` and `max_length_k`: the longest document's length, which must agree.

Two that contradict each other are refused, because one of them would be ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

NAMES = (
    "segment_ids",
    "seq_idx",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "position_ids",
    "max_length_q",
    "max_length_k",
)
"""The arguments that tell documents, in the order in which they are believed and compared."""

ROWS = ("segment_ids", "seq_idx", "position_ids")
"""Those with a row for each row of the batch."""


class Documents(NamedTuple):
    """What a batch's documents are.

    Attributes:
        segment_ids: int [B, L]; a change along L starts a document. None: each row is one.
        fresh: bool [B], on the CPU; rows whose first token starts a document, although a state is carried into them.
            None: there are none.
    """

    segment_ids: Tensor | None
    fresh: Tensor | None


def documents_of(
    batch: int,
    length: int,
    device: torch.device,
    given: Mapping[str, Any],
    attention_mask: Tensor | None = None,
    seen: Tensor | None = None,
) -> Documents:
    """The documents of a batch of B rows of L tokens.

    Args:
        batch, length: B and L.
        device: where `segment_ids` should be.
        given: the arguments of `NAMES` that the caller has; those that are None do not count. Padding says nothing.
        attention_mask: [B, L] or [B, P + L], of which the last L columns count.
        seen: int64 [B]; tokens that each row's carried state has read of its document. None: there is no state.

    Raises:
        ValueError: a shape or value cannot be right, or two arguments contradict each other; the message names them.
    """
    given = {name: given[name] for name in NAMES if given.get(name) is not None}
    if not given:
        return Documents(None, None)
    if given.keys() == {"segment_ids"}:  # the caller checks its shape, and the layout reads it
        return Documents(given["segment_ids"], None)
    return _read(batch, length, device, given, attention_mask, seen)


def targets_of(
    labels: Tensor, given: Mapping[str, Any], attention_mask: Tensor | None = None, seen: Tensor | None = None
) -> Tensor:
    """What each token is to predict, int64 [B, L], from labels as they stand in the text: the next token's label.

    -100 where there is none: at the end of a row, and of a document, for nothing in it tells how another begins.

    Args:
        labels: int64 [B, L].
        given, attention_mask, seen: as those of `documents_of`.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    batch, length = labels.shape
    ids = documents_of(batch, length, labels.device, given, attention_mask, seen).segment_ids
    if ids is None:
        return targets
    ids = torch.as_tensor(ids, device=labels.device)
    return targets.masked_fill(F.pad(ids[:, 1:] != ids[:, :-1], (0, 1)), -100)


def as_positions(
    batch: int, length: int, device: torch.device, told: Documents, attention_mask: Tensor | None, seen: Tensor | None
) -> Tensor:
    """The same documents as `position_ids`, int64 [B, L], which may be cut anywhere without losing a start.

    Args: as those of `documents_of`.
    """
    before = _previous(batch, length, attention_mask)
    real = _real(batch, length, attention_mask)
    ids = np.zeros((batch, length), dtype=np.int64) if told.segment_ids is None else told.segment_ids.cpu().numpy()
    starts = (before < 0) | (ids != np.take_along_axis(ids, before.clip(0), 1))
    count = np.cumsum(real, axis=1) - 1
    first = np.maximum.accumulate(np.where(real & starts, count, 0), axis=1)
    positions = np.where(real, count - first, 0)
    if seen is not None:
        going_on = np.ones(batch, dtype=bool) if told.fresh is None else ~told.fresh.numpy()
        positions += np.where(real & (first == 0) & going_on[:, None], seen.numpy()[:, None], 0)
    return torch.from_numpy(positions).to(device)


@torch.compiler.disable  # depends on values: one break in a compiled model, where tracing would make many
def _read(
    batch: int,
    length: int,
    device: torch.device,
    given: Mapping[str, Any],
    attention_mask: Tensor | None,
    seen: Tensor | None,
) -> Documents:
    before = _previous(batch, length, attention_mask)
    first_token = (before < 0) & _real(batch, length, attention_mask)
    starts: np.ndarray | None = None
    name = ""
    fresh = np.zeros(batch, dtype=bool)
    for other, found in _starts(batch, length, given, before, seen):
        sure: np.ndarray = np.ones((batch, 1), dtype=bool)
        if other == "position_ids":
            sure = np.asarray(found.any(1, keepdims=True))  # a row that merely counts on says nothing about documents
        if starts is None:
            starts, name = found, other
            continue
        differs = np.argwhere((found != starts) & sure)
        if len(differs):
            row, column = (int(at) for at in differs[0])
            says, denies = (other, name) if found[row, column] else (name, other)
            raise ValueError(
                f"{other} contradicts {name}: {says} starts a document at row {row}, column {column}, {denies} does not"
            )
    if "position_ids" in given and seen is not None:
        fresh = _begun(_rows("position_ids", given["position_ids"], batch, length), first_token, seen.numpy())
    ids = np.zeros((batch, length), dtype=np.int64) if starts is None else np.cumsum(starts, axis=1)
    _check_longest(given, ids, first_token | (before >= 0))
    return Documents(
        torch.from_numpy(ids).to(device) if starts is not None and starts.any() else None,
        torch.from_numpy(fresh) if fresh.any() else None,
    )


def _starts(
    batch: int, length: int, given: Mapping[str, Any], before: np.ndarray, seen: Tensor | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Each argument that tells documents, and bool [B, L]: where it has one start after a token of the same row."""
    after = before >= 0
    for name in ("segment_ids", "seq_idx"):
        if name in given:
            values = _rows(name, given[name], batch, length)
            yield name, after & (values != np.take_along_axis(values, before.clip(0), 1))
    lengths = _cumulative(batch, length, given, seen)
    if lengths is not None:
        name, bounds = lengths
        values = np.searchsorted(bounds, np.arange(length), side="right")[None]
        yield name, after & (values != np.take_along_axis(values, before.clip(0), 1))
    if "position_ids" in given:
        yield "position_ids", _restarts(_rows("position_ids", given["position_ids"], batch, length), before)


def _restarts(positions: np.ndarray, before: np.ndarray) -> np.ndarray:
    """bool [B, L]: where positions do not go on. They may jump over padding, and over nothing else."""
    step = positions - np.take_along_axis(positions, before.clip(0), 1)
    after, columns = before >= 0, np.arange(positions.shape[1]) - before
    jumps = after & (step > 1) & (step != columns)
    if jumps.any():
        row, column = (int(at) for at in np.argwhere(jumps)[0])
        old = int(positions[row, before[row, column]])
        raise ValueError(
            f"position_ids jumps from {old} to {int(positions[row, column])} at row {row}, column {column}: positions "
            "count on, or start over where a document begins (segment_ids says so too)"
        )
    return after & (step <= 0)


def _begun(positions: np.ndarray, first_token: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """bool [B]: rows with a state whose first position is 0, which begins a document."""
    rows, columns = np.nonzero(first_token)
    fresh = np.zeros(len(positions), dtype=bool)
    for row, first in zip(rows, positions[rows, columns], strict=True):
        if first == 0:
            fresh[row] = seen[row] > 0
        elif first < seen[row]:
            raise ValueError(
                f"position_ids starts at {int(first)} in row {row}, whose state has read {int(seen[row])} tokens of "
                "its document: count on from there, or start at 0, which begins a document"
            )
    return fresh


def _cumulative(
    batch: int, length: int, given: Mapping[str, Any], seen: Tensor | None
) -> tuple[str, np.ndarray] | None:
    """The argument and its bounds int64 [documents + 1], checked. None where there is none."""
    names = [name for name in ("cu_seq_lens_q", "cu_seq_lens_k") if name in given]
    if not names:
        return None
    bounds = {name: _numbers(name, given[name]) for name in names}
    name = names[0]
    found = bounds[name]
    if batch != 1:
        raise ValueError(f"{name} describes a flattened batch of one row: input_ids has {batch} rows")
    if found.ndim != 1 or len(found) < 2 or found[0] != 0 or found[-1] != length or (np.diff(found) < 0).any():
        raise ValueError(
            f"{name} is {_shown(found)}: it must be one list that ascends from 0 to the number of tokens, {length}"
        )
    keys = bounds.get("cu_seq_lens_k", found)
    cached = 0 if seen is None else int(seen[0])
    if keys.shape != found.shape or not (np.array_equal(keys, found) or np.array_equal(keys[1:], found[1:] + cached)):
        raise ValueError(f"cu_seq_lens_k is {_shown(keys)} and contradicts cu_seq_lens_q, which is {_shown(found)}")
    return name, found


def _check_longest(given: Mapping[str, Any], ids: np.ndarray, real: np.ndarray) -> None:
    """Refuse `max_length_q` and `max_length_k` that are less than the longest document (in this batch)."""
    names = [name for name in ("max_length_q", "max_length_k") if name in given]
    if not names:
        return
    rows = np.nonzero(real)[0]
    longest = int(np.unique(np.stack([rows, ids[real]]), axis=1, return_counts=True)[1].max(initial=0))
    for name in names:
        bound = int(given[name])
        if bound < longest:
            others = ", ".join(other for other in given if other not in names)
            told = f"by {others}, one has" if others else "no argument says where documents begin, so that one has"
            raise ValueError(f"{name}={bound} is less than the longest document: {told} {longest} tokens")


def _real(batch: int, length: int, attention_mask: Tensor | None) -> np.ndarray:
    """bool [B, L]: which tokens are not padding."""
    if attention_mask is None or not length:
        return np.ones((batch, length), dtype=bool)
    return attention_mask[:, -length:].detach().cpu().numpy().astype(bool)


def _previous(batch: int, length: int, attention_mask: Tensor | None) -> np.ndarray:
    """int64 [B, L]: the column of the real token before each real one; -1 where there is none, and for padding."""
    real = _real(batch, length, attention_mask)
    latest = np.maximum.accumulate(np.where(real, np.arange(length), -1), axis=1)
    before = np.concatenate([np.full((batch, 1), -1), latest[:, :-1]], axis=1) if length else latest
    return np.where(real, before, -1)


def _rows(name: str, value: Any, batch: int, length: int) -> np.ndarray:
    """int64 [B, L] of an argument that may be [1, L] for all rows."""
    found = _numbers(name, value)
    if found.shape not in ((batch, length), (1, length)):
        raise ValueError(f"{name} has shape {found.shape}: it must be {(batch, length)}, or {(1, length)} for all rows")
    return np.broadcast_to(found, (batch, length))


def _numbers(name: str, value: Any) -> np.ndarray:
    found = torch.as_tensor(value).detach().cpu()
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ValueError(f"{name} is {found.dtype}: it must be of integers")
    return found.to(torch.int64).numpy()


def _shown(bounds: np.ndarray) -> str:
    return f"{bounds.tolist()}" if bounds.size <= 8 else f"{bounds.shape} from {bounds.flat[0]} to {bounds.flat[-1]}"
