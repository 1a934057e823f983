"""The device code of TimestepDecayNorm; docs/kernels.md derives it. `triton.py` beside this launches it.

An average that decays is `a = keep a + share`, token by token; keep is beta, 1 at padding, and 0 where a document or
segment starts. A program takes one piece of a row and a few groups of channels, and walks the piece in tiles of tokens:
each tile is read once, the recurrence runs over its tokens as a scan in float64, and it is normalised. What corrects
the bias, `1 - beta**count`, is the average of ones: the same recurrence, a sum of positive terms, so nothing cancels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megalodon.ops.timestep_norm.triton_kernels import placed, reciprocal, tile_moments


@triton.jit
def follow(keep_a, share_a, other_keep_a, other_a, keep_b, share_b, other_keep_b, other_b):
    """Two steps of two averages as one; a step that keeps nothing hides what was before it, NaN included."""
    return (
        keep_a * keep_b,
        tl.where(keep_b == 0, share_b, share_a * keep_b + share_b),
        other_keep_a * other_keep_b,
        tl.where(other_keep_b == 0, other_b, other_a * other_keep_b + other_b),
    )


@triton.jit
def enter(keep, share, before):
    """The averages after each token of a tile, [TT, .], of the scanned steps and what enters the tile, [.]."""
    return tl.where(keep == 0, share, before[None, :] * keep + share)


@triton.jit
def steps_of(padding, restart, token, within, beta1, beta2, HAS_PADDING: tl.constexpr, HAS_RESTART: tl.constexpr):
    """(1.0 where a token counts, what it keeps of the mean, of the variance), float64 [TT]; 0, 1, 1 outside."""
    real = within
    if HAS_PADDING:
        real = real & (tl.load(padding + token, mask=within, other=1) == 0)
    one = tl.full(token.shape, 1.0, tl.float64)
    keep1, keep2 = tl.where(real, one * beta1, one), tl.where(real, one * beta2, one)
    if HAS_RESTART:
        fresh = within & (tl.load(restart + token, mask=within, other=0) != 0)
        keep1, keep2 = tl.where(fresh, 0.0, keep1), tl.where(fresh, 0.0, keep2)
    return real.to(tl.float64), keep1, keep2


@triton.jit
def last_of(values, t, TT: tl.constexpr):
    """The last token's row of [TT, .]."""
    return tl.sum(tl.where((t == TT - 1)[:, None], values, 0.0), axis=0)


@triton.jit
def piece_of(piece, LENGTH, PIECES, LONGEST):
    """(first token of B*L, tokens, tokens from its end to the row's) of a piece."""
    row, number = piece // PIECES, piece % PIECES
    begin = number * LONGEST
    tokens = tl.minimum(LONGEST, LENGTH - begin)
    return tl.cast(row, tl.int64) * LENGTH + begin, tokens, LENGTH - begin - tokens


@triton.jit
def corrections(keep1, keep2, real, before1, before2, beta1, beta2):
    """`1 - beta**count` after each token, of both betas; [TT] float64, before1 and before2 those before the tile."""
    kept1, sum1, kept2, sum2 = tl.associative_scan((keep1, real * (1 - beta1), keep2, real * (1 - beta2)), 0, follow)
    return (
        tl.where(kept1 == 0, sum1, before1 * kept1 + sum1),
        tl.where(kept2 == 0, sum2, before2 * kept2 + sum2),
    )


