"""The device code of TimestepNorm; docs/kernels.md derives it. `triton.py` beside this launches it.

A program takes one piece of a document and a few groups of channels, and walks the piece in tiles of tokens: each tile
is read once, its tokens' moments are added to running sums in float64, and it is normalised. Only where too few pieces
and groups would leave the GPU idle are rows cut into several pieces, at the cost of one more reading that sums each.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_moments(values, inside, F: tl.constexpr, FP: tl.constexpr):
    """(mean, population variance) of each token's features in each group: [TT, GC] of [TT, GC, FP], float32."""
    mean = tl.sum(values, axis=2) / F
    centred = values - mean[:, :, None]
    if FP > F:
        centred = tl.where(inside, centred, 0.0)
    return mean, tl.sum(centred * centred, axis=2) / F


@triton.jit
def reciprocal(n):
    """1 / n in float64 for n >= 1, by two Newton steps from float32: a float64 division costs ten times as much."""
    r = (1.0 / n.to(tl.float32)).to(tl.float64)
    r = r * (2.0 - n * r)
    return r * (2.0 - n * r)


@triton.jit
def placed(G: tl.constexpr, F: tl.constexpr, GC: tl.constexpr, FP: tl.constexpr):
    """(piece, groups [GC], channels [1, GC, FP], which channels there are) of the program.

    One axis of programs, since the others end at 65,535; neighbours read neighbouring groups.
    """
    blocks: tl.constexpr = (G + GC - 1) // GC
    piece = tl.program_id(0) // blocks
    g = tl.program_id(0) % blocks * GC + tl.arange(0, GC)
    f = tl.arange(0, FP)
    channel = (g[:, None] * F + f[None, :])[None, :, :]
    there = (g < G)[:, None] & (f >= 0)[None, :]
    if FP > F:
        there = there & (f < F)[None, :]
    return piece, g, channel, there[None, :, :]


@triton.jit
def are_real(padding, token, inside, HAS_PADDING: tl.constexpr):
    """1.0 where a token is inside its piece and no padding, float64."""
    real = inside
    if HAS_PADDING:
        real = real & (tl.load(padding + token, mask=inside, other=1) == 0)
    return real.to(tl.float64)


@triton.jit
def summary_kernel(x, padding, runs, summary, G: tl.constexpr, F: tl.constexpr, HAS_PADDING: tl.constexpr,
                   TT: tl.constexpr, GC: tl.constexpr, FP: tl.constexpr):  # fmt: skip
    """summary[piece] = (tokens, mean of their means, sum of variances and squared deviations), float64 [n, G, 3]."""
    piece, g, channel, there = placed(G, F, GC, FP)
    start, length = tl.load(runs + piece * 4).to(tl.int64), tl.load(runs + piece * 4 + 1)
    t = tl.arange(0, TT)
    count = tl.zeros([GC], tl.float64)
    mean = tl.zeros([GC], tl.float64)
    spread = tl.zeros([GC], tl.float64)
    for tile in range(tl.cdiv(length, TT)):
        token = start + tile * TT + t
        within = tile * TT + t < length
        inside = within[:, None, None] & there
        values = tl.load(x + token[:, None, None] * (G * F) + channel, mask=inside, other=0.0).to(tl.float32)
        m, s = tile_moments(values, inside, F, FP)
        real = are_real(padding, token, within, HAS_PADDING)[:, None]
        m, s = m.to(tl.float64), s.to(tl.float64)
        n = tl.sum(real + m * 0, axis=0)
        centre = tl.sum(m * real, axis=0) / tl.maximum(n, 1)
        away = m - centre[None, :]
        inner = tl.sum((s + away * away) * real, axis=0)
        total = tl.maximum(count + n, 1)
        step = centre - mean
        spread += inner + step * step * (count * n / total)
        mean += step * (n / total)
        count += n
    at = (tl.cast(piece, tl.int64) * G + g) * 3
    tl.store(summary + at, count, mask=g < G)
    tl.store(summary + at + 1, mean, mask=g < G)
    tl.store(summary + at + 2, spread, mask=g < G)


@triton.jit
def scan_kernel(runs, rows, count, mean, var, prior_count, prior_mean, prior_var, summary, entering, G,
                BLOCK: tl.constexpr):  # fmt: skip
    """entering[piece] = (count, mean, variance) before each piece of a row, float64 [n, G, 3]."""
    g = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = g < G
    n = tl.load(count + row).to(tl.float64) + tl.zeros([BLOCK], tl.float64)
    centre = tl.load(mean + row * G + g, mask=inside, other=0.0)
    spread = tl.load(var + row * G + g, mask=inside, other=0.0)
    first, pieces = tl.load(rows + 2 * row), tl.load(rows + 2 * row + 1)
    for piece in range(first, first + pieces):
        if tl.load(runs + piece * 4 + 2) != 0:
            n = tl.zeros([BLOCK], tl.float64) + prior_count
            centre = tl.load(prior_mean + g, mask=inside, other=0.0)
            spread = tl.load(prior_var + g, mask=inside, other=0.0)
        at = (tl.cast(piece, tl.int64) * G + g) * 3
        tl.store(entering + at, n, mask=inside)
        tl.store(entering + at + 1, centre, mask=inside)
        tl.store(entering + at + 2, spread, mask=inside)
        if piece < first + pieces - 1:
            added = tl.load(summary + at, mask=inside, other=0.0)
            step = tl.load(summary + at + 1, mask=inside, other=0.0) - centre
            inner = tl.load(summary + at + 2, mask=inside, other=0.0)
            total = tl.maximum(n + added, 1)
            new = (n * spread + inner + step * step * (n * added / total)) / total
            spread = tl.where(n + added > 0, new, spread)
            centre += step * (added / total)
            n += added


