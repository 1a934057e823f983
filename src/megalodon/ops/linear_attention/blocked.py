"""Linear attention in blocks of T tokens: matrix products inside a block, a short recurrence between blocks.

With c the running sum of the log decays inside a block and S the state that enters it:

    o_t   = sum_{j <= t} (phi_q(t) . exp(c_t - c_j) phi_k(j)) v_j + (exp(c_t) phi_q(t))^T S
    S_end = exp(c_end) S + sum_j exp(c_end - c_j) phi_k(j) v_j^T

Every exponent is a difference that is at most 0, never a quotient of products. The normaliser is one more column of
values, all ones. Under the delta rule the values written solve a triangular system inside the block (2406.06484,
2412.06464). Documents are told apart by masks: no token is moved.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megalodon.ops.backend import accumulator_dtype
from megalodon.ops.layout import Layout
from megalodon.ops.linear_attention.carry import carry, carry_by_matrices
from megalodon.ops.linear_attention.decays import decayed_products

BLOCK = 64
"""Tokens in a block: products inside grow with T, the recurrence between has L / T steps."""

BLOCK_OF_FEATURES = 32
"""Tokens in a block where each feature has a decay, so that products cost more."""

SPAN = 4096
"""Tokens whose blocks exist at a time: the states that enter all of them are held at once."""


class Documents(NamedTuple):
    """Where documents begin, for blocks of T tokens; all are bool.

    Attributes:
        pairs: [B or 1, 1, n, T, T]; token t may see token j of its block.
        past: [B, 1, n, T]; token t sees the state that enters its block. None: all do.
        last: [B, 1, n, T]; token j belongs to the document that the block ends with. None: all do.
        kept: [B, 1, n]; the state that enters the block belongs to that document. None: it does.
    """

    pairs: Tensor
    past: Tensor | None = None
    last: Tensor | None = None
    kept: Tensor | None = None


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    normalise: bool,
    start: tuple[Tensor, Tensor | None] | None,
    layout: Layout,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Arguments and result are those of the definition in `reference`."""
    with torch.autocast(q.device.type, enabled=False):
        if layout.padding is not None:
            hidden = layout.padding[..., None, None]
            k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
            if log_decay is not None and log_decay.ndim > 1:
                log_decay = log_decay.masked_fill(hidden if log_decay.ndim == 4 else hidden[..., 0], 0)
            elif log_decay is not None:
                log_decay = log_decay.expand(*k.shape[:2], -1).masked_fill(hidden[..., 0], 0)
        if normalise:
            v = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        state = q.new_zeros(len(q), *k.shape[2:], v.shape[3])
        if start is not None:
            state = start[0] if start[1] is None else torch.cat([start[0], start[1][..., None]], dim=-1)
        outs = [v.new_zeros(len(q), 0, q.shape[2], v.shape[3])] if q.shape[1] == 0 else []
        for first in range(0, q.shape[1], SPAN):
            here = slice(first, first + SPAN)
            decay = log_decay[:, here] if log_decay is not None and log_decay.ndim > 1 else log_decay
            strength = None if beta is None else beta[:, here]
            out, state = _span(q[:, here], k[:, here], v[:, here], decay, strength, state, layout, first)
            outs.append(out)
        out = torch.cat(outs, 1) if len(outs) != 1 else outs[0]
        if not normalise:
            return out, None, state, None
        return out[..., :-1], out[..., -1], state[..., :-1], state[..., -1]