@triton.jit(do_not_specialize=["LENGTH", "PIECES", "LONGEST"])
def summary_kernel(x, padding, restart, summary, LENGTH, PIECES, LONGEST, beta1: tl.constexpr, beta2: tl.constexpr,
                   G: tl.constexpr, F: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_RESTART: tl.constexpr,
                   TT: tl.constexpr, GC: tl.constexpr, FP: tl.constexpr):  # fmt: skip
    """summary[piece] = (what it keeps of mean and variance, what it adds, what it adds to averages of ones),
    float64 [n, G, 6]: keep1, mean, ones1, keep2, variance, ones2.
    """
    piece, g, channel, there = placed(G, F, GC, FP)
    start, length, after = piece_of(piece, LENGTH, PIECES, LONGEST)
    t = tl.arange(0, TT)
    zero = tl.zeros([GC], tl.float64)
    mean, var = zero, zero
    ones1, ones2 = tl.sum(zero, axis=0), tl.sum(zero, axis=0)
    kept1, kept2 = zero + 1.0, zero + 1.0
    for tile in range(tl.cdiv(length, TT)):
        token = start + tile * TT + t
        within = tile * TT + t < length
        inside = within[:, None, None] & there
        values = tl.load(x + token[:, None, None] * (G * F) + channel, mask=inside, other=0.0).to(tl.float32)
        m, s = tile_moments(values, inside, F, FP)
        real, keep1, keep2 = steps_of(padding, restart, token, within, beta1, beta2, HAS_PADDING, HAS_RESTART)
        wide = tl.zeros([TT, GC], tl.float64)
        counts = real[:, None] + wide
        add1 = tl.where(counts > 0, m.to(tl.float64) * (1 - beta1), 0.0)
        add2 = tl.where(counts > 0, s.to(tl.float64) * (1 - beta2), 0.0)
        k1, a1, k2, a2 = tl.associative_scan((keep1[:, None] + wide, add1, keep2[:, None] + wide, add2), 0, follow)
        mean, var = last_of(enter(k1, a1, mean), t, TT), last_of(enter(k2, a2, var), t, TT)
        c1, c2 = corrections(keep1, keep2, real, ones1, ones2, beta1, beta2)
        ones1 = tl.sum(tl.where(t == TT - 1, c1, 0.0), axis=0)
        ones2 = tl.sum(tl.where(t == TT - 1, c2, 0.0), axis=0)
        kept1, kept2 = kept1 * last_of(k1, t, TT), kept2 * last_of(k2, t, TT)
    at = summary + (tl.cast(piece, tl.int64) * G + g) * 6
    tl.store(at, kept1, mask=g < G)
    tl.store(at + 1, mean, mask=g < G)
    tl.store(at + 2, ones1 + zero, mask=g < G)
    tl.store(at + 3, kept2, mask=g < G)
    tl.store(at + 4, var, mask=g < G)
    tl.store(at + 5, ones2 + zero, mask=g < G)


@triton.jit(do_not_specialize=["PIECES"])
def scan_kernel(initial, summary, entering, PIECES, G, BLOCK: tl.constexpr):
    """entering[piece] = (mean, ones1, variance, ones2) before each piece of a row, from those before the row,
    float64 [B, G, 4] and [n, G, 4].
    """
    g = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = g < G
    from_row = initial + (row * G + g) * 4
    mean, ones1 = tl.load(from_row, mask=inside, other=0.0), tl.load(from_row + 1, mask=inside, other=0.0)
    var, ones2 = tl.load(from_row + 2, mask=inside, other=0.0), tl.load(from_row + 3, mask=inside, other=0.0)
    for number in range(PIECES):
        piece = (row * PIECES + number) * G + g
        to = entering + piece * 4
        tl.store(to, mean, mask=inside)
        tl.store(to + 1, ones1, mask=inside)
        tl.store(to + 2, var, mask=inside)
        tl.store(to + 3, ones2, mask=inside)
        if number < PIECES - 1:
            own = summary + piece * 6
            kept1, kept2 = tl.load(own, mask=inside, other=0.0), tl.load(own + 3, mask=inside, other=0.0)
            mean = tl.where(kept1 == 0, 0.0, mean * kept1) + tl.load(own + 1, mask=inside, other=0.0)
            ones1 = ones1 * kept1 + tl.load(own + 2, mask=inside, other=0.0)
            var = tl.where(kept2 == 0, 0.0, var * kept2) + tl.load(own + 4, mask=inside, other=0.0)
            ones2 = ones2 * kept2 + tl.load(own + 5, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["LENGTH", "PIECES", "LONGEST"])
