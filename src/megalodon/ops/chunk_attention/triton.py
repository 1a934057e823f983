"""Chunk attention on a GPU: which form a batch takes, and the fused kernels (`triton_kernels.py`) as operators that
autograd and torch.compile know. The other form is in `strips.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from megalodon.ops import launch
from megalodon.ops.chunk_attention import spans as tables
from megalodon.ops.chunk_attention import strips
from megalodon.ops.chunk_attention import triton_kernels as kernels
from megalodon.ops.chunk_attention.spans import Spans
from megalodon.ops.launch import MAKES_TABLES, on_device
from megalodon.ops.layout import Layout

WIDEST_KEY = {torch.bfloat16: 256, torch.float32: 128}
"""Largest q, k head, a block of which must stay on the chip. Wider ones go through the blocked form."""

SPLIT = 64
"""Keys of one program in decoding."""


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels take these heads: of one dtype, q and k no wider than `WIDEST_KEY`."""
    return q.dtype == k.dtype == v.dtype and q.shape[-1] <= WIDEST_KEY.get(q.dtype, 0)


def block_size(dtype: torch.dtype, hopper: bool, more: bool) -> int:
    """Queries, and keys, that a program takes at once: the most that spills no register (docs/kernels.md).

    `more`: there is dropout or a cache, which take registers of their own.
    """
    if dtype != torch.bfloat16:
        return 16
    return 64 if hopper and not more else 32


def tiles(block: int, key: int, value: int, cached: bool) -> dict[str, dict[str, int]]:
    """Block sizes of each kernel: BM queries, BN keys, DK and DV channels; warps and stages."""
    dk, most = max(triton.next_power_of_2(key), 16), max(triton.next_power_of_2(value), 16)
    shape = {"BM": block, "BN": block, "DK": dk, "num_warps": 8, "num_stages": 2}
    narrow = {**shape, "DV": min(most, 64), "num_stages": 3 if block == 32 else 2}
    held = 128 if block == 16 else 256
    return {
        "forward": {**shape, "DV": min(most, held)},
        "queries": narrow,
        "keys": narrow,
        "values": {**shape, "DV": min(most, 128 if cached else held)},
    }


def _block_of(q: Tensor, dropout: float, cached: bool) -> int:
    return block_size(q.dtype, launch.capability(q) >= (9, 0), dropout > 0 or cached)


def _flags(tile: dict[str, int], q: Tensor, v: Tensor, cached: bool, dropout: float, dropkey: bool) -> dict[str, Any]:
    return {
        "HAS_CACHE": cached,
        "DROPOUT": dropout > 0 and not dropkey,
        "DROPKEY": dropout > 0 and dropkey,
        **tile,
        "FULL_K": tile["DK"] == q.shape[-1],
        "FULL_V": v.shape[-1] % tile["DV"] == 0,
    }


def _spans(
    shape: list[int],
    q: Tensor,
    k: Tensor,
    spans: Tensor | None,
    query_work: Tensor | None,
    key_work: Tensor | None,
    block: int,
) -> Spans:
    """The tables given, or those of a plain batch: shape is [chunk size, offset, cache width], or [offset]."""
    if spans is not None and query_work is not None and key_work is not None:
        return Spans(spans, query_work, key_work)
    if len(shape) == 1:
        return tables.window(*q.shape[:2], k.shape[1], shape[0], block, q.device)
    return tables.chunks(*q.shape[:2], *shape, block, q.device)


@torch.library.custom_op("megalodon::chunk_attention", mutates_args=(), **MAKES_TABLES)
def attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor | None,
    cache_v: Tensor | None,
    seed: Tensor | None,
    shape: list[int],
    spans: Tensor | None,
    query_work: Tensor | None,
    key_work: Tensor | None,
    dropout: float,
    dropkey: bool,
) -> tuple[Tensor, Tensor]:
    """q [B, L, H, d], k [B, K, H, d], v [B, K, H, e], the cache [B, n, H, .] -> (out [B, L, H, e], lse [B, L, H]).

    All contiguous and of one dtype, bfloat16 or float32. `shape` describes a plain batch, the tables any other; tokens
    in no span give zero. seed int64 [1], with dropout only.
    """
    heads, width = q.shape[2], v.shape[-1]
    block = _block_of(q, dropout, cache_k is not None)
    plan = _spans(shape, q, k, spans, query_work, key_work, block)
    tile = tiles(block, q.shape[-1], width, cache_k is not None)["forward"]
    out = q.new_zeros(*q.shape[:3], width) if spans is not None else q.new_empty(*q.shape[:3], width)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    grid = (heads * triton.cdiv(width, tile["DV"]) * len(plan.query_work),)
    with on_device(q):
        kernels.forward_kernel[grid](
            q, k, v, cache_k, cache_v, seed, plan.spans, plan.query_work, out, lse, heads, q.shape[-1], width, dropout,
            **_flags(tile, q, v, cache_k is not None, dropout, dropkey)
        )  # fmt: skip
    return out, lse


