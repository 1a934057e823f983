"""Products of decayed features: `sum_f q_tf exp(c_tf - c_jf) k_jf` for j <= t, with exponents that are never positive.

With one decay for all features, exp(c_t - c_j) is one factor of the product. With one decay each, features are
multiplied by it before they are summed: a block is halved again and again, and between two halves both sides are taken
relative to the edge between them, exp(c_t - c_edge) and exp(c_edge - c_j).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def decayed_products(q: Tensor, k: Tensor, sums: Tensor | None) -> Tensor:
    """Products inside blocks; what stands above the diagonal is finite and means nothing, or zero.

    Args:
        q: [B, G, n, R, T, f]; k: [B, G, n, T, f].
        sums: c, the running sums of log decays inside the block, the token's own included: [B or 1, G, n or 1, T, f],
            or f = 1 where one decay serves all; float64 where the device has it. None: no decay.

    Returns:
        [B, G, n, R, T, T].
    """
    size = k.shape[-2]
    if sums is None or sums.shape[-1] == 1:
        products = (q.flatten(3, 4) @ k.transpose(-1, -2)).unflatten(3, (-1, size))
        if sums is None:
            return products
        decay = (sums - sums.transpose(-1, -2)).to(k.dtype).masked_fill(_above(size, k), 0).exp()
        return products * decay[:, :, :, None]
    padded = 1
    while padded < size:
        padded *= 2
    if padded != size:
        q, k = (F.pad(x, (0, 0, 0, padded - size)) for x in (q, k))
        sums = torch.cat([sums, sums[..., -1:, :].expand(*sums.shape[:-2], padded - size, -1)], dim=-2)
    return _halved(q, k, sums)[..., :size, :size]


def _halved(q: Tensor, k: Tensor, sums: Tensor) -> Tensor:
    """`decayed_products` with a decay a feature, of T a power of two."""
    products, half = (q * k[:, :, :, None]).sum(-1)[..., None, None], 1
    while half < k.shape[-2]:
        late, early, sums_late, sums_early = (
            x.unflatten(-2, (-1, 2, half))[..., part, :, :] for x, part in ((q, 1), (k, 0), (sums, 1), (sums, 0))
        )
        edge = sums_early[..., -1:, :]
        late = late * (sums_late - edge).to(k.dtype).exp()[:, :, :, None]
        if half == 1:
            across = (late * early[:, :, :, None]).sum(-1, keepdim=True)
        else:
            early = early * (edge - sums_early).to(k.dtype).exp()
            across = late @ early.transpose(-1, -2)[:, :, :, None]
        first, second = products.unflatten(-3, (-1, 2)).unbind(-3)
        above = torch.cat([first, torch.zeros_like(first)], dim=-1)
        products = torch.cat([above, torch.cat([across, second], dim=-1)], dim=-2)
        half *= 2
    return products[..., 0, :, :]


def _above(size: int, like: Tensor) -> Tensor:
    """bool [T, T]: True above the diagonal, where exponents would be positive."""
    return torch.ones(size, size, dtype=torch.bool, device=like.device).triu(1)
