"""TimestepNorm of whole texts, forward and backward: each token once, its group's statistics in registers' reach."""

from __future__ import annotations

from typing import Any

import numpy as np

from megalodon.ops.compiled.rows import share_of, whose
from megalodon.ops.compiled.tables import Norm
from megalodon.ops.compiled.vectors import f32, f64, float32, i64, loops, u8


@loops
def mean_of(u: Any, size: Any) -> Any:
    """Of float32 numbers."""
    total = float32(0)
    for i in range(size):
        total += u[i]
    return total / float32(size)


@loops
def forward(a: Any) -> Any:
    """y and the statistics, on every thread of the pool: `a` int64, laid out as `Norm`."""
    thread, threads = whose(a[Norm.number], a[Norm.team])
    L, D, G = a[Norm.length], a[Norm.dim], a[Norm.groups]
    size, eps = D // G, f64(a[Norm.eps])[0]
    first, last = share_of(a[Norm.rows] * G, thread, threads, 1)
    prior_mean, prior_var = f64(a[Norm.prior_mean]), f64(a[Norm.prior_var])
    for row in range(first // G, (last + G - 1) // G):
        begin, end = max(first - row * G, 0), min(last - row * G, G)
        mean, var = f64(a[Norm.mean] + 8 * row * G), f64(a[Norm.var] + 8 * row * G)
        for t in range(L):
            at = row * L + t
            fresh, real = u8(a[Norm.fresh])[at] != 0, u8(a[Norm.real])[at] != 0
            share = 1.0 / (i64(a[Norm.before])[at] + 1)
            means, scales = f64(a[Norm.means] + 8 * at * G), f32(a[Norm.scales] + 4 * at * G)
            for g in range(begin, end):
                if fresh:
                    mean[g], var[g] = prior_mean[g], prior_var[g]
                here = 4 * (at * D + g * size)
                u, y = f32(a[Norm.x] + here), f32(a[Norm.y] + here)
                if real:
                    m = mean_of(u, size)
                    total = float32(0)
                    for i in range(size):
                        total += (u[i] - m) * (u[i] - m)
                    step = m - mean[g]
                    spread = var[g] + share * step * step
                    mean[g] = mean[g] + share * step
                    var[g] = spread + share * (total / float32(size) - spread)
                    centre, scale = float32(mean[g]), float32(1.0 / np.sqrt(var[g] + eps))
                    scales[g] = scale
                    w, b = f32(a[Norm.weight] + 4 * g * size), f32(a[Norm.bias] + 4 * g * size)
                    for i in range(size):
                        y[i] = (u[i] - centre) * scale * w[i] + b[i]
                else:
                    for i in range(size):
                        y[i] = 0.0
                means[g] = mean[g]


@loops
def backward(a: Any) -> Any:
    """All gradients, on every thread of the pool: `mean` and `var` hold the gradients of the last statistics, and are
    turned into those of the first."""
    thread, threads = whose(a[Norm.number], a[Norm.team])
    L, D, G = a[Norm.length], a[Norm.dim], a[Norm.groups]
    size = D // G
    first, last = share_of(a[Norm.rows] * G, thread, threads, 1)
    for row in range(first // G, (last + G - 1) // G):
        begin, end = max(first - row * G, 0), min(last - row * G, G)
        d_mean, d_var = f64(a[Norm.mean] + 8 * row * G), f64(a[Norm.var] + 8 * row * G)
        initial = f64(a[Norm.initial] + 8 * row * G)
        prior_mean = f64(a[Norm.prior_mean])
        d_prior_mean, d_prior_var = f64(a[Norm.d_prior_mean] + 8 * row * G), f64(a[Norm.d_prior_var] + 8 * row * G)
        for t in range(L - 1, -1, -1):
            at = row * L + t
            fresh, real = u8(a[Norm.fresh])[at] != 0, u8(a[Norm.real])[at] != 0
            share = 1.0 / (i64(a[Norm.before])[at] + 1)
            means, scales = f64(a[Norm.means] + 8 * at * G), f32(a[Norm.scales] + 4 * at * G)
            for g in range(begin, end):
                here, own = 4 * (at * D + g * size), 4 * (row * D + g * size)
                u, dy, dx = f32(a[Norm.x] + here), f32(a[Norm.dy] + here), f32(a[Norm.y] + here)
                if real:
                    w, d_w, d_b = (
                        f32(a[Norm.weight] + 4 * g * size),
                        f32(a[Norm.d_weight] + own),
                        f32(a[Norm.d_bias] + own),
                    )
                    centre, scale, m = float32(means[g]), scales[g], mean_of(u, size)
                    total, product = float32(0), float32(0)
                    for i in range(size):
                        weighted = dy[i] * w[i]
                        total += weighted
                        product += weighted * (u[i] - centre)
                        d_w[i] = d_w[i] + dy[i] * (u[i] - centre) * scale
                        d_b[i] = d_b[i] + dy[i]
                    before = means[g - G] if t > 0 else initial[g]
                    if fresh:
                        before = prior_mean[g]
                    to_mean = d_mean[g] - scale * total
                    to_var = d_var[g] - 0.5 * scale * scale * scale * product
                    through = 2.0 * (1.0 - share) * share * (m - before) * to_var
                    to_m, to_s = share * to_mean + through, share * to_var
                    d_mean[g] = (1.0 - share) * to_mean - through
                    d_var[g] = (1.0 - share) * to_var
                    constant, slope = float32(to_m / size), float32(2.0 * to_s / size)
                    for i in range(size):
                        dx[i] = dy[i] * w[i] * scale + constant + slope * (u[i] - m)
                else:
                    for i in range(size):
                        dx[i] = 0.0
                if fresh:
                    d_prior_mean[g] = d_prior_mean[g] + d_mean[g]
                    d_prior_var[g] = d_prior_var[g] + d_var[g]
                    d_mean[g] = d_var[g] = 0.0
