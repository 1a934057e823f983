"""A token of each of several sequences through all of Gecko's blocks, as one kernel for all threads.

As `step`, whose parts it shares: a norm that decays, attention over two chunks, and the working memory are its own.
"""

from __future__ import annotations

from typing import Any

from megalodon.ops.compiled.rows import (
    COLUMNS,
    decaying_norm,
    gate,
    head_factor,
    layer_norm,
    moving_average,
    rms_norm,
    scores,
    share_of,
    softmax,
    stored,
    turned,
    weighted_values,
    whose,
)
from megalodon.ops.compiled.step import add, feed_forward, linear, project, wait, weigh
from megalodon.ops.compiled.tables import FLOAT32, Call, Weights
from megalodon.ops.compiled.tables import GeckoMemory as Memory
from megalodon.ops.compiled.vectors import WIDTH, f32, f64, i64, loops, silu


@loops
def _normalise(a: Any, w: Any, s: Any, row: Any, first: Any, last: Any, out: Any) -> Any:
    """TimestepDecayNorm of groups `first` to `last` of a row of x -> out, [M, D]."""
    D, G, slot = a[Call.model_dim], a[Call.groups], i64(a[Call.slots])[row]
    at, moments = 4 * row * D, 8 * slot * G
    for group in range(first, last):
        decaying_norm(
            a[Call.x] + at, D // G, a[Call.betas], a[Call.corrections] + 16 * row, s[Memory.mean_in] + moments,
            s[Memory.var_in] + moments, s[Memory.mean_out] + moments, s[Memory.var_out] + moments,
            f64(a[Call.eps])[0], w[Weights.norm_scale], w[Weights.norm_bias], out + at, group,
        )  # fmt: skip


@loops
def _average(a: Any, w: Any, s: Any, thread: Any, threads: Any, n: Any, m: Any) -> Any:
    """The norm and CEMA of this thread's groups: x -> n and the long memory m, [M, D]."""
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
def _remember(a: Any, w: Any, s: Any, thread: Any, threads: Any, z: Any, v: Any, q: Any, before: Any, ask: Any) -> Any:
    """Of this thread's heads: queries q, those for the chunk before, and the memory's addresses, [M, Z] each.

    Keys (attention's, then the memory's) and values go to the open chunk.
    """
    H, Z, V, kind = a[Call.heads], a[Call.z_dim], a[Call.value_dim], a[Call.key_kind]
    d, e, size = Z // H, V // H, 4 if kind == FLOAT32 else 2
    first, last = share_of(a[Call.rows] * H, thread, threads, 1)
    for task in range(first, last):
        row, head = task // H, task % H
        slot, offset = i64(a[Call.slots])[row], i64(a[Call.offsets])[row]
        key = s[Memory.keys] + size * (
            slot * s[Memory.key_row] + offset * s[Memory.key_place] + head * s[Memory.key_head]
        )
        at, own, other = 4 * (row * Z + head * d), a[Call.turns] + 4 * offset * d, a[Call.turns_before] + 4 * offset * d
        if head >= a[Call.rotated_heads]:
            own, other = 0, 0
        u, scale, bias, line = z + at, w[Weights.qk_scale] + 4 * head * d, w[Weights.qk_bias] + 4 * head * d, 4 * Z
        factor = head_factor(u, d, f64(a[Call.eps])[2])
        turned(u, d, factor, scale, bias, own, q + at, FLOAT32)
        turned(u, d, factor, scale, bias, other, before + at, FLOAT32)
        turned(u, d, factor, scale + line, bias + line, own, key, kind)
        turned(u, d, factor, scale + 2 * line, bias + 2 * line, 0, ask + at, FLOAT32)
        turned(u, d, factor, scale + 3 * line, bias + 3 * line, 0, key + size * d, kind)
        softmax(ask + at, d)
        value = s[Memory.values] + size * (
            slot * s[Memory.value_row] + offset * s[Memory.value_place] + head * s[Memory.value_head]
        )
        x = f32(v + 4 * (row * V + head * e))
        for i in range(e):
            stored(silu(x[i]), value, i, kind)


