"""The device code of chunk attention; docs/kernels.md derives it. `triton.py` beside this launches it.

A span is one chunk of one document: its queries are consecutive rows of q, its keys some rows of the cache and then
consecutive rows of k. Query i of a span sees its keys 0 .. shift + i. A program takes a block of queries (or of keys)
of one span and one head. Values are wider than keys, so programs divide them into slices and compute the narrow
scores anew for each slice; no score leaves the chip.

A window over two chunks takes these kernels twice: WHOLE for the chunk before, of which every query sees every key, and
once more for its own chunk, where CONTINUES goes on with the softmax that the first left. HAS_FIRST hides the keys
before `first[query] - frame`.

Dropout draws a number from (seed, key, query, head), so that every kernel drops the same weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megalodon.ops.triton_dot import dot


@triton.jit
def placed(slices, H):
    """(slice of the values, head, item of work): one axis of programs, since the others end at 65,535."""
    program = tl.program_id(0)
    return program % slices, program // slices % H, program // slices // H


@triton.jit
def span_of(spans, span):
    """(first query, queries, first key, keys, first cached key, cached keys); keys count the cached ones."""
    at = spans + span * 6
    return (
        tl.load(at).to(tl.int64),
        tl.load(at + 1),
        tl.load(at + 2).to(tl.int64),
        tl.load(at + 3),
        tl.load(at + 4).to(tl.int64),
        tl.load(at + 5),
    )


@triton.jit
def load_keys(k, cache, j, keys, first_key, first_cached, cached, head, H, column, width, HAS_CACHE: tl.constexpr,
              FULL: tl.constexpr):  # fmt: skip
    """Rows j of a span's keys (or values) at some columns of one head: [len(j), len(column)], zero outside."""
    mask = (j < keys)[:, None]
    if not FULL:
        mask = mask & (column < width)[None, :]
    row = first_key + (j - cached)
    if HAS_CACHE:
        old = j < cached
        place = tl.where(old, first_cached + j, row) * H + head
        from_cache = tl.load(cache + place[:, None] * width + column[None, :], mask=mask & old[:, None], other=0.0)
        fresh = tl.load(k + place[:, None] * width + column[None, :], mask=mask & (j >= cached)[:, None], other=0.0)
        return tl.where(old[:, None], from_cache, fresh)
    return tl.load(k + (row * H + head)[:, None] * width + column[None, :], mask=mask, other=0.0)


@triton.jit
def load_rows(x, i, count, first, head, H, column, width, FULL: tl.constexpr):
    """Rows i of a span's queries (or their outputs) at some columns of one head, zero outside."""
    mask = (i < count)[:, None]
    if not FULL:
        mask = mask & (column < width)[None, :]
    return tl.load(x + ((first + i) * H + head)[:, None] * width + column[None, :], mask=mask, other=0.0)


@triton.jit
def uniform(seed, query, key, head):
    """A number in [0, 1) for each (query, key) of a head; query an int64 row of q."""
    c = query.to(tl.int32)[:, None] + key[None, :] * 0
    zero = c * 0
    random, _, _, _ = tl.philox(seed, key[None, :] + zero, c, zero + head, zero)
    return tl.uint_to_uniform_float(random)


