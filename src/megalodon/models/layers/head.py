"""The product with the output matrix, which decoding reads for a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megalodon.models.layers.few_rows import LINEAR, PRODUCT, FusedProduct, can_fuse
from megalodon.models.layers.int8 import Int8Linear
from megalodon.models.layers.projection import MOST_ROWS, Projection, can_pack
from megalodon.models.layers.watch import Prepared, is_forwarded_as_written
from megalodon.ops.backend import full_precision


def _product_of(head: nn.Module) -> tuple[Callable[[Tensor], Tensor] | None, list[Tensor]]:
    """The head's product with few rows, in float32 or better, and the weights of which it has copies; None where only
    the head itself will do."""
    if not isinstance(head, LINEAR) or not is_forwarded_as_written(head, LINEAR):
        return None, []
    dtype = torch.float32 if isinstance(head, Int8Linear) else head.weight.dtype
    if can_fuse([head], dtype, PRODUCT):
        return FusedProduct(head), [] if head.bias is None else [head.bias]
    wide = full_precision(head.weight.dtype)
    if not can_pack([head], wide):
        return None, []
    packed = Projection(head, packed=wide)
    return lambda x: packed(x.to(wide))[0], list(head.parameters())


_HEADS: Prepared[nn.Module, Callable[[Tensor], Tensor] | None] = Prepared(_product_of)


def generation_starts(head: nn.Module) -> None:
    """Before the next token, look at every weight: it may have changed without a trace."""
    _HEADS.start(head)


def apply_head(head: nn.Module, x: Tensor, decoding: bool) -> Tensor:
    """The head's output for x [B, L, D]; `decoding`: single tokens are on their way, and nothing is differentiated."""
    if torch.compiler.is_compiling():
        return head(x)
    if torch.is_grad_enabled() or head.training:
        _HEADS.forget(head)
        return head(x)
    if not decoding or torch.is_autocast_enabled(x.device.type):
        _HEADS.start(head)
        return head(x)
    product = _HEADS.of(head) if x.shape[:-1].numel() <= MOST_ROWS else None
    if product is None:
        return head(x)
    return product(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
