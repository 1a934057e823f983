"""What Mamba-2's layer does between its products: short convolution, tables of a scan, gated norm. One pass each.

All tensors are float32 unless said otherwise, see `tables`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megalodon.ops.compiled.rows import share_of, whose
from megalodon.ops.compiled.tables import Convolution, GatedNorm, Scan
from megalodon.ops.compiled.vectors import exp, f32, f64, float32, i64, loops, silu

_UNIT = 64  # channels of which threads take whole ones
_SUMMED = 256  # numbers that are summed in float32, before they go to float64


# --- the short convolution: threads share the channels -------------------------------------------------------------


@loops
def _token(a: Any, row: Any, place: Any) -> Any:
    """Where a token of x lies, or one before the first."""
    if place < 0:
        before = a[Convolution.taps] - 1
        return a[Convolution.recent] + 4 * (row * before + before + place) * a[Convolution.dim]
    return a[Convolution.x] + 4 * (row * a[Convolution.row_step] + place * a[Convolution.token_step])


@loops
def _convolved(a: Any, row: Any, t: Any, out: Any, first: Any, last: Any) -> Any:
    taps, dim = a[Convolution.taps], a[Convolution.dim]
    if a[Convolution.bias] == 0:
        for i in range(first, last):
            out[i] = float32(0)
    else:
        bias = f32(a[Convolution.bias])
        for i in range(first, last):
            out[i] = bias[i]
    for j in range(taps):
        x, w = f32(_token(a, row, t - taps + 1 + j)), f32(a[Convolution.weight] + 4 * j * dim)
        for i in range(first, last):
            out[i] += x[i] * w[i]


@loops
def convolve(a: Any) -> Any:
    """y, on every thread of the pool: `a` int64, laid out as `Convolution`."""
    thread, threads = whose(a[Convolution.number], a[Convolution.team])
    length, dim = a[Convolution.length], a[Convolution.dim]
    first, last = share_of(dim, thread, threads, _UNIT)
    for row in range(a[Convolution.rows]):
        for t in range(length):
            y = f32(a[Convolution.y] + 4 * (row * length + t) * dim)
            _convolved(a, row, t, y, first, last)
            if a[Convolution.silu] != 0:
                for i in range(first, last):
                    y[i] = silu(y[i])


@loops
def convolve_back(a: Any) -> Any:
    """All gradients."""
    thread, threads = whose(a[Convolution.number], a[Convolution.team])
    length, dim, taps = a[Convolution.length], a[Convolution.dim], a[Convolution.taps]
    first, last = share_of(dim, thread, threads, _UNIT)
    g = f32(a[Convolution.scratch] + 4 * (taps + 1) * dim)
    for row in range(a[Convolution.rows]):
        joined = a[Convolution.d_joined] + 4 * row * (taps - 1 + length) * dim
        for place in range(taps - 1 + length):
            zeros = f32(joined + 4 * place * dim)
            for i in range(first, last):
                zeros[i] = float32(0)
        for t in range(length):
            dy = f32(a[Convolution.dy] + 4 * (row * length + t) * dim)
            if a[Convolution.silu] != 0:
                _convolved(a, row, t, g, first, last)
                for i in range(first, last):
                    share = float32(1) / (float32(1) + exp(-g[i]))
                    g[i] = dy[i] * share * (float32(1) + g[i] * (float32(1) - share))
            else:
                for i in range(first, last):
                    g[i] = dy[i]
            for j in range(taps):
                x, w = f32(_token(a, row, t - taps + 1 + j)), f32(a[Convolution.weight] + 4 * j * dim)
                dx, dw = f32(joined + 4 * (t + j) * dim), f32(a[Convolution.scratch] + 4 * j * dim)
                for i in range(first, last):
                    dx[i] += g[i] * w[i]
                    dw[i] += g[i] * x[i]
            db = f32(a[Convolution.scratch] + 4 * taps * dim)
            for i in range(first, last):
                db[i] += g[i]
            if (t + 1) % _SUMMED == 0 or t + 1 == length:
                for j in range(taps + 1):
                    part, total = f32(a[Convolution.scratch] + 4 * j * dim), f64(a[Convolution.totals] + 8 * j * dim)
                    for i in range(first, last):
                        total[i] += part[i]
                        part[i] = float32(0)


# --- the gated norm: threads share the rows ------------------------------------------------------------------------


@loops
def norm(a: Any) -> Any:
    """out, on every thread of the pool: `a` int64, laid out as `GatedNorm`."""
    thread, threads = whose(a[GatedNorm.number], a[GatedNorm.team])
    dim, groups, eps = a[GatedNorm.dim], a[GatedNorm.groups], f64(a[GatedNorm.eps])[0]
    size, w = dim // groups, f32(a[GatedNorm.weight])
    first, last = share_of(a[GatedNorm.rows], thread, threads, 1)
    for row in range(first, last):
        y, z = f32(a[GatedNorm.y] + 4 * row * dim), f32(a[GatedNorm.z] + 4 * row * a[GatedNorm.z_step])
        out = f32(a[GatedNorm.out] + 4 * row * dim)
        for i in range(dim):
            out[i] = y[i] * silu(z[i])
        for group in range(groups):
            total = float32(0)
            for i in range(group * size, group * size + size):
                total += out[i] * out[i]
            scale = float32(1.0 / np.sqrt(total / size + eps))
            for i in range(group * size, group * size + size):
                out[i] = out[i] * scale * w[i]


@loops
def norm_back(a: Any) -> Any:
    """All gradients."""
    thread, threads = whose(a[GatedNorm.number], a[GatedNorm.team])
    dim, groups, eps = a[GatedNorm.dim], a[GatedNorm.groups], f64(a[GatedNorm.eps])[0]
    size, w = dim // groups, f32(a[GatedNorm.weight])
    part, whole = f32(a[GatedNorm.scratch] + 4 * thread * dim), f64(a[GatedNorm.totals] + 8 * thread * dim)
    first, last = share_of(a[GatedNorm.rows], thread, threads, 1)
    for row in range(first, last):
        y, z = f32(a[GatedNorm.y] + 4 * row * dim), f32(a[GatedNorm.z] + 4 * row * a[GatedNorm.z_step])
        d = f32(a[GatedNorm.out] + 4 * row * dim)
        dy, dz = f32(a[GatedNorm.dy] + 4 * row * dim), f32(a[GatedNorm.dz] + 4 * row * dim)
        for i in range(dim):
            dy[i] = silu(z[i])
        for group in range(groups):
            total, along = float32(0), float32(0)
            for i in range(group * size, group * size + size):
                gated = y[i] * dy[i]
                total += gated * gated
                along += d[i] * w[i] * gated
            scale = float32(1.0 / np.sqrt(total / size + eps))
            mean = scale * scale * along / float32(size)
            for i in range(group * size, group * size + size):
                gate = dy[i]
                gated = y[i] * gate
                part[i] += d[i] * gated * scale
                back = scale * (d[i] * w[i] - gated * mean)
                share = float32(1) / (float32(1) + exp(-z[i]))
                dy[i] = back * gate
                dz[i] = back * y[i] * (share + gate * (float32(1) - share))
        if (row + 1) % _SUMMED == 0 or row + 1 == last:
            for i in range(dim):
                whole[i] += part[i]
                part[i] = float32(0)


# --- the scan: threads share chunks, or heads of them --------------------------------------------------------------


@loops
def _x(a: Any, chunk: Any, t: Any) -> Any:
    """Where a token of x lies."""
    row, inside = chunk // a[Scan.chunks], chunk % a[Scan.chunks]
    return a[Scan.x] + 4 * (row * a[Scan.row_step] + (inside * a[Scan.size] + t) * a[Scan.token_step])


@loops
def open(a: Any) -> Any:
    """What tokens write, and what is left of it at the chunk's end, on every thread of the pool."""
    thread, threads = whose(a[Scan.number], a[Scan.team])
    size, heads, width = a[Scan.size], a[Scan.heads], a[Scan.width]
    first, last = share_of(a[Scan.rows] * a[Scan.chunks], thread, threads, 1)
    for chunk in range(first, last):
        for t in range(size):
            x, at = _x(a, chunk, t), (chunk * size + t) * heads
            for h in range(heads):
                weight = float32(1) if a[Scan.weight] == 0 else f32(a[Scan.weight])[at + h]
                left = weight * f32(a[Scan.leaving])[at + h]
                u = f32(x + 4 * h * width)
                written = f32(a[Scan.written] + 4 * ((chunk * heads + h) * size + t) * width)
                kept = f32(a[Scan.kept] + 4 * (at + h) * width)
                for p in range(width):
                    written[p] = u[p] * weight
                    kept[p] = u[p] * left


