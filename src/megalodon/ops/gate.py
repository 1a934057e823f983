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
from megalodon.ops.backend import backend_for
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
        _run("gates.forward", a=a, b=b, out=out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        a, b = ctx.saved_tensors
        da, db = torch.empty_like(a), torch.empty_like(b)
        _run("gates.backward", a=a, b=b, grad=grad.contiguous(), da=da, out=db)
        return da, db


def _run(name: str, **tensors: Tensor) -> None:
    kernel, a = compiled.kernel(name), tensors["a"]
    assert kernel is not None, "`_compiles` has asked for it"
    table = np.zeros(len(Gate), np.int64)
    table[Gate.size], table[Gate.kind] = a.numel(), KINDS[a.dtype]
    for field, tensor in tensors.items():
        table[getattr(Gate, field)] = tensor.data_ptr()
    kernel(table, a.numel())


def _compiles(a: Tensor, b: Tensor) -> bool:
    if backend_for(a.device, a.dtype)[0] != "numba" or a.device.type != "cpu":
        return False
    return all(compiled.kernel(f"gates.{way}") is not None for way in ("forward", "backward"))


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
    if _compiles(a, b):
        result: Tensor = _Compiled.apply(a.contiguous(), b.contiguous())
        return result
    rows = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (a, b))
    return _SiluProduct.apply(*rows).view(a.shape)
