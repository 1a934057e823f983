"""Softmax attention inside fixed chunks of the sequence (SPEC: Chunk attention; arXiv 2404.08801, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from megalodon.ops.backend import Implementations, check_devices, choose
from megalodon.ops.chunk_attention import blocked, causal, reference
from megalodon.ops.compiling import one_break_at_most
from megalodon.ops.layout import Layout, layout_of

__all__ = ["IMPLEMENTATIONS", "causal_attention", "chunk_attention"]


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: tuple[Tensor, Tensor] | None,
    layout: Layout,
    dropout: float,
    dropkey: bool,
    form: str | None = None,
) -> Tensor:
    """The kernels, imported when they are first asked for: Triton need not be installed."""
    from megalodon.ops.chunk_attention import triton

    if v.numel() == 0 or not triton.fits(q, k, v):
        return blocked.chunk_attention(q, k, v, prefix, layout, dropout, dropkey)
    return triton.chunk_attention(q, k, v, prefix, layout, dropout, dropkey, form)


IMPLEMENTATIONS: Implementations = {
    "reference": reference.chunk_attention,
    "blocked": blocked.chunk_attention,
    "triton": _triton,
    "triton-fused": partial(_triton, form="fused"),
    "triton-strips": partial(_triton, form="strips"),
}


def _causal_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset: int | Tensor,
    first: Tensor | None,
    dropout: float,
    dropkey: bool,
) -> Tensor:
    from megalodon.ops.chunk_attention import triton

    out = None
    if first is None and v.numel() and q.numel() and triton.fits(q, k, v):
        out = triton.causal_attention(q, k, v, offset, dropout, dropkey)
    return causal.causal_attention(q, k, v, offset, first, dropout, dropkey) if out is None else out


_CAUSAL: Implementations = {
    "reference": causal.causal_attention,
    "blocked": causal.causal_attention,
    "triton": _causal_triton,
}


@one_break_at_most
def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offset: int | Tensor = 0,
    first: Tensor | None = None,
    dropout: float = 0.0,
    dropkey: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Attention of each query over the keys that precede it: one open chunk, as decoding needs it.

    Arguments and result are those of `megalodon.ops.chunk_attention.causal.causal_attention`; `backend` as in
    `chunk_attention` ("reference" and "blocked" are one here).
    """
    check_devices(q.device, k=k, v=v, offset=offset if isinstance(offset, Tensor) else None, first=first)
    run = choose(_CAUSAL, backend, q.device, q.dtype)
    return run(q, k, v, offset, first, dropout, dropkey)


@one_break_at_most
def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    *,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    prefix_lengths: Sequence[int] | Tensor | None = None,
    segment_ids: Tensor | None = None,
    dropout: float = 0.0,
    dropkey: bool = False,
    backend: str | None = None,
    layout: Layout | None = None,
    activates: bool = False,
) -> Tensor:
    """Causal attention inside chunks of C tokens, counted from the start of each document.

    Queries and keys come rotated (`megalodon.ops.rotate`); scores are not scaled. The softmax runs in float32 or
    better.

    Args:
        q, k: [B, L, H, d].
        v: [B, L, H, e].
        chunk_size: C.
        prefix_k, prefix_v: [B, n, H, d] and [B, n, H, e], n < C; keys and values of the chunk that is open before the
            first token. Row b has `prefix_lengths[b]` of them (None: n), at the start.
        segment_ids: int [B, L]; a change along L starts a document and a chunk.
        dropout: probability of dropping a weight after the softmax, or a key before it with `dropkey`.
        dropkey: drop keys before the softmax (never a token's own).
        backend: "reference", "blocked" or "triton"; None chooses (see `megalodon.ops.backend`). "triton" chooses by
            shape between "triton-fused" and "triton-strips", which can be named too; cached keys take the fused one.
        layout: the batch's layout, in place of `segment_ids` and `prefix_lengths`, where it is already known. Tokens
            beyond its `lengths` give zero.
        activates: the values are silu(v), so that less need be kept for the backward pass; `prefix_v` holds values.

    Returns:
        [B, L, H, e] in the dtype of v.

    Raises:
        ValueError: a shape or device does not fit; the message names the argument.
    """
    if q.ndim != 4 or k.shape != q.shape:
        raise ValueError(f"q and k have shapes {tuple(q.shape)} and {tuple(k.shape)}: both must be one [B, L, H, d]")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v has shape {tuple(v.shape)}: it must be [B, L, H, e] with B, L, H = {tuple(q.shape[:3])}")
    check_devices(q.device, k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: it must be at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: it must be at least 0 and less than 1")
    if (prefix_k is None) != (prefix_v is None):
        raise ValueError("prefix_k and prefix_v are given together or not at all")
    prefix = None
    if prefix_k is not None and prefix_v is not None:
        for name, value, like in (("prefix_k", prefix_k, k), ("prefix_v", prefix_v, v)):
            if value.ndim != 4 or (value.shape[0], *value.shape[2:]) != (like.shape[0], *like.shape[2:]):
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}: it must be like {tuple(like.shape)} but for L"
                )
        prefix = (prefix_k, prefix_v)
    run = choose(IMPLEMENTATIONS, backend, q.device, q.dtype)
    if layout is None:
        positions = prefix_lengths
        if positions is None and prefix_k is not None:
            positions = [prefix_k.shape[1]] * q.shape[0]
        layout = layout_of(
            q.shape[0], q.shape[1], q.device, segment_ids=segment_ids, positions=positions, chunk_size=chunk_size
        )
    if layout.longest_offset > (0 if prefix_k is None else prefix_k.shape[1]):
        raise ValueError(f"the open chunk holds {layout.longest_offset} tokens: prefix_k and prefix_v must hold them")
    if not activates:
        return run(q, k, v, prefix, layout, dropout, dropkey)
    if run is not blocked.chunk_attention:
        return run(q, k, F.silu(v), prefix, layout, dropout, dropkey)
    return blocked.chunk_attention(q, k, v, prefix, layout, dropout, dropkey, True)
