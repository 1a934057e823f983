"""Softmax attention over chosen keys: those of a mask, or those that each query or block of queries names."""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon.ops.backend import Implementations, check_devices, choose, full_precision
from megalodon.ops.compiling import one_break_at_most
from megalodon.ops.sparse_attention import blocked, reference

IMPLEMENTATIONS: Implementations = {"reference": reference.sparse_attention, "blocked": blocked.sparse_attention}


@one_break_at_most
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    keys: Tensor | None = None,
    query_block: int = 1,
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """`sum_i softmax_i(scale q_t . k_i) v_i` over the keys i that query t sees. A query that sees none gives zero.

    What a query sees is all that the mask or the list says: causality, documents and padding are the caller's to put
    into it. The softmax runs in float32 (float64 for float64 input), under autocast too.

    Args:
        q: [B, L, H, d].
        k: [B, S, G, d]; G divides H, and query head h uses key head h // (H / G).
        v: [B, S, G, e].
        mask: bool; without `keys` [B or 1, H or 1, L, S]: the query sees the key. With `keys` [B or 1, H or 1, L, K]:
            the query sees the K-th of its block's list.
        keys: int64 [B, H or G or 1, ceil(L / query_block), K]; the numbers of the keys that each block of queries
            names, none twice; -1 names none.
        query_block: consecutive queries that share a list.
        scale: factor of the scores.
        backend: "reference" or "blocked"; None chooses (see `megalodon.ops.backend`).

    Returns:
        [B, L, H, e] in the dtype of v.

    Raises:
        ValueError: a shape, dtype or device does not fit, or neither `mask` nor `keys` is given; the message names the
            argument.
    """
    _check(q, k, v, mask, keys, query_block)
    run = choose(IMPLEMENTATIONS, backend, q.device, q.dtype)
    real = full_precision(q.dtype)
    if keys is not None and mask is not None and 1 < keys.shape[1] < mask.shape[1]:
        keys = keys.repeat_interleave(mask.shape[1] // keys.shape[1], dim=1)
    with torch.autocast(q.device.type, enabled=False):
        return run(q.to(real), k.to(real), v.to(real), mask, keys, query_block, scale).to(v.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keys: Tensor | None, query_block: int) -> None:
    if q.ndim != 4 or not q.is_floating_point():
        raise ValueError(f"q is {q.dtype} of shape {tuple(q.shape)}: it must be a floating-point [B, L, H, d]")
    check_devices(q.device, k=k, v=v, mask=mask, keys=keys)
    batch, length, heads, width = q.shape
    if k.ndim != 4 or k.shape[0] != batch or k.shape[3] != width or k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(
            f"k has shape {tuple(k.shape)}: it must be [{batch}, S, G, {width}] with G a divisor of {heads} heads"
        )
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {tuple(v.shape)}: it must be [B, S, G, e] with B, S, G = {tuple(k.shape[:3])}")
    if query_block < 1:
        raise ValueError(f"query_block={query_block}: it must be at least 1")
    if mask is None and keys is None:
        raise ValueError("mask and keys are None: one of them must say what each query sees")
    last = k.shape[1]
    if keys is not None:
        blocks = -(-length // query_block)
        if keys.dtype != torch.int64 or keys.ndim != 4 or (keys.shape[0], keys.shape[2]) != (batch, blocks):
            raise ValueError(f"keys is {keys.dtype} {tuple(keys.shape)}: it must be int64 [{batch}, H, {blocks}, K]")
        if keys.shape[1] not in (1, k.shape[2], heads):
            raise ValueError(f"keys has {keys.shape[1]} heads: it must have 1, {k.shape[2]} or {heads}")
        last = keys.shape[3]
    if mask is not None and (
        mask.dtype != torch.bool
        or mask.ndim != 4
        or mask.shape[0] not in (1, batch)
        or mask.shape[1] not in (1, heads)
        or mask.shape[2:] != (length, last)
    ):
        raise ValueError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}: it must be bool [{batch} or 1, {heads} or 1, "
            f"{length}, {last}]"
        )