def _span(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    layout: Layout,
    first: int,
) -> tuple[Tensor, Tensor]:
    """(out [B, L, H, e], the state after it) of tokens `first` on, of which documents may begin among them."""
    batch, length, heads = q.shape[:3]
    groups = k.shape[2]
    each = log_decay is not None and log_decay.ndim == 4
    size = min(BLOCK_OF_FEATURES if each else BLOCK, length)
    count = -(-length // size)
    documents = _documents(layout, first, length, size)

    def blocks(x: Tensor) -> Tensor:
        """[B, L, G, ...] -> [B, G, n, T, ...]"""
        x = F.pad(x, (*(0, 0) * (x.ndim - 2), 0, count * size - length))
        return x.unflatten(1, (count, size)).movedim(3, 1)

    queries = blocks(q.unflatten(2, (groups, -1))).movedim(-2, -3)  # [B, G, n, R, T, f]
    keys, values = blocks(k), blocks(v)
    decays = None
    if log_decay is not None:
        decays = blocks(log_decay) if log_decay.ndim > 1 else log_decay[:, None].expand(-1, size)[None, :, None]
        if log_decay.ndim == 1 and count * size > length:  # what fills the last block must not decay
            real = (torch.arange(count * size, device=q.device) < length).view(1, 1, count, size)
            decays = decays * real
    sums = None if decays is None else decays.to(accumulator_dtype(q.device)).cumsum(3)
    sums = sums[..., None] if sums is not None and sums.ndim == 4 else sums  # [B or 1, G, n or 1, T, f or 1]
    read, write, through = _factors(sums, documents, q.dtype)
    arriving = queries if read is None else queries * read[:, :, :, None]
    leaving = keys if write is None else keys * write
    scores = decayed_products(queries, keys, sums) * documents.pairs[:, :, :, None]
    if beta is None:
        added = leaving.transpose(-1, -2) @ values
        entering, state = carry(through, added, state)
        inner = scores.flatten(3, 4) @ values
    else:
        strength = blocks(beta)[..., None]
        known = decayed_products(keys[:, :, :, None], keys, sums)[:, :, :, 0] * documents.pairs
        system = (strength * known).tril(-1)
        from_past = keys if read is None else keys * read
        right = torch.cat([strength * values, strength * from_past], dim=-1)
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        written, taken = solved.split([v.shape[3], k.shape[3]], dim=-1)
        step = -(leaving.transpose(-1, -2) @ taken)
        kept = torch.ones_like(step[..., :1]) if through is None else through.expand(*step.shape[:-1], 1)
        step = step + torch.diag_embed(kept[..., 0])
        entering, state = carry_by_matrices(step, leaving.transpose(-1, -2) @ written, state)
        inner = scores.flatten(3, 4) @ (written - taken @ entering)
    out = inner + arriving.flatten(3, 4) @ entering  # [B, G, n, R T, e]
    out = out.unflatten(3, (-1, size)).permute(0, 2, 4, 1, 3, 5).reshape(batch, count * size, heads, -1)
    return out[:, :length], state


def _factors(
    sums: Tensor | None, documents: Documents, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What the past is read with [.., T, f or 1], what a key is written with, and what the state passes through."""
    read = write = through = None
    if sums is not None:
        read = sums.to(dtype).exp()
        write = (sums[..., -1:, :] - sums).to(dtype).exp()
        through = read[..., -1, :, None]
    if documents.past is not None:
        assert documents.last is not None and documents.kept is not None
        past, last, kept = (x.to(dtype) for x in (documents.past, documents.last, documents.kept))
        read = past[..., None] if read is None else read * past[..., None]
        write = last[..., None] if write is None else write * last[..., None]
        through = kept[..., None, None] if through is None else through * kept[..., None, None]
    return read, write, through


def _documents(layout: Layout, first: int, length: int, size: int) -> Documents:
    lower = torch.ones(size, size, dtype=torch.bool, device=layout.device).tril()[None, None, None]
    if layout.starts is None:
        return Documents(lower)
    count = -(-length // size)
    begins = layout.document_start[:, first : first + length]
    begins = np.pad(begins, ((0, 0), (0, count * size - length)), mode="edge").reshape(len(begins), 1, count, size)
    edges = first + np.arange(count)[:, None] * size
    places = edges + np.arange(size)
    past = (begins < edges) | (begins == 0)
    last = places >= begins[..., -1:]
    pairs = places[:, None, :] >= begins[..., None]
    tensors = [torch.from_numpy(x).to(layout.device) for x in (pairs, past, last, past[..., -1])]
    return Documents(tensors[0] & lower, *tensors[1:])
