"""A token of each of several sequences through the blocks of a kin model, as one kernel for all threads.

As `step`, whose parts it shares. A block's `Weights.mixer` says how it mixes; all of them make queries, keys and values
as Llama does. What is remembered is never changed: a window's places are copied to new ones beside the token's own, and
sums are written anew, which costs little beside reading the weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megalodon.ops.compiled.rows import (
    COLUMNS,
    layer_norm,
    loaded,
    rms_norm,
    scores,
    share_of,
    softmax,
    stored,
    turned_halves,
    weighted_values,
    whose,
)
from megalodon.ops.compiled.step import add, feed_forward, linear, wait
from megalodon.ops.compiled.tables import CHUNKS, FLOAT32, RETENTION, SHARED, SUMS, Call, Weights
from megalodon.ops.compiled.tables import KinMemory as Memory
from megalodon.ops.compiled.vectors import exp, f32, f64, float32, i64, loops

LEAST = np.float32(1e-12)
"""What Hedgehog's features are clamped to from below."""


@loops
def _normalised(a: Any, scale: Any, bias: Any, which: Any, x: Any, out: Any) -> Any:
    """The norm of one row [D]."""
    if a[Call.layer_norms] != 0:
        layer_norm(x, a[Call.model_dim], scale, bias, f64(a[Call.eps])[which], out)
    else:
        rms_norm(x, a[Call.model_dim], scale, f64(a[Call.eps])[which], out)


@loops
def _head_norm(a: Any, w: Any, scale: Any, bias: Any, u: Any, d: Any) -> Any:
    """A head's norm, in place."""
    if w[Weights.head_norm] == 1:
        rms_norm(u, d, scale, f64(a[Call.eps])[2], u)
    elif w[Weights.head_norm] == 2:
        layer_norm(u, d, scale, bias, f64(a[Call.eps])[2], u)


@loops
def _features(u: Any, d: Any, matrix: Any, c: Any, out: Any) -> Any:
    """Hedgehog's [softmax(u M), softmax(-u M)] of u [d] and M [d, c]: out [2c]."""
    weighted_values(u, d, matrix, c, FLOAT32, 0, c, out)
    o = f32(out)
    for i in range(c):
        o[c + i] = -o[i]
    softmax(out, c)
    softmax(out + 4 * c, c)
    for i in range(2 * c):
        o[i] = max(o[i], LEAST)


@loops
def _project(a: Any, w: Any, thread: Any, threads: Any, n: Any, q: Any, k: Any, v: Any) -> Any:
    """This thread's columns of queries, keys and values, which are one row of columns cut evenly."""
    D, Z, U = a[Call.model_dim], a[Call.z_dim], a[Call.value_dim]
    first, last = share_of(Z + 2 * U, thread, threads, COLUMNS)
    linear(a, w, Weights.query, n, D, Z, min(first, Z), min(last, Z), q)
    first, last = max(first - Z, 0), max(last - Z, 0)
    linear(a, w, Weights.key, n, D, U, min(first, U), min(last, U), k)
    first, last = max(first - U, 0), max(last - U, 0)
    linear(a, w, Weights.v, n, D, U, min(first, U), min(last, U), v)


@loops
def _features_of_all(a: Any, w: Any, thread: Any, threads: Any, q: Any, k: Any, all_q: Any, all_k: Any) -> Any:
    """This thread's columns of retention's features, of all heads of a token together."""
    Z, U = a[Call.z_dim], a[Call.value_dim]
    first, last = share_of(Z + U, thread, threads, COLUMNS)
    linear(a, w, Weights.feature_q, q, Z, Z, min(first, Z), min(last, Z), all_q)
    linear(a, w, Weights.feature_k, k, U, U, max(first - Z, 0), max(last - Z, 0), all_k)


