"""`silu(a) * b` over whole tensors, forward and backward: one pass over memory each."""

from __future__ import annotations

from typing import Any

from megalodon.ops.compiled.rows import share_of, stored, whose
from megalodon.ops.compiled.tables import FLOAT32, Gate
from megalodon.ops.compiled.vectors import exp, f32, float32, float_of, int32, int64, loops, silu, u16

_UNIT = 1024  # numbers of which threads take whole ones


@loops
def _read(address: Any, index: Any, kind: Any) -> Any:
    if kind == FLOAT32:
        return f32(address)[index]
    return float_of(int32(int64(u16(address)[index]) << 16))


@loops
def _forward(a: Any, b: Any, out: Any, first: Any, last: Any, kind: Any) -> Any:
    for i in range(first, last):
        u = _read(a, i, kind)
        stored(u / (float32(1) + exp(-u)) * _read(b, i, kind), out, i, kind)


@loops
def _backward(a: Any, b: Any, grad: Any, da: Any, db: Any, first: Any, last: Any, kind: Any) -> Any:
    for i in range(first, last):
        u, g = _read(a, i, kind), _read(grad, i, kind)
        share = float32(1) / (float32(1) + exp(-u))
        gated = u * share
        stored(g * gated, db, i, kind)
        stored(g * _read(b, i, kind) * (share + gated * (float32(1) - share)), da, i, kind)


@loops
def forward(t: Any) -> Any:
    """On every thread of the pool: `t` int64, laid out as `Gate`."""
    thread, threads = whose(t[Gate.number], t[Gate.team])
    first, last = share_of(t[Gate.size], thread, threads, _UNIT)
    if t[Gate.kind] == FLOAT32:
        _forward(t[Gate.a], t[Gate.b], t[Gate.out], first, last, FLOAT32)
    else:
        _forward(t[Gate.a], t[Gate.b], t[Gate.out], first, last, 1)


@loops
def backward(t: Any) -> Any:
    """The same of both gradients."""
    thread, threads = whose(t[Gate.number], t[Gate.team])
    first, last = share_of(t[Gate.size], thread, threads, _UNIT)
    if t[Gate.kind] == FLOAT32:
        _backward(t[Gate.a], t[Gate.b], t[Gate.grad], t[Gate.da], t[Gate.out], first, last, FLOAT32)
    else:
        _backward(t[Gate.a], t[Gate.b], t[Gate.grad], t[Gate.da], t[Gate.out], first, last, 1)


@loops
def backward_in_place(t: Any) -> Any:
    """The same in float32, the gradient of b where that of the result was: known to be one place, it gets vectors."""
    thread, threads = whose(t[Gate.number], t[Gate.team])
    first, last = share_of(t[Gate.size], thread, threads, _UNIT)
    a, b, grad, da = f32(t[Gate.a]), f32(t[Gate.b]), f32(t[Gate.grad]), f32(t[Gate.da])
    for i in range(first, last):
        g, share = grad[i], float32(1) / (float32(1) + exp(-a[i]))
        gated = a[i] * share
        grad[i] = g * gated
        da[i] = g * b[i] * (share + gated * (float32(1) - share))


@loops
def silu_forward(t: Any) -> Any:
    """`out = silu(a)`, float32."""
    thread, threads = whose(t[Gate.number], t[Gate.team])
    first, last = share_of(t[Gate.size], thread, threads, _UNIT)
    a, out = f32(t[Gate.a]), f32(t[Gate.out])
    for i in range(first, last):
        out[i] = silu(a[i])


@loops
def silu_backward(t: Any) -> Any:
    """The gradient of a -> out, float32."""
    thread, threads = whose(t[Gate.number], t[Gate.team])
    first, last = share_of(t[Gate.size], thread, threads, _UNIT)
    a, grad, out = f32(t[Gate.a]), f32(t[Gate.grad]), f32(t[Gate.out])
    for i in range(first, last):
        share = float32(1) / (float32(1) + exp(-a[i]))
        out[i] = grad[i] * share * (float32(1) + a[i] * (float32(1) - share))