@loops
def weigh(a: Any) -> Any:
    """How much of what token s wrote token t reads."""
    thread, threads = whose(a[Scan.number], a[Scan.team])
    size, heads, groups = a[Scan.size], a[Scan.heads], a[Scan.groups]
    first, last = share_of(a[Scan.rows] * a[Scan.chunks] * heads, thread, threads, 1)
    for part in range(first, last):
        chunk, group = part // heads, part % heads // (heads // groups)
        sums = f64(a[Scan.sums] + 8 * part * size)
        for t in range(size):
            scores = f32(a[Scan.scores] + 4 * ((chunk * groups + group) * size + t) * size)
            out, here = f32(a[Scan.weights] + 4 * (part * size + t) * size), sums[t]
            for s in range(t + 1):
                out[s] = scores[s] * exp(float32(here - sums[s]))
            for s in range(t + 1, size):
                out[s] = float32(0)
            if a[Scan.document] != 0:
                document = i64(a[Scan.document] + 8 * chunk * size)
                for s in range(t + 1):
                    if document[s] != document[t]:
                        out[s] = float32(0)


@loops
def weigh_back(a: Any) -> Any:
    """Gradients of the scores, over those of a group's heads, and of the sums; in place of those of the weights."""
    thread, threads = whose(a[Scan.number], a[Scan.team])
    size, heads, groups = a[Scan.size], a[Scan.heads], a[Scan.groups]
    share = heads // groups
    first, last = share_of(a[Scan.rows] * a[Scan.chunks] * groups, thread, threads, 1)
    for part in range(first, last):
        chunk, group = part // groups, part % groups
        for i in range(size * size):
            f32(a[Scan.scores] + 4 * part * size * size)[i] = float32(0)
        for head in range(group * share, group * share + share):
            at = chunk * heads + head
            sums, d_sums = f64(a[Scan.sums] + 8 * at * size), f64(a[Scan.d_sums] + 8 * at * size)
            for t in range(size):
                d_sums[t] = 0.0
            for t in range(size):
                known = f32(a[Scan.known] + 4 * (at * size + t) * size)
                d = f32(a[Scan.weights] + 4 * (at * size + t) * size)
                out, here = f32(a[Scan.scores] + 4 * (part * size + t) * size), sums[t]
                total = 0.0
                if a[Scan.document] != 0:
                    document = i64(a[Scan.document] + 8 * chunk * size)
                    for s in range(t + 1):
                        if document[s] != document[t]:
                            d[s] = float32(0)
                for s in range(t + 1):
                    out[s] += d[s] * exp(float32(here - sums[s]))
                for s in range(t + 1):
                    flow = float32(d[s] * known[s])
                    total += flow
                    d_sums[s] -= flow
                d_sums[t] += total


