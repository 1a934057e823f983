"""What happens to each token by itself, forward and backward: a norm over its channels, its query and key."""

from __future__ import annotations

from typing import Any

from megalodon.ops.compiled.rows import clear, head_factor, rms_norm, share_of, softmax, whose
from megalodon.ops.compiled.tables import PART, CausalSoftmax, Queries, RootMeanSquare
from megalodon.ops.compiled.vectors import f32, f64, float32, loops


@loops
def norm_forward(a: Any) -> Any:
    """y and the factors, on every thread of the pool: `a` int64, laid out as `RootMeanSquare`."""
    thread, threads = whose(a[RootMeanSquare.number], a[RootMeanSquare.team])
    first, last = share_of(a[RootMeanSquare.rows], thread, threads, 1)
    D, eps = a[RootMeanSquare.dim], f64(a[RootMeanSquare.eps])[0]
    for row in range(first, last):
        x = a[RootMeanSquare.x] + 4 * row * D
        f32(a[RootMeanSquare.factors])[row] = head_factor(x, D, eps)
        rms_norm(x, D, a[RootMeanSquare.weight], eps, a[RootMeanSquare.y] + 4 * row * D)


@loops
def norm_backward(a: Any) -> Any:
    """The gradients of x, and the parts of that of the scale."""
    thread, threads = whose(a[RootMeanSquare.number], a[RootMeanSquare.team])
    rows, D = a[RootMeanSquare.rows], a[RootMeanSquare.dim]
    first, last = share_of((rows + PART - 1) // PART, thread, threads, 1)
    w, factors = f32(a[RootMeanSquare.weight]), f32(a[RootMeanSquare.factors])
    for part in range(first, last):
        sums = a[RootMeanSquare.sums] + 4 * part * D
        clear(sums, D)
        d_w = f32(sums)
        for row in range(part * PART, min((part + 1) * PART, rows)):
            at = 4 * row * D
            u, dy, dx = f32(a[RootMeanSquare.x] + at), f32(a[RootMeanSquare.dy] + at), f32(a[RootMeanSquare.y] + at)
            factor, product = factors[row], float32(0)
            for i in range(D):
                product += dy[i] * w[i] * u[i]
                d_w[i] = d_w[i] + dy[i] * u[i] * factor
            slope = product * factor * factor * factor / float32(D)
            for i in range(D):
                dx[i] = dy[i] * w[i] * factor - slope * u[i]


@loops
def _turn(x: Any, d: Any, factor: Any, scale: Any, bias: Any, turns: Any, out: Any) -> Any:
    """`x * factor * scale + bias` in pairs, turned: all [d], turns complex [d / 2]."""
    u, s, b, t, o = f32(x), f32(scale), f32(bias), f32(turns), f32(out)
    for i in range(d // 2):
        even = u[2 * i] * factor * s[2 * i] + b[2 * i]
        odd = u[2 * i + 1] * factor * s[2 * i + 1] + b[2 * i + 1]
        o[2 * i] = even * t[2 * i] - odd * t[2 * i + 1]
        o[2 * i + 1] = even * t[2 * i + 1] + odd * t[2 * i]


@loops
def _turn_back(
    x: Any, d: Any, factor: Any, scale: Any, turns: Any, grad: Any, d_scale: Any, d_bias: Any, dz: Any, begins: Any,
    space: Any,
) -> Any:  # fmt: skip
    """The gradient of the normalised x is added to dz, or begins it; those of scale and bias are added to.

    space [d] is worked in: loops over few addresses get vectors.
    """
    u, s, t, g, turned = f32(x), f32(scale), f32(turns), f32(grad), f32(space)
    d_s, d_b, total = f32(d_scale), f32(d_bias), f32(dz)
    for i in range(d // 2):
        turned[2 * i] = g[2 * i] * t[2 * i] + g[2 * i + 1] * t[2 * i + 1]
        turned[2 * i + 1] = g[2 * i + 1] * t[2 * i] - g[2 * i] * t[2 * i + 1]
    for i in range(d):
        d_b[i] = d_b[i] + turned[i]
    for i in range(d):
        d_s[i] = d_s[i] + turned[i] * u[i] * factor
    if begins:
        for i in range(d):
            total[i] = turned[i] * s[i]
    else:
        for i in range(d):
            total[i] = total[i] + turned[i] * s[i]


@loops
def queries_forward(a: Any) -> Any:
    """q and k, on every thread of the pool: `a` int64, laid out as `Queries`."""
    thread, threads = whose(a[Queries.number], a[Queries.team])
    first, last = share_of(a[Queries.rows], thread, threads, 1)
    H, d, eps = a[Queries.heads], a[Queries.head_dim], f64(a[Queries.eps])[0]
    for row in range(first, last):
        turns = a[Queries.turns] + 4 * (row % a[Queries.places]) * d
        for head in range(H):
            at, own = 4 * (row * H + head) * d, 4 * head * d
            factor = head_factor(a[Queries.z] + at, d, eps)
            scale, bias = a[Queries.scale] + own, a[Queries.bias] + own
            _turn(a[Queries.z] + at, d, factor, scale, bias, turns, a[Queries.q] + at)
            _turn(a[Queries.z] + at, d, factor, scale + 4 * H * d, bias + 4 * H * d, turns, a[Queries.k] + at)


@loops
def queries_backward(a: Any) -> Any:
    """The gradient of z, and the parts of those of scale and bias."""
    thread, threads = whose(a[Queries.number], a[Queries.team])
    rows, H, d, eps = a[Queries.rows], a[Queries.heads], a[Queries.head_dim], f64(a[Queries.eps])[0]
    first, last = share_of((rows + PART - 1) // PART, thread, threads, 1)
    size = H * d
    for part in range(first, last):
        sums = a[Queries.sums] + 4 * part * 5 * size
        space = sums + 16 * size
        clear(sums, 4 * size)
        for row in range(part * PART, min((part + 1) * PART, rows)):
            turns = a[Queries.turns] + 4 * (row % a[Queries.places]) * d
            for head in range(H):
                at, own = 4 * (row * H + head) * d, 4 * head * d
                z, dz = a[Queries.z] + at, a[Queries.dz] + at
                factor = head_factor(z, d, eps)
                scale, d_scale = a[Queries.scale] + own, sums + own
                d_bias = d_scale + 8 * size
                _turn_back(z, d, factor, scale, turns, a[Queries.q] + at, d_scale, d_bias, dz, True, space)
                _turn_back(
                    z, d, factor, scale + 4 * size, turns, a[Queries.k] + at, d_scale + 4 * size, d_bias + 4 * size,
                    dz, False, space,
                )  # fmt: skip
                u, g, product = f32(z), f32(dz), float32(0)
                for i in range(d):
                    product += g[i] * u[i]
                slope = product * factor * factor * factor / float32(d)
                for i in range(d):
                    g[i] = g[i] * factor - slope * u[i]


@loops
def causal_softmax(a: Any) -> Any:
    """The softmax of each row over the keys it sees, in place; zeros behind them. Laid out as `CausalSoftmax`."""
    thread, threads = whose(a[CausalSoftmax.number], a[CausalSoftmax.team])
    rows, K = a[CausalSoftmax.queries], a[CausalSoftmax.keys]
    first, last = share_of(a[CausalSoftmax.matrices] * rows, thread, threads, 1)
    for row in range(first, last):
        x = a[CausalSoftmax.scores] + 4 * row * K
        seen = min(a[CausalSoftmax.seen] + row % rows, K)
        softmax(x, seen)
        clear(x + 4 * seen, K - seen)
