"""Softmax attention over a chunk and the one before it (GECKO: Sliding chunk attention; arXiv 2601.06463)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megalodon.ops.backend import Implementations, check_devices, choose
from megalodon.ops.compiling import one_break_at_most
from megalodon.ops.layout import Layout, layout_of
from megalodon.ops.prefix import checked_prefix
from megalodon.ops.segments import Segments
from megalodon.ops.sliding_chunk_attention import blocked, reference
from megalodon.ops.sliding_chunk_attention.window import Visible, two_chunk_attention

__all__ = ["IMPLEMENTATIONS", "Visible", "sliding_chunk_attention", "two_chunk_attention"]


def _triton(q: Tensor, q_before: Tensor | None, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """The kernels, imported when they are first asked for: Triton need not be installed."""
    from megalodon.ops.sliding_chunk_attention import triton

    fits = v.numel() > 0 and triton.fits(q, k, v)
    return (triton if fits else blocked).sliding_chunk_attention(q, q_before, k, v, *arguments)


IMPLEMENTATIONS: Implementations = {
    "reference": reference.sliding_chunk_attention,
    "blocked": blocked.sliding_chunk_attention,
    "triton": _triton,
}


@one_break_at_most
def sliding_chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    *,
    q_before: Tensor | None = None,
    before_k: Tensor | None = None,
    before_v: Tensor | None = None,
    open_k: Tensor | None = None,
    open_v: Tensor | None = None,
    positions: Sequence[int] | Tensor | None = None,
    segment_ids: Tensor | None = None,
    bos_mask: Tensor | None = None,
    bos_places: tuple[Tensor, Tensor] | None = None,
    dropout: float = 0.0,
    dropkey: bool = False,
    backend: str | None = None,
    layout: Layout | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """Causal attention over the token's own chunk and the chunk before it, counted from the start of each document.

    Queries and keys come rotated by their place in the chunk (`megalodon.ops.rotate`), so that no angle grows with the
    stream: q and k by place, `q_before` by place + C. Scores are not scaled. The softmax runs in float32 or better.

    Args:
        q, k: [B, L, H, d].
        v: [B, L, H, e].
        chunk_size: C.
        q_before: [B, L, H, d]; the queries as the keys of the chunk before need them. None: q, without positions.
        before_k, before_v: [B, C, H, d] and [B, C, H, e]; keys and values of the chunk before the one that is open
            before the first token.
        open_k, open_v: [B, n, H, d] and [B, n, H, e], n < C; those of the open chunk, row b's at the start.
        positions: how many tokens of its document each row has seen: its open chunk holds the rest of a division by C,
            and it has a chunk before from C on. None: as many as `before_k` and `open_k` hold.
        segment_ids: int [B, L]; a change along L starts a document and a chunk.
        bos_mask: bool [B, L]; True where a token starts a segment: it hides all that was before it, and chunks go on.
        bos_places: what the rows carry of segments, see `megalodon.ops.Segments`.
        dropout: probability of dropping a weight after the softmax, or a key before it with `dropkey`.
        dropkey: drop keys before the softmax (never a token's own).
        backend: "reference", "blocked" or "triton"; None chooses (see `megalodon.ops.backend`).
        layout: the batch's layout, in place of `segment_ids` and `positions`, where it is already known. Tokens beyond
            its `lengths` give zero.
        segments: the batch's segments, in place of `bos_mask` and `bos_places`, where they are already known.

    Returns:
        [B, L, H, e] in the dtype of v.

    Raises:
        ValueError: a shape or device does not fit; the message names the argument.
    """
    if q.ndim != 4 or k.shape != q.shape:
        raise ValueError(f"q and k have shapes {tuple(q.shape)} and {tuple(k.shape)}: both must be one [B, L, H, d]")
    if q_before is not None and q_before.shape != q.shape:
        raise ValueError(f"q_before has shape {tuple(q_before.shape)}: it must be that of q, {tuple(q.shape)}")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v has shape {tuple(v.shape)}: it must be [B, L, H, e] with B, L, H = {tuple(q.shape[:3])}")
    check_devices(q.device, k=k, v=v, q_before=q_before, bos_mask=bos_mask)
    check_devices(q.device, before_k=before_k, before_v=before_v, open_k=open_k, open_v=open_v)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: it must be at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: it must be at least 0 and less than 1")
    prefix = checked_prefix(k, v, chunk_size, before_k, before_v, open_k, open_v)
    run = choose(IMPLEMENTATIONS, backend, q.device, q.dtype)
    if layout is None:
        layout = layout_of(
            q.shape[0],
            q.shape[1],
            q.device,
            segment_ids=segment_ids,
            positions=prefix.positions(q.shape[0], chunk_size) if positions is None else positions,
            chunk_size=chunk_size,
        )
    prefix.check(layout)
    if segments is None and (bos_mask is not None or bos_places is not None):
        flags = bos_mask if bos_mask is not None else q.new_zeros(q.shape[:2], dtype=torch.bool)
        segments = Segments(flags, layout, bos_places)
    return run(q, q_before, k, v, prefix, layout, segments, dropout, dropkey)
