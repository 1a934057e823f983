"""The device code of chunk attention in strips; docs/kernels.md derives it. `strips.py` beside this launches it.

The wide products belong to cuBLAS. What is left are the narrow ones, of queries and keys, with the softmax around them:
one kernel gives the log of each softmax's sum, the other the weights of a strip, and in the backward pass the gradients
of its scores as well. Scores are made anew each time; nothing wider than a strip reaches memory.

The spans of a group have one shape; `query_step` rows of q and `key_step` rows of k are between them. A strip is taken
in several of its spans, or heads, at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megalodon.ops.chunk_attention.triton_kernels import uniform
from megalodon.ops.triton_dot import dot

PLACES = [
    "first_query", "query_step", "first_key", "key_step", "head", "head_step", "queries", "keys", "count",
    "begin_query", "end_query", "begin_key", "end_key",
]  # fmt: skip
"""Numbers that differ from span to span. Triton would compile a kernel anew for those that are 1 or multiples of 16."""


@triton.jit
def masked_scores(q, k, first_query, first_key, i, j, queries, keys, head, H, D, seed, dropout, DROPKEY: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, DK: tl.constexpr, DS: tl.constexpr,
                  FULL: tl.constexpr):  # fmt: skip
    """Scores float32 [BM, BN] of queries i and keys j of a span, -inf where hidden; the channels come DS at a time."""
    at_query = ((first_query + i) * H + head)[:, None] * D
    at_key = ((first_key + j) * H + head)[:, None] * D
    scores = tl.zeros([BM, BN], tl.float32)
    for start in range(0, DK, DS):
        channel = start + tl.arange(0, DS)[None, :]
        q_mask, k_mask = (i < queries)[:, None], (j < keys)[:, None]
        if not FULL:
            q_mask, k_mask = q_mask & (channel < D), k_mask & (channel < D)
        q_block = tl.load(q + at_query + channel, mask=q_mask, other=0.0)
        k_block = tl.load(k + at_key + channel, mask=k_mask, other=0.0)
        scores = dot(q_block, tl.trans(k_block), scores)
    place = (i + keys - queries)[:, None]
    visible = j[None, :] <= place
    if DROPKEY:
        visible = visible & ((uniform(seed, first_query + i, j, head) >= dropout) | (j[None, :] == place))
    return tl.where(visible, scores, float("-inf"))


@triton.jit(do_not_specialize=PLACES)
def normaliser_kernel(q, k, seed, lse, H, D, first_query, query_step, first_key, key_step, queries, keys, count,
                      dropout, DROPKEY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DK: tl.constexpr,
                      DS: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """lse = log(sum(exp(scores))) of each query and head of a group; programs with the most keys come first."""
    span, head = tl.program_id(0) // H % count, tl.program_id(0) % H
    block = tl.cdiv(queries, BM) - 1 - tl.program_id(0) // (H * count)
    query, key = tl.cast(first_query, tl.int64) + span * query_step, tl.cast(first_key, tl.int64) + span * key_step
    i = block * BM + tl.arange(0, BM)
    chance = 0
    if DROPKEY:
        chance = tl.load(seed)
    highest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    for start in range(0, tl.minimum(keys, (block + 1) * BM + keys - queries), BN):
        j = start + tl.arange(0, BN)
        scores = masked_scores(
            q, k, query, key, i, j, queries, keys, head, H, D, chance, dropout, DROPKEY, BM, BN, DK, DS, FULL
        )
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # all keys of the first blocks may have been dropped
        total = total * tl.exp(highest - base) + tl.sum(tl.exp(scores - base[:, None]), axis=1)
        highest = higher
    tl.store(lse + (query + i) * H + head, highest + tl.log(total), mask=i < queries)


@triton.jit(do_not_specialize=PLACES)
def weights_kernel(q, k, seed, lse, delta, d_weights, weights, d_scores, H, D, first_query, query_step, first_key,
                   key_step, head, head_step, queries, keys, begin_query, end_query, begin_key, end_key, width,
                   dropout, GRADIENT: tl.constexpr, DROPOUT: tl.constexpr, DROPKEY: tl.constexpr, BM: tl.constexpr,
                   BN: tl.constexpr, DK: tl.constexpr, DS: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """The weights of one strip, queries begin_query .. end_query and keys begin_key .. end_key, of several spans (that
    `query_step` and `key_step` tell apart) or heads (`head_step`): [n, end_query - begin_query, width].

    With GRADIENT also d_scores, of that shape, from d_weights (float32), delta and what dropout kept.
    """
    rows, columns = end_query - begin_query, end_key - begin_key
    across, down = tl.cdiv(columns, BN), tl.cdiv(rows, BM)
    part = tl.program_id(0) // (across * down)
    down_here = tl.program_id(0) // across % down * BM + tl.arange(0, BM)
    across_here = tl.program_id(0) % across * BN + tl.arange(0, BN)
    i, j = begin_query + down_here, begin_key + across_here
    head += part * head_step
    query = tl.cast(first_query, tl.int64) + part * query_step
    key = tl.cast(first_key, tl.int64) + part * key_step
    at = down_here[:, None] * width + across_here[None, :]
    inside = (down_here < rows)[:, None] & (across_here < columns)[None, :]
    weights += tl.cast(part, tl.int64) * rows * width
    if GRADIENT:
        d_weights += tl.cast(part, tl.int64) * rows * width
        d_scores += tl.cast(part, tl.int64) * rows * width
    element = weights.dtype.element_ty
    if tl.min(j, axis=0) > tl.max(i, axis=0) + keys - queries:  # the tile is hidden; the products read it all the same
        zero = tl.zeros([BM, BN], element)
        tl.store(weights + at, zero, mask=inside)
        if GRADIENT:
            tl.store(d_scores + at, zero, mask=inside)
    else:
        chance = 0
        if DROPOUT or DROPKEY:
            chance = tl.load(seed)
        scores = masked_scores(
            q, k, query, key, i, j, queries, keys, head, H, D, chance, dropout, DROPKEY, BM, BN, DK, DS, FULL
        )
        row = (query + i) * H + head
        of_rows = tl.load(lse + row, mask=i < queries, other=float("inf"))
        share = tl.exp(scores - of_rows[:, None])
        if DROPOUT:
            kept = uniform(chance, query + i, j, head) >= dropout
            tl.store(weights + at, tl.where(kept, share / (1 - dropout), 0.0).to(element), mask=inside)
        else:
            tl.store(weights + at, share.to(element), mask=inside)
        if GRADIENT:
            to_share = tl.load(d_weights + at, mask=inside, other=0.0)
            if DROPOUT:
                to_share = tl.where(kept, to_share / (1 - dropout), 0.0)
            through_sum = tl.load(delta + row, mask=i < queries, other=0.0)
            tl.store(d_scores + at, (share * (to_share - through_sum[:, None])).to(element), mask=inside)
