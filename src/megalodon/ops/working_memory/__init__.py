"""The memory of what has left the window: one matrix a head, updated chunk by chunk (GECKO: Adaptive working memory;
arXiv 2601.06463).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megalodon.ops.backend import Implementations, check_devices, choose, full_precision
from megalodon.ops.compiling import one_break_at_most
from megalodon.ops.layout import Layout, layout_of
from megalodon.ops.prefix import checked_prefix
from megalodon.ops.segments import Segments
from megalodon.ops.working_memory import blocked, reference
from megalodon.ops.working_memory.maps import MemoryMap, memory_maps, span_log_mass
from megalodon.ops.working_memory.scan import absorb, read

__all__ = ["IMPLEMENTATIONS", "MemoryMap", "absorb", "memory_maps", "read", "span_log_mass", "working_memory"]

IMPLEMENTATIONS: Implementations = {"reference": reference.working_memory, "blocked": blocked.working_memory}


@one_break_at_most
def working_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    *,
    memory: Tensor | None = None,
    log_mass: Tensor | None = None,
    before_k: Tensor | None = None,
    before_v: Tensor | None = None,
    open_k: Tensor | None = None,
    open_v: Tensor | None = None,
    positions: Sequence[int] | Tensor | None = None,
    segment_ids: Tensor | None = None,
    bos_mask: Tensor | None = None,
    bos_places: tuple[Tensor, Tensor] | None = None,
    use_cache: bool = True,
    backend: str | None = None,
    layout: Layout | None = None,
    segments: Segments | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Read, for each token, what the chunks up to two before its own have left in a matrix for each head.

    Each head holds M [d, e] and log masses u [d]. A chunk with keys k [C, d] and values v [C, e] is absorbed when it is
    the one before the last complete one: with A the softmax of k over its features, W that over the tokens and
    c = logsumexp of k over the tokens, `u' = logaddexp(u, c)`, `rho = exp(c - u')` and
    `M' = M + rho (W^T (v - A M) - M)`. A token of chunk j reads `softmax(q) M`, M being of the chunks up to j - 2: what
    `sliding_chunk_attention` no longer sees. Computed in float32 (float64 for float64 input).

    Args:
        q, k: [B, L, H, d]; queries and keys of the memory, not rotated.
        v: [B, L, H, e]; the values of attention.
        chunk_size: C.
        memory, log_mass: [B, H, d, e] and [B, H, d]; M and u of the chunks up to the second before the open one. None:
            a fresh sequence. Rows that have seen less than 2C tokens have absorbed nothing: theirs are not read.
        before_k, before_v: [B, C, H, d] and [B, C, H, e]; keys and values of the chunk before the open one.
        open_k, open_v: [B, n, H, d] and [B, n, H, e], n < C; those of the open chunk, row b's at the start.
        positions: how many tokens of its document each row has seen. None: as many as `before_k` and `open_k` hold, and
            C more where they come with a memory.
        segment_ids: int [B, L]; a change along L starts a document, a chunk and an empty memory.
        bos_mask: bool [B, L]; True where a token starts a segment. Chunks go on; a memory that ends in another segment
            than the token's reads as zero, and is forgotten by the first chunk in which a segment begins, of which the
            tokens of the last segment are absorbed.
        bos_places: what the rows carry of segments, see `megalodon.ops.Segments`.
        use_cache: False: M and u after the last token are not wanted. What only they need may be left out, and what
            stands in their place means nothing.
        backend: "reference" or "blocked"; None chooses (see `megalodon.ops.backend`).
        layout: the batch's layout, in place of `segment_ids` and `positions`, where it is already known. Tokens beyond
            its `lengths` give zero.
        segments: the batch's segments, in place of `bos_mask` and `bos_places`, where they are already known.

    Returns:
        (y [B, L, H, e] in the dtype of v, M and u after each row's last token, float32 or better): of the chunks up to
        the second before the one that is then open.

    Raises:
        ValueError: a shape or device does not fit; the message names the argument.
    """
    if q.ndim != 4 or k.shape != q.shape:
        raise ValueError(f"q and k have shapes {tuple(q.shape)} and {tuple(k.shape)}: both must be one [B, L, H, d]")
    if v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v has shape {tuple(v.shape)}: it must be [B, L, H, e] with B, L, H = {tuple(q.shape[:3])}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: it must be at least 1")
    check_devices(q.device, k=k, v=v, memory=memory, log_mass=log_mass, bos_mask=bos_mask)
    check_devices(q.device, before_k=before_k, before_v=before_v, open_k=open_k, open_v=open_v)
    prefix = checked_prefix(k, v, chunk_size, before_k, before_v, open_k, open_v)
    run = choose(IMPLEMENTATIONS, backend, q.device, q.dtype)
    if layout is None:
        if positions is None:
            earlier = chunk_size if memory is not None and before_k is not None else 0  # at least the chunk it absorbed
            positions = [earlier + position for position in prefix.positions(q.shape[0], chunk_size)]
        layout = layout_of(
            q.shape[0], q.shape[1], q.device, segment_ids=segment_ids, positions=positions, chunk_size=chunk_size
        )
    prefix.check(layout)
    if segments is None and (bos_mask is not None or bos_places is not None):
        flags = bos_mask if bos_mask is not None else q.new_zeros(q.shape[:2], dtype=torch.bool)
        segments = Segments(flags, layout, bos_places)
    memory, log_mass = _initial(k, v, memory, log_mass, layout)
    return run(q, k, v, memory, log_mass, prefix, layout, segments, use_cache)


def _initial(
    k: Tensor, v: Tensor, memory: Tensor | None, log_mass: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor]:
    if (memory is None) != (log_mass is None):
        raise ValueError("memory and log_mass are given together or not at all")
    batch, _, heads, dim = k.shape
    shape = (batch, heads, dim, v.shape[-1])
    real = full_precision(v.dtype)
    if memory is None or log_mass is None:
        return k.new_zeros(shape, dtype=real), k.new_full(shape[:3], -torch.inf, dtype=real)
    for name, value, expected in (("memory", memory, shape), ("log_mass", log_mass, shape[:3])):
        if value.shape != expected:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: it must be {expected}")
    real = torch.promote_types(memory.dtype, real)
    memory, log_mass = memory.to(real), log_mass.to(real)
    assert layout.chunk_size is not None
    fresh = layout.positions < 2 * layout.chunk_size
    if fresh.any():
        rows = torch.from_numpy(fresh).to(k.device)[:, None, None]
        memory, log_mass = memory.masked_fill(rows[..., None], 0), log_mass.masked_fill(rows, -torch.inf)
    return memory, log_mass
