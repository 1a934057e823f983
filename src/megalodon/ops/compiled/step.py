"""A token of each of several sequences through all blocks, as one kernel for all threads.

Between two barriers every thread has its part: of channels, of a matrix's columns, of keys or of rows. The tables that
the kernel reads are laid out in `tables`: int64 numbers, most of them addresses.
"""

from __future__ import annotations

from typing import Any

from megalodon.ops.compiled.rows import (
    COLUMNS,
    gate,
    gelu,
    layer_norm,
    moving_average,
    product,
    query_and_key,
    rms_norm,
    running_norm,
    scores,
    share_of,
    softmax,
    stored,
    weighted_values,
    whose,
)
from megalodon.ops.compiled.tables import FLOAT32, Call, Memory, Product, Weights
from megalodon.ops.compiled.vectors import WIDTH, call, f32, f64, i64, loops, silu


@loops
def linear(a: Any, w: Any, at: Any, x: Any, inputs: Any, width: Any, first: Any, last: Any, out: Any) -> Any:
    """Columns `first` to `last` of the product whose weights stand at `w[at]`."""
    product(x, a[Call.rows], inputs, w[at], a[Call.weight_kind], w[at + 1], w[at + 2], first, last, out, width)


@loops
def _normalise(a: Any, w: Any, s: Any, row: Any, first: Any, last: Any, out: Any) -> Any:
    """TimestepNorm of groups `first` to `last` of a row of x -> out, [M, D]."""
    D, G, slot = a[Call.model_dim], a[Call.groups], i64(a[Call.slots])[row]
    at, moments = 4 * row * D, 8 * slot * G
    for group in range(first, last):
        running_norm(
            a[Call.x] + at, D // G, f64(a[Call.share])[row], s[Memory.mean_in] + moments, s[Memory.var_in] + moments,
            s[Memory.mean_out] + moments, s[Memory.var_out] + moments, f64(a[Call.eps])[0], w[Weights.norm_scale],
            w[Weights.norm_bias], out + at, group,
        )  # fmt: skip


@loops
def _average(a: Any, w: Any, s: Any, thread: Any, threads: Any, n: Any, m: Any) -> Any:
    """TimestepNorm and CEMA of this thread's groups: x -> n and the long memory m, [M, D]."""
    D, G, N = a[Call.model_dim], a[Call.groups], a[Call.components]
    size = D // G
    first, last = share_of(G, thread, threads, 1)
    for row in range(a[Call.rows]):
        h = 8 * i64(a[Call.slots])[row] * D * N
        _normalise(a, w, s, row, first, last, n)
        moving_average(
            n + 4 * row * D, N, first * size, last * size, w[Weights.q], w[Weights.p], w[Weights.gamma],
            w[Weights.omega], s[Memory.h_in] + h, s[Memory.h_out] + h, m + 4 * row * D,
        )  # fmt: skip


@loops
def project(a: Any, w: Any, thread: Any, threads: Any, n: Any, m: Any, z: Any, v: Any, r: Any, h: Any) -> Any:
    """This thread's columns of z, r, h from m and of v from n, which are one row of columns cut evenly."""
    D, Z, V = a[Call.model_dim], a[Call.z_dim], a[Call.value_dim]
    first, last = share_of(Z + 2 * V + D, thread, threads, COLUMNS)
    linear(a, w, Weights.z, m, D, Z, min(first, Z), min(last, Z), z)
    first, last = max(first - Z, 0), max(last - Z, 0)
    linear(a, w, Weights.v, n, D, V, min(first, V), min(last, V), v)
    first, last = max(first - V, 0), max(last - V, 0)
    linear(a, w, Weights.r, m, D, V, min(first, V), min(last, V), r)
    first, last = max(first - V, 0), max(last - V, 0)
    linear(a, w, Weights.h, m, D, D, min(first, D), min(last, D), h)


