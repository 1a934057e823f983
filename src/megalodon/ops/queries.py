"""Queries and keys of gated attention, which share one normalised z (SPEC: Chunk attention)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megalodon.ops import compiled
from megalodon.ops.backend import compiles
from megalodon.ops.compiled.tables import PART, Queries
from megalodon.ops.rotary import rotate


class _Compiled(torch.autograd.Function):
    """z [n, H, d] and turns, real [places, d], contiguous; only z is kept, and normalised again."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, scale: Tensor, bias: Tensor, turns: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        q, k = torch.empty_like(z), torch.empty_like(z)
        _run("tokens.queries_forward", eps, z=z, scale=scale, bias=bias, turns=turns, q=q, k=k)
        ctx.save_for_backward(z, scale, turns)
        ctx.eps = eps
        return q, k

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor):
        z, scale, turns = ctx.saved_tensors
        dz, sums = torch.empty_like(z), z.new_empty(-(-len(z) // PART), 5, *scale.shape[1:])
        tensors = {"z": z, "scale": scale, "turns": turns, "q": dq.contiguous(), "k": dk.contiguous()}
        _run("tokens.queries_backward", ctx.eps, **tensors, dz=dz, sums=sums)
        total = sums[:, :4].sum(0)
        return dz, total[:2], total[2:], None, None


def _run(name: str, eps: float, **tensors: Tensor) -> None:
    kernel, wide_eps = compiled.kernel(name), np.array([eps])
    assert kernel is not None, "`compiles` has asked for it"
    table = np.zeros(len(Queries), np.int64)
    table[[Queries.rows, Queries.heads, Queries.head_dim]] = tensors["z"].shape
    table[Queries.places], table[Queries.eps] = len(tensors["turns"]), wide_eps.ctypes.data
    for field, tensor in tensors.items():
        table[getattr(Queries, field)] = tensor.data_ptr()
    kernel(table, tensors["z"].numel())


def queries_and_keys(z: Tensor, scale: Tensor, bias: Tensor, turns: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """z over its root mean square in each head, once scaled and shifted to queries and once to keys, and rotated.

    Args:
        z: [B, L, H, d], any floating dtype.
        scale, bias: [2, H, d]; of queries and of keys.
        turns: complex [L, d / 2] or [B, L, d / 2] (`rotations`).

    Returns:
        (queries, keys), [B, L, H, d] each, in the dtype of z.
    """
    fits = scale.dtype == bias.dtype == z.dtype and turns.dtype == torch.complex64
    if fits and compiles(z, "tokens.queries_forward", "tokens.queries_backward"):
        places = torch.view_as_real(turns.resolve_conj().contiguous()).flatten(-2).flatten(0, -2)
        q, k = _Compiled.apply(z.flatten(0, 1).contiguous(), scale.contiguous(), bias.contiguous(), places, eps)
        return q.view(z.shape), k.view(z.shape)
    z = F.rms_norm(z, z.shape[-1:], None, eps)
    both = torch.addcmul(bias, z[..., None, :, :], scale).to(z.dtype)
    q, k = rotate(both.flatten(-3, -2), turns).unflatten(-2, scale.shape[:2]).unbind(-3)
    return q, k