@triton.jit
def scores_of(q, k, i, j, shift, queries, keys, first_query, head, seed, dropout, first, frame, DROPKEY: tl.constexpr,
              WHOLE: tl.constexpr, HAS_FIRST: tl.constexpr):  # fmt: skip
    """Scores of a block of queries against a block of keys, -inf where hidden; both [rows, d]."""
    scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32))
    last = i * 0 + keys - 1 if WHOLE else i + shift
    visible = j[None, :] <= last[:, None]
    if HAS_FIRST:
        least = tl.load(first + first_query + i, mask=i < queries, other=0) - frame
        visible = visible & (j[None, :] >= least[:, None])
    if DROPKEY:
        kept = uniform(seed, first_query + i, j, head) >= dropout
        if not WHOLE:
            kept = kept | (j[None, :] == (i + shift)[:, None])
        visible = visible & kept
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def forward_kernel(q, k, v, cache_k, cache_v, seed, spans, work, out, lse, H, D, E, dropout, HAS_CACHE: tl.constexpr,
                   DROPOUT: tl.constexpr, DROPKEY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DK: tl.constexpr,
                   DV: tl.constexpr, FULL_K: tl.constexpr, FULL_V: tl.constexpr, first=None, frame=0, partial=None,
                   partial_lse=None, WHOLE: tl.constexpr = False, HAS_FIRST: tl.constexpr = False,
                   CONTINUES: tl.constexpr = False):  # fmt: skip
    """out = softmax(q k^T) v for one block of queries, one head and one slice of the values; lse by the first slice.

    With CONTINUES, the softmax goes on from `partial` and `partial_lse`, float32, where that is not -inf. A query that
    sees nothing, which happens with WHOLE, gives zero and an lse of -inf.
    """
    slices = tl.cdiv(E, DV)
    part, head, item = placed(slices, H)
    span, begin = tl.load(work + item * 2), tl.load(work + item * 2 + 1)
    first_query, queries, first_key, keys, first_cached, cached = span_of(spans, span)
    shift = keys - queries
    if WHOLE:
        shift = keys
    i = begin + tl.arange(0, BM)
    dk = tl.arange(0, DK)
    dv = part * DV + tl.arange(0, DV)
    chance = 0
    if DROPOUT or DROPKEY:
        chance = tl.load(seed)
    q_block = load_rows(q, i, queries, first_query, head, H, dk, D, FULL_K)
    highest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, DV], tl.float32)
    if CONTINUES:
        before = (first_query + i) * H + head
        highest = tl.load(partial_lse + before, mask=i < queries, other=float("-inf"))
        begun = highest > float("-inf")
        total = begun.to(tl.float32)
        there = begun[:, None] & (dv < E)[None, :]
        acc = tl.load(partial + before[:, None] * E + dv[None, :], mask=there, other=0.0)
    for start in range(0, tl.minimum(keys, begin + BM + shift), BN):
        j = start + tl.arange(0, BN)
        k_block = load_keys(k, cache_k, j, keys, first_key, first_cached, cached, head, H, dk, D, HAS_CACHE, FULL_K)
        scores = scores_of(
            q_block, k_block, i, j, shift, queries, keys, first_query, head, chance, dropout, first, frame, DROPKEY,
            WHOLE, HAS_FIRST
        )  # fmt: skip
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # all keys of the first blocks may have been dropped
        weights = tl.exp(scores - base[:, None])
        fade = tl.exp(highest - base)
        total = total * fade + tl.sum(weights, axis=1)
        if DROPOUT:
            kept = uniform(chance, first_query + i, j, head) >= dropout
            weights = tl.where(kept, weights / (1 - dropout), 0.0)
        v_block = load_keys(v, cache_v, j, keys, first_key, first_cached, cached, head, H, dv, E, HAS_CACHE, FULL_V)
        acc = dot(weights.to(v_block.dtype), v_block, acc * fade[:, None])
        highest = higher
    row = (first_query + i) * H + head  # not before the loop, which needs the registers
    mask = (i < queries)[:, None]
    if not FULL_V:
        mask = mask & (dv < E)[None, :]
    divisor = total
    if WHOLE:
        divisor = tl.where(total > 0, total, 1.0)
    tl.store(out + row[:, None] * E + dv[None, :], (acc / divisor[:, None]).to(out.dtype.element_ty), mask=mask)
    if part == 0:
        tl.store(lse + row, highest + tl.log(total), mask=i < queries)


