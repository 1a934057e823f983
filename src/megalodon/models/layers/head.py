"""The product with the output matrix, which decoding reads for a few rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalodon.models.layers.projection import MOST_ROWS, Projection, can_pack
from megalodon.models.layers.watch import Prepared, is_forwarded_as_written
from megalodon.ops.backend import full_precision


def _product_of(head: nn.Module) -> Projection | None:
    """The head's product with few rows, in float32 or better; None where only the head itself will do."""
    if not isinstance(head, nn.Linear) or not is_forwarded_as_written(head, (nn.Linear,)):
        return None
    wide = full_precision(head.weight.dtype)
    return Projection(head, packed=wide) if can_pack([head], wide) else None


_HEADS: Prepared[nn.Module, Projection | None] = Prepared(_product_of)


def apply_head(head: nn.Module, x: Tensor, decoding: bool) -> Tensor:
    """The head's output for x [B, L, D]; `decoding`: single tokens are on their way, and nothing is differentiated."""
    if torch.compiler.is_compiling():
        return head(x)
    if not decoding or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        _HEADS.forget(head)
        return head(x)
    product = _HEADS.of(head) if x.shape[:-1].numel() <= MOST_ROWS else None
    if product is None or product.weight is None:
        return head(x)
    (y,) = product(x.flatten(0, -2).to(product.weight.dtype))
    return y.unflatten(0, x.shape[:-1])