@loops
def _retained(a: Any, row: Any, u: Any, d: Any, factor: Any, out: Any) -> Any:
    """A head's features u [d] past relu, turned in place; `factor` times them, out [d]."""
    x, o = f32(u), f32(out)
    for i in range(d):
        x[i] = max(x[i], float32(0))
    turned_halves(u, a[Call.pairs], a[Call.turns] + 8 * row * a[Call.pairs])
    for i in range(d):
        o[i] = x[i] * factor


@loops
def _query(a: Any, w: Any, s: Any, row: Any, u: Any, head: Any, asked: Any) -> Any:
    """A query u [d], in place, and what it asks the sums or the working memory: asked."""
    d, c, mixer = a[Call.z_dim] // a[Call.heads], w[Weights.columns], w[Weights.mixer]
    _head_norm(a, w, w[Weights.head_q_scale], w[Weights.head_q_bias], u, d)
    matrix = w[Weights.map_q] + 4 * head * d * c
    if mixer == CHUNKS and s[Memory.matrix] != 0:
        weighted_values(u, d, matrix, c, FLOAT32, 0, c, asked)
        softmax(asked, c)
    turned_halves(u, a[Call.pairs], a[Call.turns] + 8 * row * a[Call.pairs])
    if mixer >= SHARED:
        _features(u, d, matrix, c, asked)


@loops
def _copied(old: Any, drop: Any, count: Any, step: Any, width: Any, new: Any, kind: Any) -> Any:
    """`count` places of `width` numbers, `step` apart, from place `drop` of the old ones on, to the new ones."""
    for place in range(count):
        at, to = (drop + place) * step, place * step
        for i in range(width):
            stored(loaded(old, at + i, kind), new, to + i, kind)


@loops
def _key(a: Any, w: Any, s: Any, row: Any, u: Any, v: Any, group: Any, offered: Any) -> Any:
    """A key u [d], in place; it, the working memory's and the value v [d] go to the token's place behind the others."""
    U, d, kind = a[Call.value_dim], a[Call.z_dim] // a[Call.heads], a[Call.key_kind]
    G, c, width, size = U // d, w[Weights.columns], s[Memory.width], 4 if a[Call.key_kind] == FLOAT32 else 2
    _head_norm(a, w, w[Weights.head_k_scale], w[Weights.head_k_bias], u, d)
    chunks = w[Weights.mixer] == CHUNKS
    if chunks:
        weighted_values(u, d, w[Weights.map_k] + 4 * group * d * c, c, FLOAT32, 0, c, offered)
    turned_halves(u, a[Call.pairs], a[Call.turns] + 8 * row * a[Call.pairs])
    if s[Memory.keys] == 0:
        return
    keys = s[Memory.keys] + size * (row * s[Memory.room] * G + group) * width
    values = s[Memory.values] + size * (row * s[Memory.room] * G + group) * d
    if s[Memory.old_keys] != 0:
        old, drop = s[Memory.old], s[Memory.dropped]
        key = s[Memory.old_keys] + size * (row * old * G + group) * width
        value = s[Memory.old_values] + size * (row * old * G + group) * d
        _copied(key, drop, old - drop, G * width, width, keys, kind)
        _copied(value, drop, old - drop, G * d, d, values, kind)
    place = s[Memory.places] - 1
    x, y, z = f32(u), f32(v), f32(offered)
    for i in range(d):
        stored(x[i], keys, place * G * width + i, kind)
        stored(y[i], values, place * G * d + i, kind)
    if chunks:
        for i in range(c):
            stored(z[i], keys, place * G * width + d + i, kind)


