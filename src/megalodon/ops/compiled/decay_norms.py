"""TimestepDecayNorm of whole texts, forward and backward: each token once, its group's statistics in registers' reach.

The averages run in float64 and are corrected token by token, so that neither rounds away what a token adds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megalodon.ops.compiled.norms import mean_of
from megalodon.ops.compiled.rows import share_of, whose
from megalodon.ops.compiled.tables import DecayNorm
from megalodon.ops.compiled.vectors import f32, f64, float32, loops, u8


@loops
def forward(a: Any) -> Any:
    """y and the statistics, on every thread of the pool: `a` int64, laid out as `DecayNorm`."""
    thread, threads = whose(a[DecayNorm.number], a[DecayNorm.team])
    L, D, G = a[DecayNorm.length], a[DecayNorm.dim], a[DecayNorm.groups]
    size, eps, beta = D // G, f64(a[DecayNorm.eps])[0], f64(a[DecayNorm.betas])
    first, last = share_of(a[DecayNorm.rows] * G, thread, threads, 1)
    for row in range(first // G, (last + G - 1) // G):
        begin, end = max(first - row * G, 0), min(last - row * G, G)
        mean, var = f64(a[DecayNorm.mean] + 8 * row * G), f64(a[DecayNorm.var] + 8 * row * G)
        for t in range(L):
            at = row * L + t
            restart, real = u8(a[DecayNorm.restart])[at] != 0, u8(a[DecayNorm.real])[at] != 0
            correction = f64(a[DecayNorm.corrections] + 16 * at)
            centres, scales = f32(a[DecayNorm.centres] + 4 * at * G), f32(a[DecayNorm.scales] + 4 * at * G)
            for g in range(begin, end):
                if restart:
                    mean[g] = var[g] = 0.0
                here = 4 * (at * D + g * size)
                u, y = f32(a[DecayNorm.x] + here), f32(a[DecayNorm.y] + here)
                if real:
                    m = mean_of(u, size)
                    total = float32(0)
                    for i in range(size):
                        total += (u[i] - m) * (u[i] - m)
                    mean[g] = beta[0] * mean[g] + (1.0 - beta[0]) * m
                    var[g] = beta[1] * var[g] + (1.0 - beta[1]) * (total / float32(size))
                    centre = float32(mean[g] * correction[0])
                    scale = float32(1.0 / np.sqrt(var[g] * correction[1] + eps))
                    centres[g], scales[g] = centre, scale
                    w, b = f32(a[DecayNorm.weight] + 4 * g * size), f32(a[DecayNorm.bias] + 4 * g * size)
                    for i in range(size):
                        y[i] = (u[i] - centre) * scale * w[i] + b[i]
                else:
                    for i in range(size):
                        y[i] = 0.0


@loops
def backward(a: Any) -> Any:
    """All gradients, on every thread of the pool: `mean` and `var` hold the gradients of the last statistics, and are
    turned into those of the first."""
    thread, threads = whose(a[DecayNorm.number], a[DecayNorm.team])
    L, D, G = a[DecayNorm.length], a[DecayNorm.dim], a[DecayNorm.groups]
    size, beta = D // G, f64(a[DecayNorm.betas])
    first, last = share_of(a[DecayNorm.rows] * G, thread, threads, 1)
    for row in range(first // G, (last + G - 1) // G):
        begin, end = max(first - row * G, 0), min(last - row * G, G)
        d_mean, d_var = f64(a[DecayNorm.mean] + 8 * row * G), f64(a[DecayNorm.var] + 8 * row * G)
        for t in range(L - 1, -1, -1):
            at = row * L + t
            restart, real = u8(a[DecayNorm.restart])[at] != 0, u8(a[DecayNorm.real])[at] != 0
            correction = f64(a[DecayNorm.corrections] + 16 * at)
            centres, scales = f32(a[DecayNorm.centres] + 4 * at * G), f32(a[DecayNorm.scales] + 4 * at * G)
            for g in range(begin, end):
                here, own = 4 * (at * D + g * size), 4 * (row * D + g * size)
                u, dy, dx = f32(a[DecayNorm.x] + here), f32(a[DecayNorm.dy] + here), f32(a[DecayNorm.y] + here)
                if real:
                    w = f32(a[DecayNorm.weight] + 4 * g * size)
                    d_w, d_b = f32(a[DecayNorm.d_weight] + own), f32(a[DecayNorm.d_bias] + own)
                    centre, scale, m = centres[g], scales[g], mean_of(u, size)
                    total, product = float32(0), float32(0)
                    for i in range(size):
                        weighted = dy[i] * w[i]
                        total += weighted
                        product += weighted * (u[i] - centre)
                        d_w[i] = d_w[i] + dy[i] * (u[i] - centre) * scale
                        d_b[i] = d_b[i] + dy[i]
                    to_mean = d_mean[g] - scale * total * correction[0]
                    to_var = d_var[g] - 0.5 * scale * scale * scale * product * correction[1]
                    d_mean[g], d_var[g] = beta[0] * to_mean, beta[1] * to_var
                    constant = float32((1.0 - beta[0]) * to_mean / size)
                    slope = float32(2.0 * (1.0 - beta[1]) * to_var / size)
                    for i in range(size):
                        dx[i] = dy[i] * w[i] * scale + constant + slope * (u[i] - m)
                else:
                    for i in range(size):
                        dx[i] = 0.0
                if restart:
                    d_mean[g] = d_var[g] = 0.0