@loops
def carry(a: Any) -> Any:
    """The states before the chunks and after the last."""
    thread, threads = whose(a[Scan.number], a[Scan.team])
    chunks, heads, state = a[Scan.chunks], a[Scan.heads], a[Scan.state]
    first, last = share_of(a[Scan.rows] * heads, thread, threads, 1)
    for part in range(first, last):
        row, head = part // heads, part % heads
        now = f32(a[Scan.last] + 4 * part * state)
        for chunk in range(row * chunks, row * chunks + chunks):
            at = chunk * heads + head
            decay, added = f32(a[Scan.decay])[at], f32(a[Scan.added] + 4 * at * state)
            before = f32(a[Scan.before] + 4 * at * state)
            for i in range(state):
                before[i] = now[i]
                now[i] = decay * now[i] + added[i]


@loops
def carry_back(a: Any) -> Any:
    """Gradients of what is added, in place of those of the states before the chunks; of decays, and of the state."""
    thread, threads = whose(a[Scan.number], a[Scan.team])
    chunks, heads, state = a[Scan.chunks], a[Scan.heads], a[Scan.state]
    first, last = share_of(a[Scan.rows] * heads, thread, threads, 1)
    for part in range(first, last):
        row, head = part // heads, part % heads
        now = f32(a[Scan.last] + 4 * part * state)
        for inside in range(chunks):
            at = ((row + 1) * chunks - 1 - inside) * heads + head
            decay, d = f32(a[Scan.decay])[at], f32(a[Scan.added] + 4 * at * state)
            before, total = f32(a[Scan.before] + 4 * at * state), float32(0)
            for i in range(state):
                to_before = d[i]
                total += now[i] * before[i]
                d[i] = now[i]
                now[i] = decay * now[i] + to_before
            f32(a[Scan.d_decay])[at] = total * decay