@loops
def _place(
    a: Any, w: Any, s: Any, thread: Any, threads: Any, q: Any, k: Any, v: Any, asked: Any, offered: Any, all_q: Any,
    all_k: Any,
) -> Any:  # fmt: skip
    """This thread's queries and keys."""
    H, Z, U, most = a[Call.heads], a[Call.z_dim], a[Call.value_dim], a[Call.most_features]
    d = Z // H
    G = U // d
    first, last = share_of(a[Call.rows] * (H + G), thread, threads, 1)
    for task in range(first, last):
        row, head = task // (H + G), task % (H + G)
        if w[Weights.mixer] == RETENTION:
            if head < H:
                ask = asked + 4 * (row * H + head) * most
                _retained(a, row, all_q + 4 * (row * Z + head * d), d, float32(1), ask)
            else:
                offer, factor = offered + 4 * (row * H + head - H) * most, float32(1) / np.sqrt(float32(d))
                _retained(a, row, all_k + 4 * (row * U + (head - H) * d), d, factor, offer)
        elif head < H:
            _query(a, w, s, row, q + 4 * (row * Z + head * d), head, asked + 4 * (row * H + head) * most)
        else:
            at = 4 * (row * U + (head - H) * d)
            _key(a, w, s, row, k + at, v + at, head - H, offered + 4 * (row * H + head - H) * most)


@loops
def _over_places(a: Any, s: Any, row: Any, q: Any, group: Any, found: Any, o: Any, more: Any) -> Any:
    """Softmax of the query q [d] over the places, without its division: o [d]; and what to divide by."""
    d, kind, size = a[Call.z_dim] // a[Call.heads], a[Call.key_kind], 4 if a[Call.key_kind] == FLOAT32 else 2
    G, width, W, P = a[Call.value_dim] // d, s[Memory.width], s[Memory.before], s[Memory.places]
    begin = P - min(i64(a[Call.offsets])[row] + 1, P)  # places that a young row has not filled
    keys = s[Memory.keys] + size * (row * s[Memory.room] * G + group) * width
    scores(q, d, keys, G * width, kind, begin, P, found + 4 * W)
    if W > 0:
        scores(q, d, s[Memory.before_keys] + size * (row * W * G + group) * width, G * width, kind, 0, W, found)
    x, scale, most = f32(found), float32(1) / np.sqrt(float32(d)), f32(found)[begin]
    for i in range(begin, W + P):
        most = max(most, x[i])
    total = float32(0)
    for i in range(begin, W + P):
        x[i] = exp((x[i] - most) * scale)
        total += x[i]
    values = s[Memory.values] + size * ((row * s[Memory.room] + begin) * G + group) * d
    weighted_values(found + 4 * (W + begin), P - begin, values, G * d, kind, 0, d, o)
    if W > 0:
        values = s[Memory.before_values] + size * (row * W * G + group) * d
        weighted_values(found, W, values, G * d, kind, 0, d, more)
        u, y = f32(o), f32(more)
        for i in range(d):
            u[i] = u[i] + y[i]
    return total


@loops
def _over_sums(s: Any, at: Any, size: Any, d: Any, asked: Any, offered: Any, v: Any, more: Any) -> Any:
    """Add the features offered [size] and v [d] to the sums of row and head `at`, unless offered is the address 0.

    Returns what divides the answer to the features asked [size], more [d].
    """
    before, after = f32(s[Memory.sums_in] + 4 * at * size * d), f32(s[Memory.sums_out] + 4 * at * size * d)
    z, new_z = f32(s[Memory.weights_in] + 4 * at * size), f32(s[Memory.weights_out] + 4 * at * size)
    ask, offer, y, o = f32(asked), f32(offered), f32(v), f32(more)
    for j in range(d):
        o[j] = float32(0)
    total = float32(0)
    for i in range(size):
        written = float32(0) if offered == 0 else offer[i]
        new_z[i] = z[i] + written
        total += ask[i] * new_z[i]
        factor, line = ask[i], i * d
        if offered == 0:
            for j in range(d):
                after[line + j] = before[line + j]
                o[j] += factor * before[line + j]
        else:
            for j in range(d):
                new = before[line + j] + written * y[j]
                after[line + j] = new
                o[j] += factor * new
    return total


