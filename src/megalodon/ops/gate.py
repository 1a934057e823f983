"""`silu(a) * b`, the gate of attention and of the feed-forward layer, in one pass over memory.

On a CPU the wide activations outgrow the cache, and three operations that each stream them cost more than the matrix
product before them. Here rows are taken a cacheful at a time, and only a and b are kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megalodon.ops import compiled
from megalodon.ops.backend import compiles
from megalodon.ops.compiled.tables import KINDS, Gate

CACHEFUL = 1 << 17
"""Elements of each tensor that are worked on together on a CPU."""


def _tiles(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of tensors of one shape [n, D], a few at a time."""
    rows, width = tensors[0].shape
    size = max(CACHEFUL // max(width, 1), 1) if tensors[0].device.type == "cpu" else max(rows, 1)
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


class _SiluProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        out = torch.empty_like(a)
        for a_t, b_t, out_t in _tiles(a, b, out):
            torch.mul(F.silu(a_t), b_t, out=out_t)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        a, b = ctx.saved_tensors
        da, db = torch.empty_like(a), torch.empty_like(b)
        for grad_t, a_t, b_t, da_t, db_t in _tiles(grad, a, b, da, db):
            torch.mul(grad_t, F.silu(a_t), out=db_t)
            torch.ops.aten.silu_backward.grad_input(grad_t * b_t, a_t, grad_input=da_t)
        return da, db


class _Compiled(torch.autograd.Function):
    """The same through `ops.compiled.gates`."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        out = torch.empty_like(a)
        run("gates.forward", a=a, b=b, out=out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        a, b = ctx.saved_tensors
        da, db = torch.empty_like(a), torch.empty_like(b)
        run("gates.backward", a=a, b=b, grad=grad.contiguous(), da=da, out=db)
        return da, db


def run(name: str, **tensors: Tensor) -> None:
    """Call a kernel of `ops.compiled.gates` that has been asked for."""
    kernel, a = compiled.kernel(name), tensors["a"]
    assert kernel is not None, "`compiles` has asked for it"
    table = np.zeros(len(Gate), np.int64)
    table[Gate.size], table[Gate.kind] = a.numel(), KINDS[a.dtype]
    for field, tensor in tensors.items():
        table[getattr(Gate, field)] = tensor.data_ptr()
    kernel(table, a.numel())


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        run("gates.silu_forward", a=x, out=out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        (x,) = ctx.saved_tensors
        return silu_gradient(x, grad.contiguous())


def silu(x: Tensor) -> Tensor:
    """`x * sigmoid(x)`, to the same bits wherever values are made: before attention or in it."""
    if not (x.is_contiguous() and compiles(x, *SILU)):
        return F.silu(x)
    out: Tensor = _Silu.apply(x)
    return out


def silu_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of x [...] of `silu(x)`, given that of the result."""
    if not (x.is_contiguous() and grad.is_contiguous() and compiles(x, *SILU)):
        return torch.ops.aten.silu_backward(grad, x)
    out = torch.empty_like(x)
    run("gates.silu_backward", a=x, grad=grad, out=out)
    return out


SILU = ("gates.silu_forward", "gates.silu_backward")


class _Product(torch.autograd.Function):
    """`residual + (silu(a) * b) @ weight.T`: a, b [n, E], weight [D, E], residual [n, D] or None. The gated numbers are
    made anew in the backward pass."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
        ctx.save_for_backward(a, b, weight)
        ctx.adds, hidden = residual is not None, torch.empty_like(a)
        run("gates.forward", a=a, b=b, out=hidden)
        return hidden @ weight.t() if residual is None else torch.addmm(residual, hidden, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        a, b, weight = ctx.saved_tensors
        da, db, d_weight = gated_gradients(a, b, weight, grad, ctx.needs_input_grad[2])
        return da, db, d_weight, grad if ctx.adds else None


def gated_gradients(
    a: Tensor, b: Tensor, weight: Tensor, grad: Tensor, weighs: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of a, b [n, E] and, if `weighs`, of the weight [D, E] of `(silu(a) * b) @ weight.T`, for which the
    kernels have been asked."""
    d_weight = None
    if weighs:
        hidden = torch.empty_like(a)
        run("gates.forward", a=a, b=b, out=hidden)
        d_weight = grad.t() @ hidden
        del hidden  # little is alive at a time
    db, da = grad @ weight, torch.empty_like(a)
    run("gates.backward_in_place", a=a, b=b, grad=db, da=da)
    return da, db, d_weight


def gated_linear(a: Tensor, b: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """`silu(a) * b` through a linear layer, plus `residual`; kernels keep only a and b for the backward pass.

    Args:
        a, b: [..., E] of one shape and floating dtype.
        weight: [D, E].
        residual: [..., D].

    Returns:
        [..., D]; under autocast in its dtype.

    Raises:
        ValueError: shapes or dtypes of a and b differ.
    """
    plain = all(x.dtype == torch.float32 for x in (b, weight)) and not torch.is_autocast_enabled(a.device.type)
    if plain and a.shape == b.shape and compiles(a, *KERNELS):
        flat = None if residual is None else residual.flatten(0, -2)
        y: Tensor = _Product.apply(a.flatten(0, -2).contiguous(), b.flatten(0, -2).contiguous(), weight, flat)
        return y.unflatten(0, a.shape[:-1])
    y = F.linear(silu_product(a, b), weight)
    return y if residual is None else y + residual


KERNELS = ("gates.forward", "gates.backward", "gates.backward_in_place")


def silu_product(a: Tensor, b: Tensor) -> Tensor:
    """`silu(a) * b`, element by element.

    Args:
        a, b: [..., D] of one shape and floating dtype.

    Returns:
        [..., D] in that dtype.

    Raises:
        ValueError: shapes or dtypes differ.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(f"a is {a.dtype} {tuple(a.shape)} and b {b.dtype} {tuple(b.shape)}: they must be alike")
    if torch.compiler.is_compiling():  # the compiler fuses better than tiles do, and would ask how much there is
        return F.silu(a) * b
    if a.numel() <= CACHEFUL and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return F.silu(a) * b
    if compiles(a, *KERNELS, dtypes=(torch.float32, torch.bfloat16)):
        result: Tensor = _Compiled.apply(a.contiguous(), b.contiguous())
        return result
    rows = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (a, b))
    return _SiluProduct.apply(*rows).view(a.shape)