@loops
def close(a: Any) -> Any:
    """y: what is read from states and inside chunks, and the skip; in place of the first."""
    thread, threads = whose(a[Scan.number], a[Scan.team])
    size, heads, width = a[Scan.size], a[Scan.heads], a[Scan.width]
    first, last = share_of(a[Scan.rows] * a[Scan.chunks], thread, threads, 1)
    for chunk in range(first, last):
        for t in range(size):
            x, at = _x(a, chunk, t), (chunk * size + t) * heads
            for h in range(heads):
                factor = f32(a[Scan.entering])[at + h]
                skip = float32(0) if a[Scan.skip] == 0 else f32(a[Scan.skip])[h]
                u, y = f32(x + 4 * h * width), f32(a[Scan.inter] + 4 * (at + h) * width)
                intra = f32(a[Scan.intra] + 4 * ((chunk * heads + h) * size + t) * width)
                for p in range(width):
                    y[p] = y[p] * factor + intra[p] + skip * u[p]


@loops
def open_back(a: Any) -> Any:
    """The gradient of y as the products need it: times what enters, and by heads."""
    thread, threads = whose(a[Scan.number], a[Scan.team])
    size, heads, width = a[Scan.size], a[Scan.heads], a[Scan.width]
    first, last = share_of(a[Scan.rows] * a[Scan.chunks], thread, threads, 1)
    for chunk in range(first, last):
        for t in range(size):
            at = (chunk * size + t) * heads
            for h in range(heads):
                factor = f32(a[Scan.entering])[at + h]
                dy, scaled = f32(a[Scan.dy] + 4 * (at + h) * width), f32(a[Scan.scaled] + 4 * (at + h) * width)
                by_head = f32(a[Scan.heads_first] + 4 * ((chunk * heads + h) * size + t) * width)
                for p in range(width):
                    scaled[p] = dy[p] * factor
                    by_head[p] = dy[p]


@loops
def close_back(a: Any) -> Any:
    """The gradient of x, from `kept` (through the state) and `intra` (inside chunks), and those of its factors."""
    thread, threads = whose(a[Scan.number], a[Scan.team])
    size, heads, width = a[Scan.size], a[Scan.heads], a[Scan.width]
    first, last = share_of(a[Scan.rows] * a[Scan.chunks], thread, threads, 1)
    for chunk in range(first, last):
        for t in range(size):
            x, at = _x(a, chunk, t), (chunk * size + t) * heads
            for h in range(heads):
                weight = float32(1) if a[Scan.weight] == 0 else f32(a[Scan.weight])[at + h]
                skip = float32(0) if a[Scan.skip] == 0 else f32(a[Scan.skip])[h]
                left, here = f32(a[Scan.leaving])[at + h], 4 * (at + h) * width
                u, dy, dx = f32(x + 4 * h * width), f32(a[Scan.dy] + here), f32(a[Scan.dx] + here)
                through, inter, scaled = f32(a[Scan.kept] + here), f32(a[Scan.inter] + here), f32(a[Scan.scaled] + here)
                inside = f32(a[Scan.intra] + 4 * ((chunk * heads + h) * size + t) * width)
                leaving, entering, written, skipped = float32(0), float32(0), float32(0), float32(0)
                for p in range(width):
                    past = through[p] * left
                    d = past + inside[p]
                    leaving += past * u[p]
                    entering += inter[p] * scaled[p]
                    written += d * u[p]
                    skipped += dy[p] * u[p]
                    dx[p] = d * weight + skip * dy[p]
                f32(a[Scan.d_leaving])[at + h] = leaving * weight
                f32(a[Scan.d_entering])[at + h] = entering
                f32(a[Scan.d_weight])[at + h] = written
                f32(a[Scan.d_skip])[at + h] = skipped