@loops
def _remember(a: Any, w: Any, s: Any, thread: Any, threads: Any, z: Any, v: Any, q: Any) -> Any:
    """Queries [M, Z] of this thread's heads; their keys and values go to the open chunk."""
    H, Z, V, kind = a[Call.heads], a[Call.z_dim], a[Call.value_dim], a[Call.key_kind]
    d, e, size = Z // H, V // H, 4 if kind == FLOAT32 else 2
    first, last = share_of(a[Call.rows] * H, thread, threads, 1)
    for task in range(first, last):
        row, head = task // H, task % H
        slot, offset = i64(a[Call.slots])[row], i64(a[Call.offsets])[row]
        key = slot * s[Memory.key_row] + offset * s[Memory.key_place] + head * s[Memory.key_head]
        query_and_key(
            z + 4 * (row * Z + head * d), d, f64(a[Call.eps])[2], w[Weights.qk_scale] + 4 * head * d,
            w[Weights.qk_bias] + 4 * head * d, Z, a[Call.turns] + 4 * offset * d, q + 4 * (row * Z + head * d),
            s[Memory.keys] + size * key, kind,
        )  # fmt: skip
        value = s[Memory.values] + size * (
            slot * s[Memory.value_row] + offset * s[Memory.value_place] + head * s[Memory.value_head]
        )
        u = f32(v + 4 * (row * V + head * e))
        for i in range(e):
            stored(silu(u[i]), value, i, kind)


@loops
def _score(a: Any, s: Any, thread: Any, threads: Any, q: Any, found: Any) -> Any:
    """This thread's share of the keys of every row and head: scores [M, H, capacity]."""
    H, Z, kind = a[Call.heads], a[Call.z_dim], a[Call.key_kind]
    d, size, rows = Z // H, 4 if kind == FLOAT32 else 2, a[Call.rows]
    parts = threads if rows * H < 4 * threads else 1  # few: all threads share the keys of each
    first, last = share_of(rows * H * parts, thread, threads, 1)
    for task in range(first, last):
        row, head = task // parts // H, task // parts % H
        keys = i64(a[Call.slots])[row] * s[Memory.key_row] + head * s[Memory.key_head]
        begin, end = share_of(i64(a[Call.offsets])[row] + 1, task % parts, parts, 4)
        scores(
            q + 4 * (row * Z + head * d), d, s[Memory.keys] + size * keys, s[Memory.key_place], kind, begin, end,
            found + 4 * (row * H + head) * a[Call.capacity],
        )  # fmt: skip