def norm_kernel(x, weight, bias, padding, restart, entering, y, means, scales, shares, last, eps, LENGTH, PIECES,
                LONGEST, beta1: tl.constexpr, beta2: tl.constexpr, G: tl.constexpr, F: tl.constexpr,
                HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PADDING: tl.constexpr,
                HAS_RESTART: tl.constexpr, TT: tl.constexpr, GC: tl.constexpr, FP: tl.constexpr):  # fmt: skip
    """Normalises the tokens of a piece.

    means, scales float32 [B*L, G]: the mean and 1/sqrt(variance + eps), both without bias, that each token was
    normalised by; shares float32 [B*L, 2]: 1/(1 - beta**count) of both; last[row]: raw (mean, variance) after the row,
    float64 [B, G, 2].
    """
    piece, g, channel, there = placed(G, F, GC, FP)
    start, length, after = piece_of(piece, LENGTH, PIECES, LONGEST)
    t = tl.arange(0, TT)
    before = entering + (tl.cast(piece, tl.int64) * G + g) * 4
    mean0 = tl.load(before, mask=g < G, other=0.0)
    var0 = tl.load(before + 2, mask=g < G, other=0.0)
    common = entering + tl.cast(piece, tl.int64) * G * 4  # ones are those of every group
    ones1, ones2 = tl.load(common + 1), tl.load(common + 3)
    if HAS_WEIGHT:
        scale_by = tl.load(weight + channel, mask=there, other=0.0).to(tl.float32) + 1.0
    if HAS_BIAS:
        shift_by = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    for tile in range(tl.cdiv(length, TT)):
        token = start + tile * TT + t
        within = tile * TT + t < length
        inside = within[:, None, None] & there
        where = token[:, None, None] * (G * F) + channel
        values = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
        m, s = tile_moments(values, inside, F, FP)
        real, keep1, keep2 = steps_of(padding, restart, token, within, beta1, beta2, HAS_PADDING, HAS_RESTART)
        wide = tl.zeros([TT, GC], tl.float64)
        counts = real[:, None] + wide
        add1 = tl.where(counts > 0, m.to(tl.float64) * (1 - beta1), 0.0)
        add2 = tl.where(counts > 0, s.to(tl.float64) * (1 - beta2), 0.0)
        k1, a1, k2, a2 = tl.associative_scan((keep1[:, None] + wide, add1, keep2[:, None] + wide, add2), 0, follow)
        mean, var = enter(k1, a1, mean0), enter(k2, a2, var0)
        c1, c2 = corrections(keep1, keep2, real, ones1, ones2, beta1, beta2)
        share1 = reciprocal(tl.where(c1 > 0, c1, 1.0))
        share2 = reciprocal(tl.where(c2 > 0, c2, 1.0))
        mean32 = (mean * share1[:, None]).to(tl.float32)
        scale = tl.rsqrt((var * share2[:, None]).to(tl.float32) + eps)
        out = (values - mean32[:, :, None]) * scale[:, :, None]
        if HAS_WEIGHT:
            out = out * scale_by
        if HAS_BIAS:
            out = out + shift_by
        if HAS_PADDING:
            out = tl.where((counts > 0)[:, :, None], out, 0.0)
        tl.store(y + where, out.to(y.dtype.element_ty), mask=inside)
        at = token[:, None] * G + g[None, :]
        known = within[:, None] & (g < G)[None, :]
        tl.store(means + at, mean32, mask=known)
        tl.store(scales + at, scale, mask=known)
        tl.store(shares + token * 2, share1.to(tl.float32), mask=within)
        tl.store(shares + token * 2 + 1, share2.to(tl.float32), mask=within)
        # tokens past the end keep all and add nothing: the last place holds the newest averages
        mean0, var0 = last_of(mean, t, TT), last_of(var, t, TT)
        ones1 = tl.sum(tl.where(t == TT - 1, c1, 0.0), axis=0)
        ones2 = tl.sum(tl.where(t == TT - 1, c2, 0.0), axis=0)
    if after == 0:
        end = last + (tl.cast(piece // PIECES, tl.int64) * G + g) * 2
        tl.store(end, mean0, mask=g < G)
        tl.store(end + 1, var0, mask=g < G)


@triton.jit(do_not_specialize=["LENGTH", "PIECES", "LONGEST"])
def backward_kernel(x, dy, weight, padding, restart, means, scales, shares, flowing, dx, summary, d_weight, d_bias,
                    LENGTH, PIECES, LONGEST, beta1: tl.constexpr, beta2: tl.constexpr, G: tl.constexpr,
                    F: tl.constexpr, WRITE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_PADDING: tl.constexpr,
                    HAS_RESTART: tl.constexpr, TT: tl.constexpr, GC: tl.constexpr, FP: tl.constexpr):  # fmt: skip
    """Walks a piece from its end. With WRITE, gradients of its tokens and of weight and bias (a part for each piece).

    Two gradients flow from later tokens to earlier ones, float64: those of the raw mean and variance after a token.
    flowing[piece] = both before the piece that follows, [n, G, 2]. summary[piece] = (what is kept of the first, the
    first before the piece, the same of the second), [n, G, 4]; with WRITE, of what flowed in; without, of nothing.
    """
    piece, g, channel, there = placed(G, F, GC, FP)
    start, length, after = piece_of(piece, LENGTH, PIECES, LONGEST)
    t = tl.arange(0, TT)
    zero = tl.zeros([GC], tl.float64)
    to_mean0, to_var0 = zero, zero
    kept1, kept2 = zero + 1.0, zero + 1.0
    if WRITE:
        from_later = flowing + (tl.cast(piece, tl.int64) * G + g) * 2
        to_mean0 = tl.load(from_later, mask=g < G, other=0.0)
        to_var0 = tl.load(from_later + 1, mask=g < G, other=0.0)
        dw = tl.zeros([GC, FP], tl.float32)
        db = tl.zeros([GC, FP], tl.float32)
    if HAS_WEIGHT:
        scale_by = tl.load(weight + channel, mask=there, other=0.0).to(tl.float32) + 1.0
    for tile in range(tl.cdiv(length, TT)):
        index = length - 1 - tile * TT - t  # place 0 holds the latest token
        token = start + index
        within = index >= 0
        inside = within[:, None, None] & there
        where = token[:, None, None] * (G * F) + channel
        real, own_keep1, own_keep2 = steps_of(padding, restart, token, within, beta1, beta2, HAS_PADDING, HAS_RESTART)
        # what reached the average after this token from the next one: what that keeps. The next piece's is in `flowing`.
        followed = within & (index < length - 1)
        follows, keep1, keep2 = steps_of(padding, restart, token + 1, followed, beta1, beta2, HAS_PADDING, HAS_RESTART)
        wide = tl.zeros([TT, GC], tl.float64)
        counts = real[:, None] + wide
        at = token[:, None] * G + g[None, :]
        known = within[:, None] & (g < G)[None, :]
        mean = tl.load(means + at, mask=known, other=0.0)
        scale = tl.load(scales + at, mask=known, other=1.0)
        share1 = tl.load(shares + token * 2, mask=within, other=0.0).to(tl.float64)
        share2 = tl.load(shares + token * 2 + 1, mask=within, other=0.0).to(tl.float64)
        values = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + where, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, values - mean[:, :, None], 0.0)
        if HAS_PADDING:
            grad = tl.where((counts > 0)[:, :, None], grad, 0.0)
            centred = tl.where((counts > 0)[:, :, None], centred, 0.0)
        if WRITE:
            dw += tl.sum(grad * centred * scale[:, :, None], axis=0)
            db += tl.sum(grad, axis=0)
        if HAS_WEIGHT:
            grad = grad * scale_by
        away = tl.sum(centred, axis=2) / F
        own1 = (-scale * tl.sum(grad, axis=2)).to(tl.float64) * share1[:, None]
        own2 = (-0.5 * scale * scale * scale * tl.sum(grad * centred, axis=2)).to(tl.float64) * share2[:, None]
        own1, own2 = tl.where(counts > 0, own1, 0.0), tl.where(counts > 0, own2, 0.0)
        k1, a1, k2, a2 = tl.associative_scan((keep1[:, None] + wide, own1, keep2[:, None] + wide, own2), 0, follow)
        to_mean, to_var = enter(k1, a1, to_mean0), enter(k2, a2, to_var0)
        if WRITE:
            to_m = tl.where(counts > 0, to_mean * (1 - beta1), 0.0).to(tl.float32) / F
            to_s = tl.where(counts > 0, to_var * (1 - beta2), 0.0).to(tl.float32) * (2.0 / F)
            out = grad * scale[:, :, None] + to_m[:, :, None] + to_s[:, :, None] * (centred - away[:, :, None])
            tl.store(dx + where, out.to(dx.dtype.element_ty), mask=inside)
        to_mean0, to_var0 = last_of(to_mean, t, TT), last_of(to_var, t, TT)
        kept1, kept2 = kept1 * last_of(k1, t, TT), kept2 * last_of(k2, t, TT)
    # what its first token keeps lies between the piece and the one before it
    first = start + tl.arange(0, 1)
    follows, keep1, keep2 = steps_of(padding, restart, first, first >= 0, beta1, beta2, HAS_PADDING, HAS_RESTART)
    first1, first2 = tl.sum(keep1, axis=0), tl.sum(keep2, axis=0)
    end = summary + (tl.cast(piece, tl.int64) * G + g) * 4
    tl.store(end, kept1 * first1, mask=g < G)
    tl.store(end + 1, tl.where(first1 == 0, 0.0, to_mean0 * first1), mask=g < G)
    tl.store(end + 2, kept2 * first2, mask=g < G)
    tl.store(end + 3, tl.where(first2 == 0, 0.0, to_var0 * first2), mask=g < G)
    if WRITE:
        part = tl.cast(piece, tl.int64) * (G * F) + channel
        tl.store(d_weight + part, dw[None, :, :], mask=there)
        tl.store(d_bias + part, db[None, :, :], mask=there)


@triton.jit(do_not_specialize=["PIECES"])
def adjoint_scan_kernel(d_last, summary, flowing, PIECES, G, HAS_LAST: tl.constexpr, BLOCK: tl.constexpr):
    """flowing[piece] = the gradients of mean and variance that later pieces of the row send it; d_last [B, G, 2]."""
    g = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = g < G
    to_mean = tl.zeros([BLOCK], tl.float64)
    to_var = tl.zeros([BLOCK], tl.float64)
    if HAS_LAST:
        to_mean = tl.load(d_last + (row * G + g) * 2, mask=inside, other=0.0)
        to_var = tl.load(d_last + (row * G + g) * 2 + 1, mask=inside, other=0.0)
    for back in range(PIECES):
        piece = (row * PIECES + PIECES - 1 - back) * G + g
        tl.store(flowing + piece * 2, to_mean, mask=inside)
        tl.store(flowing + piece * 2 + 1, to_var, mask=inside)
        if back < PIECES - 1:
            own = summary + piece * 4
            kept1, kept2 = tl.load(own, mask=inside, other=0.0), tl.load(own + 2, mask=inside, other=0.0)
            to_mean = tl.where(kept1 == 0, 0.0, to_mean * kept1) + tl.load(own + 1, mask=inside, other=0.0)
            to_var = tl.where(kept2 == 0, 0.0, to_var * kept2) + tl.load(own + 3, mask=inside, other=0.0)
