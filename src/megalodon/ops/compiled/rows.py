"""What a decoding step does with a few rows: products with weights, norms, gates, attention over cached keys.

Loops for one thread, which works on a part of the columns, heads or rows that its caller names. Every number is
computed by one thread in one order, so that bits depend neither on the number of threads nor on the other rows. All
tensors are float32 and given by address, unless a kind is named; `M` is the number of rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from megalodon.ops.compiled.tables import BFLOAT16, FLOAT32, INT8
from megalodon.ops.compiled.vectors import (
    WIDTH,
    average_channel,
    bits_of,
    call,
    exact,
    exp,
    f32,
    f64,
    float32,
    float_of,
    int32,
    int64,
    loops,
    make_dots,
    make_weighted_sum,
    silu,
    u16,
    uint16,
    uint32,
)

COLUMNS = 4
"""Columns of a matrix that are worked on together; threads take whole ones."""

IN_CACHE = 24 << 10
"""Bytes of a matrix that fit into the nearest cache beside some rows."""


def _make_product(kind: int) -> Any:
    """`product` for one kind of weights."""
    four, two, one, single = (make_dots(r, c, kind) for r, c in ((4, 4), (2, 4), (1, 4), (1, 1)))
    size = {FLOAT32: 4, BFLOAT16: 2, INT8: 1}[kind]

    @loops
    def product(x: Any, M: Any, K: Any, w: Any, first: Any, last: Any, out: Any, width: Any) -> Any:
        panel = max(IN_CACHE // (size * K) // COLUMNS, 1) * COLUMNS  # columns that stay in cache while rows pass
        whole = first + (last - first) // COLUMNS * COLUMNS
        for begin in range(first, whole, panel):
            end = min(begin + panel, whole)
            row = 0
            while row + 4 <= M:
                for column in range(begin, end, COLUMNS):
                    four(x + 4 * row * K, K, w + column * K * size, K, K, out + 4 * (row * width + column), width)
                row += 4
            if row + 2 <= M:
                for column in range(begin, end, COLUMNS):
                    two(x + 4 * row * K, K, w + column * K * size, K, K, out + 4 * (row * width + column), width)
                row += 2
            if row < M:
                for column in range(begin, end, COLUMNS):
                    one(x + 4 * row * K, K, w + column * K * size, K, K, out + 4 * (row * width + column), width)
        for column in range(whole, last):
            for row in range(M):
                single(x + 4 * row * K, K, w + column * K * size, K, K, out + 4 * (row * width + column), width)

    return product


_float32, _bfloat16, _int8 = (_make_product(kind) for kind in (FLOAT32, BFLOAT16, INT8))


@loops
def clear(target: Any, count: Any) -> Any:
    """Zeros in the place of `count` numbers of float32."""
    v = f32(target)
    for i in range(count):
        v[i] = 0.0


@loops
def product(
    x: Any, M: Any, K: Any, w: Any, kind: Any, scale: Any, bias: Any, first: Any, last: Any, out: Any, width: Any
) -> Any:
    """`out[:, first:last] = x @ w[first:last].T * scale + bias`: x [M, K], w [width, K] of `kind`, out [M, width].

    scale [width] where weights are int8; bias [width] or the address 0.
    """
    if kind == FLOAT32:
        _float32(x, M, K, w, first, last, out, width)
    elif kind == BFLOAT16:
        _bfloat16(x, M, K, w, first, last, out, width)
    else:
        _int8(x, M, K, w, first, last, out, width)
    if kind == INT8:
        s = f32(scale)
        for row in range(M):
            o = f32(out + 4 * row * width)
            for j in range(first, last):
                o[j] = o[j] * s[j]
    if bias != 0:
        b = f32(bias)
        for row in range(M):
            o = f32(out + 4 * row * width)
            for j in range(first, last):
                o[j] = o[j] + b[j]


@loops
def whose(number: Any, count: Any) -> Any:
    """(this thread, threads), by the pool's functions; the only one where those are 0."""
    if count == 0:
        return 0, 1
    return call(number), call(count)