@loops
def _over_decayed(s: Any, at: Any, d: Any, decay: Any, asked: Any, offered: Any, v: Any, eps: Any, out: Any) -> Any:
    """Retention's sums of row and head `at`, decayed, with offered and v [d] added; what they answer, normalised."""
    before, after = f32(s[Memory.sums_in] + 4 * at * d * d), f32(s[Memory.sums_out] + 4 * at * d * d)
    ask, offer, y, o = f32(asked), f32(offered), f32(v), f32(out)
    for j in range(d):
        o[j] = float32(0)
    for i in range(d):
        factor, written, line = ask[i], offer[i], i * d
        for j in range(d):
            new = decay * before[line + j] + written * y[j]
            after[line + j] = new
            o[j] += factor * new
    layer_norm(out, d, 0, 0, eps, out)


@loops
def _left(a: Any, s: Any, row: Any, group: Any, key: Any, value: Any) -> Any:
    """The key and the value [d] that leave a full window, as float32."""
    d, kind, size = a[Call.z_dim] // a[Call.heads], a[Call.key_kind], 4 if a[Call.key_kind] == FLOAT32 else 2
    G, width, old = a[Call.value_dim] // d, s[Memory.width], s[Memory.old]
    keys = s[Memory.old_keys] + size * (row * old * G + group) * width
    values = s[Memory.old_values] + size * (row * old * G + group) * d
    x, y = f32(key), f32(value)
    for i in range(d):
        x[i] = loaded(keys, i, kind)
        y[i] = loaded(values, i, kind)


@loops
def _opened(a: Any, w: Any, n: Any, head: Any) -> Any:
    """The gate of a head's working memory, for a row's n [D]."""
    D, z = a[Call.model_dim], float32(0)
    x, weight = f32(n), f32(w[Weights.opening] + 4 * head * D)
    for i in range(D):
        z += x[i] * weight[i]
    z += f32(w[Weights.opening_bias])[head]
    return float32(1) - float32(2) / (exp(float32(2) * z) + float32(1))


@loops
def _mix(
    a: Any, w: Any, s: Any, thread: Any, threads: Any, n: Any, q: Any, k: Any, v: Any, asked: Any, offered: Any,
    found: Any, o: Any, more: Any, left: Any,
) -> Any:  # fmt: skip
    """What this thread's heads find: o [M, Z]."""
    H, Z, U, most, mixer = a[Call.heads], a[Call.z_dim], a[Call.value_dim], a[Call.most_features], w[Weights.mixer]
    d, c = Z // H, w[Weights.columns]
    G = U // d
    first, last = share_of(a[Call.rows] * H, thread, threads, 1)
    for task in range(first, last):
        row, head = task // H, task % H
        group, at = head // (H // G), 4 * (row * Z + head * d)
        ask, offer, spare = asked + 4 * task * most, offered + 4 * task * most, left + 8 * task * d
        y, u = f32(o + at), f32(more + at)
        total = float32(0)
        if mixer == RETENTION:
            offer, value = offered + 4 * (row * H + group) * most, v + 4 * (row * U + group * d)
            decay, eps = f32(w[Weights.decay])[head], f32(w[Weights.sums_eps])[0]
            _over_decayed(s, task, d, decay, ask, offer, value, eps, o + at)
        elif mixer != SUMS:
            total = _over_places(a, s, row, q + at, group, found + 4 * task * a[Call.capacity], o + at, more + at)
        if mixer < SHARED:
            for i in range(d):
                y[i] = y[i] / total
        if mixer == CHUNKS and s[Memory.matrix] != 0:
            weighted_values(ask, c, s[Memory.matrix] + 4 * (row * G + group) * c * d, d, FLOAT32, 0, d, more + at)
            opened = _opened(a, w, n + 4 * row * a[Call.model_dim], head)
            for i in range(d):
                y[i] = y[i] + opened * (u[i] - y[i])
        if mixer == SHARED:
            if i64(a[Call.offsets])[row] >= s[Memory.places]:
                _left(a, s, row, group, spare, spare + 4 * d)
                _features(spare, d, w[Weights.map_k] + 4 * head * d * c, c, offer)
            else:
                offer = 0
            divisor = _over_sums(s, task, 2 * c, d, ask, offer, spare + 4 * d, more + at)
            share, rest = f32(w[Weights.share])[head], f32(w[Weights.rest])[head]
            divisor = share * total + rest * divisor
            for i in range(d):
                y[i] = (share * y[i] + rest * u[i]) / divisor
        if mixer == SUMS:
            key, value = k + 4 * (row * U + group * d), v + 4 * (row * U + group * d)
            _features(key, d, w[Weights.map_k] + 4 * head * d * c, c, offer)
            divisor = _over_sums(s, task, 2 * c, d, ask, offer, value, more + at) + f32(w[Weights.sums_eps])[0]
            for i in range(d):
                y[i] = u[i] / divisor