@loops
def weigh(a: Any, thread: Any, threads: Any, found: Any) -> Any:
    """The softmax of this thread's rows and heads."""
    H = a[Call.heads]
    first, last = share_of(a[Call.rows] * H, thread, threads, 1)
    for task in range(first, last):
        softmax(found + 4 * task * a[Call.capacity], a[Call.before] + i64(a[Call.offsets])[task // H] + 1)


@loops
def _attend(a: Any, s: Any, thread: Any, threads: Any, found: Any, r: Any, o: Any, out: Any) -> Any:
    """This thread's share of what attention finds, o [M, V], and of what silu(r) lets through, out [M, V]."""
    H, V, kind = a[Call.heads], a[Call.value_dim], a[Call.key_kind]
    e, size, rows = V // H, 4 if kind == FLOAT32 else 2, a[Call.rows]
    parts = threads if rows * H < 4 * threads else 1
    first, last = share_of(rows * H * parts, thread, threads, 1)
    for task in range(first, last):
        row, head = task // parts // H, task // parts % H
        values = i64(a[Call.slots])[row] * s[Memory.value_row] + head * s[Memory.value_head]
        begin, end = share_of(e, task % parts, parts, WIDTH)
        at = 4 * (row * V + head * e)
        weighted_values(
            found + 4 * (row * H + head) * a[Call.capacity], i64(a[Call.offsets])[row] + 1,
            s[Memory.values] + size * values, s[Memory.value_place], kind, begin, end, o + at,
        )  # fmt: skip
        gate(r + at, o + at, begin, end, out + at)


@loops
def add(a: Any, first: Any, last: Any, x: Any, y: Any, alpha: Any) -> Any:
    """`x[:, first:last] += y * alpha`, [M, D] both; alpha [D] or the address 0."""
    D = a[Call.model_dim]
    for row in range(a[Call.rows]):
        u, v = f32(x + 4 * row * D), f32(y + 4 * row * D)
        if alpha == 0:
            for i in range(first, last):
                u[i] = u[i] + v[i]
        else:
            factor = f32(alpha)
            for i in range(first, last):
                u[i] = u[i] + v[i] * factor[i]


@loops
def wait(a: Any) -> Any:
    """For the other threads."""
    if a[Call.barrier] != 0:
        call(a[Call.barrier])


@loops
def feed_forward(a: Any, w: Any, thread: Any, threads: Any, n: Any, up: Any, side: Any, hidden: Any, out: Any) -> Any:
    """The block's second branch, of the normalised n [M, D]: x gets it added. up, side, hidden [M, F]; out [M, D]."""
    M, D, F, x = a[Call.rows], a[Call.model_dim], a[Call.ffn_dim], a[Call.x]
    first, last = share_of(D, thread, threads, COLUMNS)
    begin, end = share_of(F, thread, threads, COLUMNS)
    linear(a, w, Weights.up, n, D, F, begin, end, up)
    swiglu = w[Weights.gate] != 0
    if swiglu:
        linear(a, w, Weights.gate, n, D, F, begin, end, side)
    for row in range(M):
        at = 4 * row * F
        if a[Call.gelu] != 0:
            gelu(up + at, begin, end, hidden + at)
        else:
            gate(up + at, side + at if swiglu else 0, begin, end, hidden + at)
    wait(a)
    linear(a, w, Weights.down, hidden, F, D, first, last, out)
    add(a, first, last, x, out, w[Weights.alpha])
    wait(a)


@loops
def _block(a: Any, w: Any, s: Any, thread: Any, threads: Any) -> Any:
    M, D, Z, V, F = a[Call.rows], a[Call.model_dim], a[Call.z_dim], a[Call.value_dim], a[Call.ffn_dim]
    x = a[Call.x]
    n = a[Call.scratch]
    m, h, y, out = n + 4 * M * D, n + 8 * M * D, n + 12 * M * D, n + 16 * M * D
    z = n + 20 * M * D
    q, v = z + 4 * M * Z, z + 8 * M * Z
    r, o, gated = v + 4 * M * V, v + 8 * M * V, v + 12 * M * V
    up = v + 16 * M * V
    side, hidden = up + 4 * M * F, up + 8 * M * F
    found = up + 12 * M * F
    first_row, last_row = share_of(M, thread, threads, 1)
    first, last = share_of(D, thread, threads, COLUMNS)

    _average(a, w, s, thread, threads, n, y)
    wait(a)
    for row in range(first_row, last_row):
        rms_norm(y + 4 * row * D, D, w[Weights.memory_scale], f64(a[Call.eps])[1], m + 4 * row * D)
    wait(a)
    project(a, w, thread, threads, n, m, z, v, r, h)
    wait(a)
    _remember(a, w, s, thread, threads, z, v, q)
    wait(a)
    _score(a, s, thread, threads, q, found)
    wait(a)
    weigh(a, thread, threads, found)
    wait(a)
    _attend(a, s, thread, threads, found, r, o, gated)
    wait(a)
    linear(a, w, Weights.o, gated, V, D, first, last, y)
    add(a, first, last, y, h, 0)
    add(a, first, last, y, x, 0)
    wait(a)
    for row in range(first_row, last_row):
        at = 4 * row * D
        layer_norm(y + at, D, w[Weights.ffn_scale], w[Weights.ffn_bias], f64(a[Call.eps])[3], n + at)
    wait(a)
    feed_forward(a, w, thread, threads, n, up, side, hidden, out)


@loops
def blocks(a: Any) -> Any:
    """All blocks, on every thread of the pool: `a` int64, laid out as `Call`."""
    thread, threads = whose(a[Call.number], a[Call.team])
    for layer in range(a[Call.layers] + 1):
        w = i64(a[Call.weights] + 8 * layer * len(Weights))
        s = i64(a[Call.memory] + 8 * layer * len(Memory))
        if layer < a[Call.layers]:
            _block(a, w, s, thread, threads)
        else:
            first, last = share_of(a[Call.groups], thread, threads, 1)
            for row in range(a[Call.rows]):
                _normalise(a, w, s, row, first, last, a[Call.out])


@loops
def matrix(a: Any) -> Any:
    """One product, on every thread of the pool: `a` int64, laid out as `Product`."""
    thread, threads = whose(a[Product.number], a[Product.team])
    first, last = share_of(a[Product.width], thread, threads, COLUMNS)
    product(
        a[Product.x], a[Product.rows], a[Product.inputs], a[Product.weight], a[Product.kind], a[Product.scale],
        a[Product.bias], first, last, a[Product.out], a[Product.width],
    )  # fmt: skip