@triton.jit
def norm_kernel(x, weight, bias, padding, runs, entering, y, means, scales, counts, last, eps,
                G: tl.constexpr, F: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
                HAS_PADDING: tl.constexpr, TT: tl.constexpr, GC: tl.constexpr, FP: tl.constexpr):  # fmt: skip
    """Normalises the tokens of a piece.

    means, scales float32 [B*L, G]: the mean and 1/sqrt(var + eps) that each token was normalised by; counts[piece]: the
    count after it; last[row] (count, mean, variance) after the row's last piece, float64 [B, G, 3].
    """
    piece, g, channel, there = placed(G, F, GC, FP)
    start, length = tl.load(runs + piece * 4).to(tl.int64), tl.load(runs + piece * 4 + 1)
    row = tl.load(runs + piece * 4 + 3)
    t = tl.arange(0, TT)
    before = entering + (tl.cast(piece, tl.int64) * G + g) * 3
    n0 = tl.load(before, mask=g < G, other=0.0)
    mean0 = tl.load(before + 1, mask=g < G, other=0.0)
    var0 = tl.load(before + 2, mask=g < G, other=1.0)
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
        real = are_real(padding, token, within, HAS_PADDING)[:, None] + tl.zeros([TT, GC], tl.float64)
        n = n0[None, :] + tl.cumsum(real, axis=0)
        share = reciprocal(tl.maximum(n, 1.0))
        m64 = m.to(tl.float64)
        mean = ((n0 * mean0)[None, :] + tl.cumsum(m64 * real, axis=0)) * share
        away = m64 - mean
        # (m - mean before)^2 (n - 1)/n, by the mean after it
        spread = real * (
            s.to(tl.float64) + tl.where(n > 1, away * away * (n * reciprocal(tl.maximum(n - 1, 1.0))), 0.0)
        )
        var = ((n0 * var0)[None, :] + tl.cumsum(spread, axis=0)) * share
        mean = tl.where(n > 0, mean, mean0[None, :])
        var = tl.where(n > 0, var, var0[None, :])
        mean32, scale = mean.to(tl.float32), tl.rsqrt(var.to(tl.float32) + eps)
        out = (values - mean32[:, :, None]) * scale[:, :, None]
        if HAS_WEIGHT:
            out = out * scale_by
        if HAS_BIAS:
            out = out + shift_by
        if HAS_PADDING:
            out = tl.where((real > 0)[:, :, None], out, 0.0)
        tl.store(y + where, out.to(y.dtype.element_ty), mask=inside)
        at = token[:, None] * G + g[None, :]
        tl.store(means + at, mean32, mask=within[:, None] & (g < G)[None, :])
        tl.store(scales + at, scale, mask=within[:, None] & (g < G)[None, :])
        final = (t == TT - 1)[:, None]  # tokens past the end add nothing: the last place holds the newest statistics
        n0 = tl.sum(tl.where(final, n, 0.0), axis=0)
        mean0 = tl.sum(tl.where(final, mean, 0.0), axis=0)
        var0 = tl.sum(tl.where(final, var, 0.0), axis=0)
    tl.store(counts + tl.cast(piece, tl.int64) * G + g, n0, mask=g < G)
    if row >= 0:
        end = last + (tl.cast(row, tl.int64) * G + g) * 3
        tl.store(end, n0, mask=g < G)
        tl.store(end + 1, mean0, mask=g < G)
        tl.store(end + 2, var0, mask=g < G)