@triton.jit
def delta_kernel(out, d_out, delta, E, ROWS, BM: tl.constexpr, DV: tl.constexpr):
    """delta = sum over the values of out * d_out, for each query and head; rows count both."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    total = tl.zeros([BM], tl.float32)
    for start in range(0, E, DV):
        e = start + tl.arange(0, DV)
        at = row[:, None] * E + e[None, :]
        mask = (row < ROWS)[:, None] & (e < E)[None, :]
        a = tl.load(out + at, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(a * tl.load(d_out + at, mask=mask, other=0.0).to(tl.float32), axis=1)
    tl.store(delta + row, total, mask=row < ROWS)


@triton.jit
def score_gradients(q_block, k_block, v, cache_v, d_out, lse_rows, delta_rows, i, j, shift, queries, keys, first_query,
                    first_key, first_cached, cached, head, H, E, seed, dropout, first, frame, HAS_CACHE: tl.constexpr,
                    DROPOUT: tl.constexpr, DROPKEY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DV: tl.constexpr,
                    FULL_V: tl.constexpr, WHOLE: tl.constexpr, HAS_FIRST: tl.constexpr):  # fmt: skip
    """Gradient of the loss with respect to a block of scores, [BM, BN] float32; the values are read slice by slice."""
    scores = scores_of(
        q_block, k_block, i, j, shift, queries, keys, first_query, head, seed, dropout, first, frame, DROPKEY, WHOLE,
        HAS_FIRST
    )  # fmt: skip
    d_weights = tl.zeros([BM, BN], tl.float32)
    for start in range(0, E, DV):
        e = start + tl.arange(0, DV)
        grad = load_rows(d_out, i, queries, first_query, head, H, e, E, FULL_V)
        value = load_keys(v, cache_v, j, keys, first_key, first_cached, cached, head, H, e, E, HAS_CACHE, FULL_V)
        d_weights = dot(grad, tl.trans(value), d_weights)
    if DROPOUT:
        kept = uniform(seed, first_query + i, j, head) >= dropout
        d_weights = tl.where(kept, d_weights / (1 - dropout), 0.0)
    inside = (i < queries)[:, None]
    weights = tl.where(inside, tl.exp(scores - lse_rows[:, None]), 0.0)
    return weights * (d_weights - delta_rows[:, None])


@triton.jit
def query_gradients_kernel(q, k, v, cache_k, cache_v, seed, spans, work, d_out, lse, delta, dq, H, D, E, dropout,
                           HAS_CACHE: tl.constexpr, DROPOUT: tl.constexpr, DROPKEY: tl.constexpr, BM: tl.constexpr,
                           BN: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, FULL_K: tl.constexpr,
                           FULL_V: tl.constexpr, first=None, frame=0, WHOLE: tl.constexpr = False,
                           HAS_FIRST: tl.constexpr = False):  # fmt: skip
    """dq of one block of queries and one head."""
    _, head, item = placed(1, H)
    span, begin = tl.load(work + item * 2), tl.load(work + item * 2 + 1)
    first_query, queries, first_key, keys, first_cached, cached = span_of(spans, span)
    shift = keys - queries
    if WHOLE:
        shift = keys
    i = begin + tl.arange(0, BM)
    dk = tl.arange(0, DK)
    chance = 0
    if DROPOUT or DROPKEY:
        chance = tl.load(seed)
    q_block = load_rows(q, i, queries, first_query, head, H, dk, D, FULL_K)
    row = (first_query + i) * H + head
    lse_rows = tl.load(lse + row, mask=i < queries, other=0.0)
    delta_rows = tl.load(delta + row, mask=i < queries, other=0.0)
    acc = tl.zeros([BM, DK], tl.float32)
    for start in range(0, tl.minimum(keys, begin + BM + shift), BN):
        j = start + tl.arange(0, BN)
        k_block = load_keys(k, cache_k, j, keys, first_key, first_cached, cached, head, H, dk, D, HAS_CACHE, FULL_K)
        d_scores = score_gradients(
            q_block, k_block, v, cache_v, d_out, lse_rows, delta_rows, i, j, shift, queries, keys, first_query,
            first_key, first_cached, cached, head, H, E, chance, dropout, first, frame, HAS_CACHE, DROPOUT, DROPKEY, BM,
            BN, DV, FULL_V, WHOLE, HAS_FIRST
        )  # fmt: skip
        acc = dot(d_scores.to(k_block.dtype), k_block, acc)
    mask = (i < queries)[:, None] & (dk < D)[None, :]
    tl.store(dq + row[:, None] * D + dk[None, :], acc.to(dq.dtype.element_ty), mask=mask)


@triton.jit
def store_keys(x, cache, value, j, keys, first_key, first_cached, cached, head, H, column, width,
               HAS_CACHE: tl.constexpr, ADD: tl.constexpr):  # fmt: skip
    """Writes rows j of a span's keys, to the cache's gradient or the tokens'; with ADD, adds to what is there."""
    mask = (j < keys)[:, None] & (column < width)[None, :]
    row = ((first_key + (j - cached)) * H + head)[:, None] * width + column[None, :]
    if HAS_CACHE:
        old = (j < cached)[:, None]
        cached_row = ((first_cached + j) * H + head)[:, None] * width + column[None, :]
        of_cache = value
        if ADD:
            of_cache += tl.load(cache + cached_row, mask=mask & old, other=0.0).to(tl.float32)
        tl.store(cache + cached_row, of_cache.to(cache.dtype.element_ty), mask=mask & old)
        mask = mask & (j >= cached)[:, None]
    if ADD:
        value += tl.load(x + row, mask=mask, other=0.0).to(tl.float32)
    tl.store(x + row, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def key_gradients_kernel(q, k, v, cache_k, cache_v, seed, spans, work, d_out, lse, delta, dk_out, d_cache, H, D, E,
                         dropout, HAS_CACHE: tl.constexpr, DROPOUT: tl.constexpr, DROPKEY: tl.constexpr,
                         BM: tl.constexpr, BN: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, FULL_K: tl.constexpr,
                         FULL_V: tl.constexpr, first=None, frame=0, WHOLE: tl.constexpr = False,
                         HAS_FIRST: tl.constexpr = False, ADD: tl.constexpr = False):  # fmt: skip
    """dk of one block of keys and one head."""
    _, head, item = placed(1, H)
    span, begin = tl.load(work + item * 2), tl.load(work + item * 2 + 1)
    first_query, queries, first_key, keys, first_cached, cached = span_of(spans, span)
    shift = keys - queries
    if WHOLE:
        shift = keys
    j = begin + tl.arange(0, BN)
    dk = tl.arange(0, DK)
    chance = 0
    if DROPOUT or DROPKEY:
        chance = tl.load(seed)
    k_block = load_keys(k, cache_k, j, keys, first_key, first_cached, cached, head, H, dk, D, HAS_CACHE, FULL_K)
    acc = tl.zeros([BN, DK], tl.float32)
    for start in range(tl.maximum(begin - shift, 0) // BM * BM, queries, BM):
        i = start + tl.arange(0, BM)
        q_block = load_rows(q, i, queries, first_query, head, H, dk, D, FULL_K)
        row = (first_query + i) * H + head
        lse_rows = tl.load(lse + row, mask=i < queries, other=0.0)
        delta_rows = tl.load(delta + row, mask=i < queries, other=0.0)
        d_scores = score_gradients(
            q_block, k_block, v, cache_v, d_out, lse_rows, delta_rows, i, j, shift, queries, keys, first_query,
            first_key, first_cached, cached, head, H, E, chance, dropout, first, frame, HAS_CACHE, DROPOUT, DROPKEY, BM,
            BN, DV, FULL_V, WHOLE, HAS_FIRST
        )  # fmt: skip
        acc = dot(tl.trans(d_scores).to(q_block.dtype), q_block, acc)
    store_keys(dk_out, d_cache, acc, j, keys, first_key, first_cached, cached, head, H, dk, D, HAS_CACHE, ADD)


@triton.jit
def value_gradients_kernel(q, k, cache_k, seed, spans, work, d_out, lse, dv_out, d_cache, H, D, E, dropout,
                           HAS_CACHE: tl.constexpr, DROPOUT: tl.constexpr, DROPKEY: tl.constexpr, BM: tl.constexpr,
                           BN: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, FULL_K: tl.constexpr,
                           FULL_V: tl.constexpr, first=None, frame=0, WHOLE: tl.constexpr = False,
                           HAS_FIRST: tl.constexpr = False, ADD: tl.constexpr = False):  # fmt: skip
    """dv of one block of keys, one head and one slice of the values."""
    slices = tl.cdiv(E, DV)
    part, head, item = placed(slices, H)
    span, begin = tl.load(work + item * 2), tl.load(work + item * 2 + 1)
    first_query, queries, first_key, keys, first_cached, cached = span_of(spans, span)
    shift = keys - queries
    if WHOLE:
        shift = keys
    j = begin + tl.arange(0, BN)
    dk = tl.arange(0, DK)
    e = part * DV + tl.arange(0, DV)
    chance = 0
    if DROPOUT or DROPKEY:
        chance = tl.load(seed)
    k_block = load_keys(k, cache_k, j, keys, first_key, first_cached, cached, head, H, dk, D, HAS_CACHE, FULL_K)
    acc = tl.zeros([BN, DV], tl.float32)
    for start in range(tl.maximum(begin - shift, 0) // BM * BM, queries, BM):
        i = start + tl.arange(0, BM)
        q_block = load_rows(q, i, queries, first_query, head, H, dk, D, FULL_K)
        lse_rows = tl.load(lse + (first_query + i) * H + head, mask=i < queries, other=0.0)
        scores = scores_of(
            q_block, k_block, i, j, shift, queries, keys, first_query, head, chance, dropout, first, frame, DROPKEY,
            WHOLE, HAS_FIRST
        )  # fmt: skip
        weights = tl.where((i < queries)[:, None], tl.exp(scores - lse_rows[:, None]), 0.0)
        if DROPOUT:
            kept = uniform(chance, first_query + i, j, head) >= dropout
            weights = tl.where(kept, weights / (1 - dropout), 0.0)
        grad = load_rows(d_out, i, queries, first_query, head, H, e, E, FULL_V)
        acc = dot(tl.trans(weights).to(grad.dtype), grad, acc)
    store_keys(dv_out, d_cache, acc, j, keys, first_key, first_cached, cached, head, H, e, E, HAS_CACHE, ADD)


@triton.jit(do_not_specialize=["place", "K"])  # else three kernels, as they grow
def decode_kernel(q, k, v, places, place, partial, peaks, H, D, E, K, PER_ROW: tl.constexpr, SPLIT: tl.constexpr,
                  BN: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr):  # fmt: skip
    """One query a row against SPLIT of its keys: a softmax of its own, joined by `join_kernel`.

    The query stands at key place[row] (or at the same for all rows): keys after it are not read.
    partial float32 [N, H, splits, E]; peaks float32 [N, H, splits, 2] (highest score, sum of weights).
    """
    row = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    split, splits = tl.program_id(1), tl.num_programs(1)
    e = tl.program_id(2) * DV + tl.arange(0, DV)
    dk = tl.arange(0, DK)
    last = place
    if PER_ROW:
        last = tl.load(places + row).to(tl.int32)
    query = tl.load(q + (row * H + head) * D + dk, mask=dk < D, other=0.0).to(tl.float32)
    highest = float("-inf")
    total = 0.0
    acc = tl.zeros([DV], tl.float32)
    for start in range(split * SPLIT, tl.minimum(last + 1, (split + 1) * SPLIT), BN):
        j = start + tl.arange(0, BN)
        there = j <= last
        at = (row * K + j) * H + head
        mask = there[:, None] & (dk < D)[None, :]
        keys = tl.load(k + at[:, None] * D + dk[None, :], mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(there, tl.sum(keys * query[None, :], axis=1), float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=0))
        weights = tl.exp(scores - higher)
        fade = tl.exp(highest - higher)
        mask = there[:, None] & (e < E)[None, :]
        values = tl.load(v + at[:, None] * E + e[None, :], mask=mask, other=0.0).to(tl.float32)
        acc = acc * fade + tl.sum(weights[:, None] * values, axis=0)
        total = total * fade + tl.sum(weights, axis=0)
        highest = higher
    at = (row * H + head) * splits + split
    tl.store(partial + at * E + e, acc, mask=e < E)
    if tl.program_id(2) == 0:
        tl.store(peaks + 2 * at, highest)
        tl.store(peaks + 2 * at + 1, total)


@triton.jit(do_not_specialize=["SPLITS"])
def join_kernel(partial, peaks, out, H, E, SPLITS, BS: tl.constexpr, DV: tl.constexpr):
    """out = the splits of `decode_kernel` as one softmax."""
    at = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * DV + tl.arange(0, DV)
    split = tl.arange(0, BS)
    highest = tl.load(peaks + 2 * (at * SPLITS + split), mask=split < SPLITS, other=float("-inf"))
    total = tl.load(peaks + 2 * (at * SPLITS + split) + 1, mask=split < SPLITS, other=0.0)
    top = tl.max(highest, axis=0)
    share = tl.exp(highest - top)
    whole = tl.sum(total * share, axis=0)
    acc = tl.zeros([DV], tl.float32)
    for s in range(SPLITS):
        factor = tl.exp(tl.load(peaks + 2 * (at * SPLITS + s)) - top)
        acc += factor * tl.load(partial + (at * SPLITS + s) * E + e, mask=e < E, other=0.0)
    tl.store(out + at * E + e, (acc / whole).to(out.dtype.element_ty), mask=e < E)