@loops
def share_of(count: Any, part: Any, parts: Any, unit: Any) -> Any:
    """(first, last) of the part of `count` things that a thread takes, in multiples of `unit`."""
    units = (count + unit - 1) // unit
    return min(part * units // parts * unit, count), min((part + 1) * units // parts * unit, count)


@loops
def running_norm(
    x: Any, size: Any, share: Any, mean_in: Any, var_in: Any, mean_out: Any, var_out: Any, eps: Any, scale: Any,
    bias: Any, out: Any, group: Any,
) -> Any:  # fmt: skip
    """TimestepNorm of one token in one group of `size` channels; statistics are float64 (SPEC: TimestepNorm)."""
    at = 4 * group * size
    u, weight, b, y = f32(x + at), f32(scale + at), f32(bias + at), f32(out + at)
    m = 0.0
    for i in range(size):
        m += u[i]
    m /= size
    s = 0.0
    for i in range(size):
        s += (u[i] - m) * (u[i] - m)
    s /= size
    old = f64(mean_in)[group]
    step = m - old
    new = old + share * step
    var = f64(var_in)[group] + share * step * step
    var += share * (s - var)
    f64(mean_out)[group] = new
    f64(var_out)[group] = var
    factor = 1.0 / np.sqrt(var + eps)
    for i in range(size):
        y[i] = float32((u[i] - new) * factor) * weight[i] + b[i]


@loops
def decaying_norm(
    x: Any, size: Any, betas: Any, corrections: Any, mean_in: Any, var_in: Any, mean_out: Any, var_out: Any, eps: Any,
    scale: Any, bias: Any, out: Any, group: Any,
) -> Any:  # fmt: skip
    """TimestepDecayNorm of one token in one group of `size` channels; statistics are float64.

    betas and corrections, 1 / (1 - beta**count), float64 [2] each: of mean and variance (GECKO: TimestepDecayNorm).
    """
    at = 4 * group * size
    u, weight, b, y = f32(x + at), f32(scale + at), f32(bias + at), f32(out + at)
    m = 0.0
    for i in range(size):
        m += u[i]
    m /= size
    s = 0.0
    for i in range(size):
        s += (u[i] - m) * (u[i] - m)
    s /= size
    beta, correction = f64(betas), f64(corrections)
    mean = beta[0] * f64(mean_in)[group] + (1.0 - beta[0]) * m
    var = beta[1] * f64(var_in)[group] + (1.0 - beta[1]) * s
    f64(mean_out)[group] = mean
    f64(var_out)[group] = var
    centre, factor = mean * correction[0], 1.0 / np.sqrt(var * correction[1] + eps)
    for i in range(size):
        y[i] = float32((u[i] - centre) * factor) * weight[i] + b[i]


@loops
def moving_average(
    n: Any, N: Any, first: Any, last: Any, q: Any, p: Any, gamma: Any, omega: Any, h_in: Any, h_out: Any, out: Any
) -> Any:
    """CEMA of one token for channels `first` to `last`: n, out [D]; h, q, gamma complex [D, N], p [D, N], omega [D].

    `h_out` may be `h_in`.
    """
    x, y, o = f32(n), f32(out), f32(omega)
    for d in range(first, last):
        at = d * N
        found = average_channel(x[d], h_in + 8 * at, h_out + 8 * at, q + 8 * at, p + 4 * at, gamma + 8 * at, N)
        y[d] = found + o[d] * x[d]


@loops
def rms_norm(x: Any, D: Any, scale: Any, eps: Any, out: Any) -> Any:
    """x [D] over its root mean square, times scale [D] unless that is the address 0."""
    u, y = f32(x), f32(out)
    total = float32(0)
    for i in range(D):
        total += u[i] * u[i]
    factor = float32(1) / np.sqrt(total / float32(D) + float32(eps))
    if scale != 0:
        weight = f32(scale)
        for i in range(D):
            y[i] = u[i] * factor * weight[i]
    else:
        for i in range(D):
            y[i] = u[i] * factor


@loops
def layer_norm(x: Any, D: Any, scale: Any, bias: Any, eps: Any, out: Any) -> Any:
    """Layer norm of x [D]; scale and bias [D] or the address 0."""
    u, y = f32(x), f32(out)
    mean = float32(0)
    for i in range(D):
        mean += u[i]
    mean /= float32(D)
    total = float32(0)
    for i in range(D):
        total += (u[i] - mean) * (u[i] - mean)
    factor = float32(1) / np.sqrt(total / float32(D) + float32(eps))
    if scale != 0:
        weight = f32(scale)
        for i in range(D):
            y[i] = (u[i] - mean) * factor * weight[i]
    else:
        for i in range(D):
            y[i] = (u[i] - mean) * factor
    if bias != 0:
        b = f32(bias)
        for i in range(D):
            y[i] = y[i] + b[i]


@exact
def loaded(address: Any, index: Any, kind: Any) -> Any:
    """Element `index` of float32 or bfloat16 numbers, as float32."""
    if kind == FLOAT32:
        return f32(address)[index]
    return float_of(int32(int64(u16(address)[index]) << 16))


@exact
def stored(value: Any, address: Any, index: Any, kind: Any) -> Any:
    """Write a float32 to element `index` of float32 or bfloat16 numbers, rounded to nearest even."""
    if kind == FLOAT32:
        f32(address)[index] = value
    elif value != value:
        u16(address)[index] = uint16(0x7FC0)
    else:
        bits = int64(uint32(bits_of(value)))
        u16(address)[index] = uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


@loops
def query_and_key(
    z: Any, d: Any, eps: Any, scale: Any, bias: Any, apart: Any, turns: Any, q: Any, key: Any, kind: Any
) -> Any:
    """z [d] of a head -> q [d] and the key [d] of `kind`, both rotated (SPEC: Chunk attention).

    scale and bias [2, ...] hold those of queries, and `apart` elements on those of keys; turns complex [d / 2].
    """
    u, s, b, t, out = f32(z), f32(scale), f32(bias), f32(turns), f32(q)
    total = float32(0)
    for i in range(d):
        total += u[i] * u[i]
    factor = float32(1) / np.sqrt(total / float32(d) + float32(eps))
    for i in range(0, d, 2):
        even, odd = u[i] * factor * s[i] + b[i], u[i + 1] * factor * s[i + 1] + b[i + 1]
        out[i], out[i + 1] = even * t[i] - odd * t[i + 1], even * t[i + 1] + odd * t[i]
        even = u[i] * factor * s[apart + i] + b[apart + i]
        odd = u[i + 1] * factor * s[apart + i + 1] + b[apart + i + 1]
        stored(even * t[i] - odd * t[i + 1], key, i, kind)
        stored(even * t[i + 1] + odd * t[i], key, i + 1, kind)


@loops
def turned(u: Any, d: Any, factor: Any, scale: Any, bias: Any, turns: Any, out: Any, kind: Any) -> Any:
    """`u * factor * scale + bias` of a head's u [d], rotated by turns complex [d / 2] unless that is the address 0.

    Written as numbers of `kind`.
    """
    x, s, b = f32(u), f32(scale), f32(bias)
    if turns == 0:
        for i in range(d):
            stored(x[i] * factor * s[i] + b[i], out, i, kind)
        return
    t = f32(turns)
    for i in range(0, d, 2):
        even, odd = x[i] * factor * s[i] + b[i], x[i + 1] * factor * s[i + 1] + b[i + 1]
        stored(even * t[i] - odd * t[i + 1], out, i, kind)
        stored(even * t[i + 1] + odd * t[i], out, i + 1, kind)


@loops
def turned_halves(u: Any, pairs: Any, turns: Any) -> Any:
    """In place: numbers i and i + pairs of a head's u turned by turns complex [pairs]."""
    x, t = f32(u), f32(turns)
    for i in range(pairs):
        low, high = x[i], x[i + pairs]
        x[i] = low * t[2 * i] - high * t[2 * i + 1]
        x[i + pairs] = high * t[2 * i] + low * t[2 * i + 1]


@loops
def head_factor(z: Any, d: Any, eps: Any) -> Any:
    """What brings z [d] of a head to a root mean square of 1."""
    u = f32(z)
    total = float32(0)
    for i in range(d):
        total += u[i] * u[i]
    return float32(1) / np.sqrt(total / float32(d) + float32(eps))


_key_dots = {(columns, kind): make_dots(1, columns, kind) for columns in (1, 4) for kind in (FLOAT32, BFLOAT16)}
_dots_4, _dots_1 = _key_dots[4, FLOAT32], _key_dots[1, FLOAT32]
_half_dots_4, _half_dots_1 = _key_dots[4, BFLOAT16], _key_dots[1, BFLOAT16]


@loops
def scores(q: Any, d: Any, keys: Any, step: Any, kind: Any, first: Any, last: Any, out: Any) -> Any:
    """`out[first:last]` of q [d] with keys [..., d], `step` elements apart."""
    size = 4 if kind == FLOAT32 else 2
    j = first
    while j < last:
        at = keys + j * step * size
        if j + 4 <= last:
            if kind == FLOAT32:
                _dots_4(q, d, at, step, d, out + 4 * j, 4)
            else:
                _half_dots_4(q, d, at, step, d, out + 4 * j, 4)
            j += 4
        else:
            if kind == FLOAT32:
                _dots_1(q, d, at, step, d, out + 4 * j, 1)
            else:
                _half_dots_1(q, d, at, step, d, out + 4 * j, 1)
            j += 1


@loops
def largest(x: Any, length: Any) -> Any:
    """The greatest of x [length], in eight parts that do not wait for one another; with a NaN among them, any."""
    u = f32(x)
    a = b = c = d = e = f = g = h = u[0]
    whole = length // 8 * 8
    for i in range(0, whole, 8):
        a = u[i] if u[i] > a else a
        b = u[i + 1] if u[i + 1] > b else b
        c = u[i + 2] if u[i + 2] > c else c
        d = u[i + 3] if u[i + 3] > d else d
        e = u[i + 4] if u[i + 4] > e else e
        f = u[i + 5] if u[i + 5] > f else f
        g = u[i + 6] if u[i + 6] > g else g
        h = u[i + 7] if u[i + 7] > h else h
    for i in range(whole, length):
        a = u[i] if u[i] > a else a
    return max(max(max(a, b), max(c, d)), max(max(e, f), max(g, h)))


@loops
def softmax(x: Any, length: Any) -> Any:
    """In place, x [length]."""
    u = f32(x)
    most = largest(x, length)
    total = float32(0)
    for i in range(length):
        u[i] = exp(u[i] - most)
        total += u[i]
    factor = float32(1) / total
    for i in range(length):
        u[i] = u[i] * factor


_sum_24, _sum_8, _sum_1, _half_sum_24, _half_sum_8, _half_sum_1 = (
    make_weighted_sum(vectors, kind) for kind in (FLOAT32, BFLOAT16) for vectors in (24, 8, 1)
)
"""Many neighbours at a time: values come from far memory, which is quickest in long runs."""


@loops
def weighted_values(
    weights: Any, length: Any, values: Any, step: Any, kind: Any, first: Any, last: Any, out: Any
) -> Any:
    """`out[first:last]` = sum over `length` rows of weights times values [..., e], `step` elements apart."""
    size = 4 if kind == FLOAT32 else 2
    j = first
    while j + WIDTH <= last:
        at = values + j * size
        vectors = 24 if j + 24 * WIDTH <= last else 8 if j + 8 * WIDTH <= last else 1
        if kind == FLOAT32:
            if vectors == 24:
                _sum_24(weights, length, at, step, out + 4 * j)
            elif vectors == 8:
                _sum_8(weights, length, at, step, out + 4 * j)
            else:
                _sum_1(weights, length, at, step, out + 4 * j)
        elif vectors == 24:
            _half_sum_24(weights, length, at, step, out + 4 * j)
        elif vectors == 8:
            _half_sum_8(weights, length, at, step, out + 4 * j)
        else:
            _half_sum_1(weights, length, at, step, out + 4 * j)
        j += vectors * WIDTH
    w, o = f32(weights), f32(out)
    while j < last:
        total = float32(0)
        for i in range(length):
            total += w[i] * loaded(values, i * step + j, kind)
        o[j] = total
        j += 1


@loops
def gate(a: Any, b: Any, first: Any, last: Any, out: Any) -> Any:
    """`out[first:last] = silu(a) * b`, or silu(a) where b is the address 0."""
    u, o = f32(a), f32(out)
    if b == 0:
        for i in range(first, last):
            o[i] = silu(u[i])
    else:
        v = f32(b)
        for i in range(first, last):
            o[i] = silu(u[i]) * v[i]


@loops
def gelu(x: Any, first: Any, last: Any, out: Any) -> Any:
    """`out[first:last] = gelu(x)`, by its tanh approximation: x sigmoid(sqrt(8 / pi) (x + 0.044715 x^3))."""
    u, o = f32(x), f32(out)
    for i in range(first, last):
        inner = float32(1.5957691216) * (u[i] + float32(0.044715) * u[i] * u[i] * u[i])
        o[i] = u[i] / (float32(1.0) + exp(-inner))