@loops
def _block(a: Any, w: Any, s: Any, thread: Any, threads: Any) -> Any:
    M, D, Z, U, F, H = (
        a[Call.rows], a[Call.model_dim], a[Call.z_dim], a[Call.value_dim], a[Call.ffn_dim], a[Call.heads]
    )  # fmt: skip
    most, x, n = a[Call.most_features], a[Call.x], a[Call.scratch]
    y, out, q = n + 4 * M * D, n + 8 * M * D, n + 12 * M * D
    o, more, left, k = q + 4 * M * Z, q + 8 * M * Z, q + 12 * M * Z, q + 20 * M * Z
    v, up = k + 4 * M * U, k + 8 * M * U
    side, hidden, asked = up + 4 * M * F, up + 8 * M * F, up + 12 * M * F
    offered, found = asked + 4 * M * H * most, asked + 8 * M * H * most
    first_row, last_row = share_of(M, thread, threads, 1)
    first, last = share_of(D, thread, threads, COLUMNS)

    for row in range(first_row, last_row):
        at = 4 * row * D
        _normalised(a, w[Weights.norm_scale], w[Weights.norm_bias], 0, x + at, n + at)
    wait(a)
    _project(a, w, thread, threads, n, q, k, v)
    wait(a)
    if w[Weights.mixer] == RETENTION:
        _features_of_all(a, w, thread, threads, q, k, more, left)
        wait(a)
    _place(a, w, s, thread, threads, q, k, v, asked, offered, more, left)
    wait(a)
    _mix(a, w, s, thread, threads, n, q, k, v, asked, offered, found, o, more, left)
    wait(a)
    linear(a, w, Weights.o, o, Z, D, first, last, y)
    add(a, first, last, x, y, 0)
    wait(a)
    if a[Call.parallel] == 0:
        for row in range(first_row, last_row):
            at = 4 * row * D
            _normalised(a, w[Weights.ffn_scale], w[Weights.ffn_bias], 3, x + at, n + at)
        wait(a)
    feed_forward(a, w, thread, threads, n, up, side, hidden, out)


@loops
def blocks(a: Any) -> Any:
    """All blocks, on every thread of the pool: `a` int64, laid out as `Call`."""
    thread, threads = whose(a[Call.number], a[Call.team])
    for layer in range(a[Call.layers]):
        w = i64(a[Call.weights] + 8 * layer * len(Weights))
        s = i64(a[Call.memory] + 8 * layer * len(Memory))
        _block(a, w, s, thread, threads)
    w = i64(a[Call.weights] + 8 * a[Call.layers] * len(Weights))
    first, last = share_of(a[Call.rows], thread, threads, 1)
    for row in range(first, last):
        at = 4 * row * a[Call.model_dim]
        _normalised(a, w[Weights.norm_scale], w[Weights.norm_bias], 1, a[Call.x] + at, a[Call.out] + at)