@triton.jit
def backward_kernel(x, dy, weight, padding, runs, means, scales, counts, flowing, dx, summary, d_weight, d_bias,
                    G: tl.constexpr, F: tl.constexpr, WRITE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
                    HAS_PADDING: tl.constexpr, TT: tl.constexpr, GC: tl.constexpr, FP: tl.constexpr):  # fmt: skip
    """Walks a piece from its end. With WRITE, gradients of its tokens and of weight and bias (a part for each piece).

    Two sums flow from later tokens to earlier ones, float64: `a` over dvar_t / n_t, and `b` over what reaches the sum
    of means. flowing[piece] = (a, b) after the piece, summary[piece] = (a, b, d) before it: with WRITE as they are;
    without, as if nothing flowed in, and d so that a flowing in adds a to a and -a d to b. [n, G, 2] and [n, G, 3].
    """
    piece, g, channel, there = placed(G, F, GC, FP)
    start, length = tl.load(runs + piece * 4).to(tl.int64), tl.load(runs + piece * 4 + 1)
    t = tl.arange(0, TT)
    after = tl.load(counts + tl.cast(piece, tl.int64) * G + g, mask=g < G, other=1.0)
    a0 = tl.zeros([GC], tl.float64)
    b0 = tl.zeros([GC], tl.float64)
    d0 = tl.zeros([GC], tl.float64)
    if WRITE:
        from_later = flowing + (tl.cast(piece, tl.int64) * G + g) * 2
        a0 = tl.load(from_later, mask=g < G, other=0.0)
        b0 = tl.load(from_later + 1, mask=g < G, other=0.0)
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
        real = are_real(padding, token, within, HAS_PADDING)[:, None] + tl.zeros([TT, GC], tl.float64)
        at = token[:, None] * G + g[None, :]
        known = within[:, None] & (g < G)[None, :]
        mean = tl.load(means + at, mask=known, other=0.0)
        scale = tl.load(scales + at, mask=known, other=1.0)
        values = tl.load(x + where, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + where, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, values - mean[:, :, None], 0.0)
        if HAS_PADDING:
            grad = tl.where((real > 0)[:, :, None], grad, 0.0)
        if WRITE:
            dw += tl.sum(grad * centred * scale[:, :, None], axis=0)
            db += tl.sum(grad, axis=0)
        if HAS_WEIGHT:
            grad = grad * scale_by
        away = tl.sum(centred, axis=2) / F
        to_mean = -scale * tl.sum(grad, axis=2)
        to_var = -0.5 * scale * scale * scale * tl.sum(grad * centred, axis=2)
        n = after[None, :] - (tl.cumsum(real, axis=0) - real)
        share = reciprocal(tl.maximum(n, 1.0))
        a = a0[None, :] + tl.cumsum(to_var.to(tl.float64) * real * share, axis=0)
        pulled = 2 * a * away.to(tl.float64) * real
        apart = tl.where(n > 1, reciprocal(tl.maximum(n - 1, 1.0)), 0.0)
        b = b0[None, :] + tl.cumsum(to_mean.to(tl.float64) * real * share - pulled * apart, axis=0)
        if WRITE:
            to_m = ((pulled + b + pulled * apart) * real).to(tl.float32) / F
            to_s = (a * real).to(tl.float32) * (2.0 / F)
            out = grad * scale[:, :, None] + to_m[:, :, None] + to_s[:, :, None] * (centred - away[:, :, None])
            if HAS_PADDING:
                out = tl.where((real > 0)[:, :, None], out, 0.0)
            tl.store(dx + where, out.to(dx.dtype.element_ty), mask=inside)
        else:
            d0 += tl.sum(2 * away.to(tl.float64) * real * apart, axis=0)
        final = (t == TT - 1)[:, None]
        a0 = tl.sum(tl.where(final, a, 0.0), axis=0)
        b0 = tl.sum(tl.where(final, b, 0.0), axis=0)
        after -= tl.sum(real, axis=0)
    end = summary + (tl.cast(piece, tl.int64) * G + g) * 3
    tl.store(end, a0, mask=g < G)
    tl.store(end + 1, b0, mask=g < G)
    tl.store(end + 2, d0, mask=g < G)
    if WRITE:
        part = tl.cast(piece, tl.int64) * (G * F) + channel
        tl.store(d_weight + part, dw[None, :, :], mask=there)
        tl.store(d_bias + part, db[None, :, :], mask=there)


@triton.jit
def adjoint_scan_kernel(runs, rows, last, d_mean, d_var, summary, flowing, G, HAS_LAST: tl.constexpr,
                        BLOCK: tl.constexpr):  # fmt: skip
    """flowing[piece] = (a, b) that later pieces of its document send it, from the gradients of the last statistics."""
    g = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1).to(tl.int64)
    inside = g < G
    a = tl.zeros([BLOCK], tl.float64)
    b = tl.zeros([BLOCK], tl.float64)
    if HAS_LAST:
        n = tl.maximum(tl.load(last + (row * G + g) * 3, mask=inside, other=1.0), 1.0)
        a = tl.load(d_var + row * G + g, mask=inside, other=0.0).to(tl.float64) / n
        b = tl.load(d_mean + row * G + g, mask=inside, other=0.0).to(tl.float64) / n
    first, pieces = tl.load(rows + 2 * row), tl.load(rows + 2 * row + 1)
    for back in range(pieces):
        piece = first + pieces - 1 - back
        at = tl.cast(piece, tl.int64) * G + g
        tl.store(flowing + 2 * at, a, mask=inside)
        tl.store(flowing + 2 * at + 1, b, mask=inside)
        if tl.load(runs + piece * 4 + 2) != 0:
            a = tl.zeros([BLOCK], tl.float64)
            b = tl.zeros([BLOCK], tl.float64)
        elif back < pieces - 1:
            b += tl.load(summary + 3 * at + 1, mask=inside, other=0.0)
            b -= a * tl.load(summary + 3 * at + 2, mask=inside, other=0.0)
            a += tl.load(summary + 3 * at, mask=inside, other=0.0)