@attention_op.register_fake
def _(q, k, v, cache_k, cache_v, seed, shape, spans, query_work, key_work, dropout, dropkey):
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("megalodon::chunk_attention_backward", mutates_args=(), **MAKES_TABLES)
def attention_backward_op(
    d_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor | None,
    cache_v: Tensor | None,
    seed: Tensor | None,
    shape: list[int],
    spans: Tensor | None,
    query_work: Tensor | None,
    key_work: Tensor | None,
    dropout: float,
    dropkey: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `attention_op`: dq, dk, dv, and those of the cache (empty where there is none)."""
    heads, width, dim = q.shape[2], v.shape[-1], q.shape[-1]
    cached = cache_k is not None
    block = _block_of(q, dropout, cached)
    plan = _spans(shape, q, k, spans, query_work, key_work, block)
    tile = tiles(block, dim, width, cached)
    # keys that no query of this call may see, such as padding or the free end of a buffer, are in no span
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    d_cache_k = torch.zeros_like(cache_k) if cache_k is not None else q.new_empty(0)
    d_cache_v = torch.zeros_like(cache_v) if cache_v is not None else q.new_empty(0)
    delta = torch.empty_like(lse)
    rows = lse.numel()
    inputs = (q, k, v, cache_k, cache_v, seed, plan.spans)
    sizes = (heads, dim, width, dropout)

    def flags(name: str) -> dict[str, Any]:
        return _flags(tile[name], q, v, cached, dropout, dropkey)

    with on_device(q):
        kernels.delta_kernel[(triton.cdiv(rows, 8),)](out, d_out, delta, width, rows, 8, 256)
        kernels.query_gradients_kernel[(heads * len(plan.query_work),)](
            *inputs, plan.query_work, d_out, lse, delta, dq, *sizes, **flags("queries")
        )
        kernels.key_gradients_kernel[(heads * len(plan.key_work),)](
            *inputs, plan.key_work, d_out, lse, delta, dk, d_cache_k, *sizes, **flags("keys")
        )
        kernels.value_gradients_kernel[(heads * triton.cdiv(width, tile["values"]["DV"]) * len(plan.key_work),)](
            q, k, cache_k, seed, plan.spans, plan.key_work, d_out, lse, dv, d_cache_v, *sizes, **flags("values")
        )
    return dq, dk, dv, d_cache_k, d_cache_v


@attention_backward_op.register_fake
def _(d_out, out, lse, q, k, v, cache_k, cache_v, seed, shape, spans, query_work, key_work, dropout, dropkey):
    of_cache = (q.new_empty(0) if cache is None else torch.empty_like(cache) for cache in (cache_k, cache_v))
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), *of_cache


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, cache_k, cache_v, seed, ctx.shape, spans, query_work, key_work, ctx.dropout, ctx.dropkey = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, q, k, v, cache_k, cache_v, seed, spans, query_work, key_work)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, _: Tensor | None):
    if d_out is None:
        return (None,) * 12
    *tensors, spans, query_work, key_work = ctx.saved_tensors
    dq, dk, dv, d_cache_k, d_cache_v = torch.ops.megalodon.chunk_attention_backward(
        d_out.contiguous(), *tensors, ctx.shape, spans, query_work, key_work, ctx.dropout, ctx.dropkey
    )
    of_cache = (None, None) if tensors[5] is None else (d_cache_k, d_cache_v)
    return dq, dk, dv, *of_cache, *(None,) * 7


attention_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("megalodon::decode_attention", mutates_args=())
def decode_op(q: Tensor, k: Tensor, v: Tensor, places: Tensor | None, place: int) -> Tensor:
    """One query a row, q [N, 1, H, d], against the keys k [N, K, H, d] up to its place: one for all rows, or int64 [N]
    on the device, so that a CUDA graph may be replayed while sequences grow. Two launches; without gradients.
    """
    (rows, _, heads, dim), (keys, width) = q.shape, (k.shape[1], v.shape[-1])
    splits = triton.cdiv(keys, SPLIT)
    slice_width = min(triton.next_power_of_2(width), 2048)
    partial = q.new_empty(rows, heads, splits, width, dtype=torch.float32)
    peaks = q.new_empty(rows, heads, splits, 2, dtype=torch.float32)
    out = q.new_empty(rows, 1, heads, width)
    with on_device(q):
        kernels.decode_kernel[rows * heads, splits, triton.cdiv(width, slice_width)](
            q, k, v, places, place, partial, peaks, heads, dim, width, keys, places is not None, SPLIT, 16,
            triton.next_power_of_2(dim), slice_width, num_warps=8
        )  # fmt: skip
        kernels.join_kernel[rows * heads, triton.cdiv(width, 512)](
            partial, peaks, out, heads, width, splits, triton.next_power_of_2(splits), 512
        )
    return out


@decode_op.register_fake
def _(q, k, v, places, place):
    return q.new_empty(*q.shape[:3], v.shape[-1])


def in_strips(q: Tensor, v: Tensor, tokens: float) -> bool:
    """Whether strips are expected to be quicker than the fused kernels, for chunks of so many tokens on average.

    Estimated, not yet measured (docs/kernels.md): strips pay 4 bytes for each score, and 18 backward, which is less
    than making the scores anew where the values take several slices; and they want products that fill a GPU.
    """
    slices = triton.cdiv(v.shape[-1], 256)
    return q.dtype == torch.bfloat16 and slices >= 4 and tokens >= 512


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix: tuple[Tensor, Tensor] | None,
    layout: Layout,
    dropout: float,
    dropkey: bool,
    form: str | None = None,
) -> Tensor:
    """See `megalodon.ops.chunk_attention`; the tensors have a token at least, and pass `fits`.

    `form` is "fused" or "strips", or None for what `in_strips` says. Cached keys need the fused kernels.
    """
    cache = None
    if prefix is not None and layout.longest_offset:
        cache = (prefix[0].to(k.dtype).contiguous(), prefix[1].to(v.dtype).contiguous())
    chunk = layout.chunk_size
    assert chunk is not None
    width = 0 if cache is None else cache[0].shape[1]
    if layout.uniform_offset is not None:
        if cache is None and (form == "strips" or (form is None and in_strips(q, v, min(chunk, q.shape[1])))):
            return strips.attend(q, k, v, [chunk], (), dropout, dropkey)
        return _attend(q, k, v, cache, [chunk, layout.uniform_offset, width], None, dropout, dropkey)
    if cache is None and form != "fused":
        groups = tables.groups_of_layout(layout)
        tokens = sum(g.spans * g.queries for g in groups) / sum(g.spans for g in groups) if groups else 0
        if groups and (form == "strips" or in_strips(q, v, tokens)):
            return strips.attend(q, k, v, [], groups, dropout, dropkey)
    plan = tables.ragged(layout, width, _block_of(q, dropout, cache is not None))
    return _attend(q, k, v, cache, [], plan, dropout, dropkey)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: tuple[Tensor, Tensor] | None,
    shape: list[int],
    plan: Spans | None,
    dropout: float,
    dropkey: bool,
) -> Tensor:
    tensors = (x.contiguous() for x in (q, k, v))
    seed = torch.randint(2**31, (1,), device=q.device) if dropout > 0 else None
    out, _ = torch.ops.megalodon.chunk_attention(
        *tensors, *(cache or (None, None)), seed, shape, *(plan or (None, None, None)), dropout, dropkey
    )
    return out


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, offset: int | Tensor, dropout: float, dropkey: bool
) -> Tensor | None:
    """See `megalodon.ops.causal_attention` without `first`; None where only the plain form can do it."""
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.shape[1] == 1 and dropout == 0 and not differentiable:
        places, place = (offset, 0) if isinstance(offset, Tensor) else (None, offset)
        return torch.ops.megalodon.decode_attention(q.contiguous(), k.contiguous(), v.contiguous(), places, place)
    if isinstance(offset, Tensor):
        return None
    if in_strips(q, v, q.shape[1]):
        return strips.attend(q, k, v, [0, offset], (), dropout, dropkey)
    return _attend(q, k, v, None, [offset], None, dropout, dropkey)
