"""Complex numbers as other code takes them: there as they read, and not conjugated or negated lazily."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Resolved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.resolve_conj().view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.resolve_conj()


def resolved(x: Tensor) -> Tensor:
    """x, not conjugated lazily, and with a gradient that is not either.

    Autograd's gradients of complex products may come conjugated lazily, which optimisers and `clip_grad_norm_` refuse:
    they look at complex numbers as pairs of real ones.
    """
    return _Resolved.apply(x) if x.requires_grad else x.resolve_conj()


def aligned(x: Tensor) -> Tensor:
    """Real x [..., 2], or a copy of it where its address is not one that complex numbers of its precision may have.

    `torch.view_as_complex` takes any address, and the kernels that then move a number at once end the process. Files
    of tensors that are mapped into memory keep to 8 bytes, which is too little for float64.
    """
    return x.clone() if x.data_ptr() % (2 * x.element_size()) else x