@loops
def _score(a: Any, s: Any, thread: Any, threads: Any, q: Any, before: Any, found: Any) -> Any:
    """This thread's share of the keys of every row and head, those before first: scores [M, H, capacity]."""
    H, Z, kind, W = a[Call.heads], a[Call.z_dim], a[Call.key_kind], a[Call.before]
    d, size, rows = Z // H, 4 if kind == FLOAT32 else 2, a[Call.rows]
    parts = threads if rows * H < 4 * threads else 1  # few: all threads share the keys of each
    first, last = share_of(rows * H * parts, thread, threads, 1)
    for task in range(first, last):
        row, head = task // parts // H, task // parts % H
        slot, at, out = (
            i64(a[Call.slots])[row],
            4 * (row * Z + head * d),
            found + 4 * (row * H + head) * a[Call.capacity],
        )
        begin, end = share_of(W, task % parts, parts, 4)
        keys = s[Memory.before_keys] + size * (slot * s[Memory.before_key_row] + head * s[Memory.before_key_head])
        scores(before + at, d, keys, s[Memory.before_key_place], kind, begin, end, out)
        begin, end = share_of(i64(a[Call.offsets])[row] + 1, task % parts, parts, 4)
        keys = s[Memory.keys] + size * (slot * s[Memory.key_row] + head * s[Memory.key_head])
        scores(q + at, d, keys, s[Memory.key_place], kind, begin, end, out + 4 * W)


@loops
def _sum_into(x: Any, first: Any, last: Any, out: Any) -> Any:
    """`out[first:last] += x[first:last]`."""
    u, o = f32(x), f32(out)
    for i in range(first, last):
        o[i] = o[i] + u[i]


@loops
def _attend(
    a: Any, s: Any, thread: Any, threads: Any, found: Any, ask: Any, r: Any, o: Any, more: Any, out: Any
) -> Any:
    """This thread's share of what attention finds, let through by silu(r), and of what the memory answers: [M, V]."""
    H, Z, V, kind, W = a[Call.heads], a[Call.z_dim], a[Call.value_dim], a[Call.key_kind], a[Call.before]
    d, e, size, rows = Z // H, V // H, 4 if kind == FLOAT32 else 2, a[Call.rows]
    parts = threads if rows * H < 4 * threads else 1
    first, last = share_of(rows * H * parts, thread, threads, 1)
    for task in range(first, last):
        row, head = task // parts // H, task // parts % H
        slot = i64(a[Call.slots])[row]
        weights, at = found + 4 * (row * H + head) * a[Call.capacity], 4 * (row * V + head * e)
        begin, end = share_of(e, task % parts, parts, WIDTH)
        values = s[Memory.values] + size * (slot * s[Memory.value_row] + head * s[Memory.value_head])
        own = i64(a[Call.offsets])[row] + 1
        weighted_values(weights + 4 * W, own, values, s[Memory.value_place], kind, begin, end, o + at)
        if W > 0:
            values = slot * s[Memory.before_value_row] + head * s[Memory.before_value_head]
            values = s[Memory.before_values] + size * values
            weighted_values(weights, W, values, s[Memory.before_value_place], kind, begin, end, more + at)
            _sum_into(more + at, begin, end, o + at)
        gate(r + at, o + at, begin, end, out + at)
        if a[Call.reads] != 0:
            matrix = s[Memory.matrix] + 4 * (slot * H + head) * d * e
            weighted_values(ask + 4 * (row * Z + head * d), d, matrix, e, FLOAT32, begin, end, more + at)
            _sum_into(more + at, begin, end, out + at)


@loops
def _block(a: Any, w: Any, s: Any, thread: Any, threads: Any) -> Any:
    M, D, Z, V, F = a[Call.rows], a[Call.model_dim], a[Call.z_dim], a[Call.value_dim], a[Call.ffn_dim]
    x = a[Call.x]
    n = a[Call.scratch]
    m, h, y, out = n + 4 * M * D, n + 8 * M * D, n + 12 * M * D, n + 16 * M * D
    z = n + 20 * M * D
    q, before, ask, v = z + 4 * M * Z, z + 8 * M * Z, z + 12 * M * Z, z + 16 * M * Z
    r, o, more, gated = v + 4 * M * V, v + 8 * M * V, v + 12 * M * V, v + 16 * M * V
    up = v + 24 * M * V
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
    _remember(a, w, s, thread, threads, z, v, q, before, ask)
    wait(a)
    _score(a, s, thread, threads, q, before, found)
    wait(a)
    weigh(a, thread, threads, found)
    wait(a)
    _attend(a, s, thread, threads, found, ask, r, o, more, gated)
    wait(a)
    linear(a, w, Weights.o, gated, V, D, first, last, y)
    add(a, first, last, y, h, 0)
    add(a, first, last, y, x, 0)
    wait(a)
    for row in range(first_row, last_row):
        at = 4 * row * D
        layer_norm(y + at, D, w[Weights.ffn_scale], w[Weights.ffn_bias], f64(a[Call.eps])[3], n + at)
    if a[Call.two_hop] == 0:  # the second residual adds y
        for row in range(M):
            u, t = f32(x + 4 * row * D), f32(y + 4 * row * D)
            for i in range(first, last):
                u[i] = t[i]
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
