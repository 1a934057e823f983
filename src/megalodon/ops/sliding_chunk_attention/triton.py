"""Sliding chunk attention on a GPU: the fused kernels of chunk attention, launched for both chunks of the window.

The chunk before goes first and leaves its softmax, in float32, where the query's own chunk goes on. Backward, the same
kernels run for either chunk with what both have in common: the log of the softmax's sum, and the product of output and
gradient. Cached keys are those of the open chunk and then those of the chunk before, in one tensor.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from megalodon.ops import launch
from megalodon.ops.chunk_attention import spans as tables
from megalodon.ops.chunk_attention import triton as shared
from megalodon.ops.chunk_attention import triton_kernels as kernels
from megalodon.ops.chunk_attention.spans import Spans
from megalodon.ops.launch import MAKES_TABLES, on_device
from megalodon.ops.layout import Layout, PlainLayout
from megalodon.ops.prefix import Prefix
from megalodon.ops.segments import Segments
from megalodon.ops.sliding_chunk_attention.blocked import first_visible

MOST_REGISTERS = 255
"""Of a thread; what the hardware has."""


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels take these heads and pass; the blocked form has a shorter way for one token."""
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return shared.fits(q, k, v) and (q.shape[1] > 1 or differentiable)


def _block_of(q: Tensor, more: bool) -> int:
    return shared.block_size(q.dtype, launch.capability(q) >= (9, 0), more)


def _plans(shape: list[int], given: list[Tensor], q: Tensor, block: int) -> tuple[Spans, Spans]:
    """Own chunks and chunks before, of the tables given or of a plain batch: chunk, position, width of the open one."""
    if given:
        return Spans(*given[:3]), Spans(*given[3:])
    return tables.plain_windows(*q.shape[:2], *shape, block, q.device)


def _flags(
    tile: dict[str, int], q: Tensor, v: Tensor, cached: bool, first: Tensor | None, dropout: float, dropkey: bool
) -> dict[str, Any]:
    return shared._flags(tile, q, v, cached, dropout, dropkey) | {"first": first, "HAS_FIRST": first is not None}


@torch.library.custom_op("megalodon::window_attention", mutates_args=(), **MAKES_TABLES)
def window_op(
    q: Tensor,
    q_before: Tensor | None,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor | None,
    cache_v: Tensor | None,
    first: Tensor | None,
    seeds: Tensor | None,
    chunk: int,
    shape: list[int],
    tables: list[Tensor],
    dropout: float,
    dropkey: bool,
) -> tuple[Tensor, Tensor]:
    """q, q_before, k [B, L, H, d], v [B, L, H, e], the cache [B, n, H, .] -> (out [B, L, H, e], lse [B, L, H]).

    All contiguous and of one dtype, bfloat16 or float32. first int32 [B, L]: the first key that each query sees,
    counted from the start of the chunk before its own. seeds int64 [2], with dropout only. `shape` describes a plain
    batch, the six tables any other; tokens in no span give zero.
    """
    heads, width, cached = q.shape[2], v.shape[-1], cache_k is not None
    block = _block_of(q, dropout > 0 or cached or first is not None)
    own, before = _plans(shape, tables, q, block)
    tile = shared.tiles(block, q.shape[-1], width, cached)["forward"]
    out = q.new_zeros(*q.shape[:3], width) if tables else q.new_empty(*q.shape[:3], width)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    flags = _flags(tile, q, v, cached, first, dropout, dropkey)
    sizes = (heads, q.shape[-1], width, dropout)
    slices = triton.cdiv(width, tile["DV"])
    going_on: dict[str, Any] = {}
    with on_device(q):
        if len(before.query_work):
            partial, partial_lse = q.new_empty(*out.shape, dtype=torch.float32), torch.full_like(lse, -torch.inf)
            kernels.forward_kernel[(heads * slices * len(before.query_work),)](
                q if q_before is None else q_before, k, v, cache_k, cache_v, None if seeds is None else seeds[1:],
                before.spans, before.query_work, partial, partial_lse, *sizes, **flags, WHOLE=True
            )  # fmt: skip
            # else the compiler aims at 128 registers for sm_80 and spills six
            going_on = {"partial": partial, "partial_lse": partial_lse, "CONTINUES": True, "maxnreg": MOST_REGISTERS}
        kernels.forward_kernel[(heads * slices * len(own.query_work),)](
            q, k, v, cache_k, cache_v, seeds, own.spans, own.query_work, out, lse, *sizes, **flags, frame=chunk,
            **going_on
        )  # fmt: skip
    return out, lse


@window_op.register_fake
def _(q, q_before, k, v, cache_k, cache_v, first, seeds, chunk, shape, tables, dropout, dropkey):
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("megalodon::window_attention_backward", mutates_args=(), **MAKES_TABLES)
def window_backward_op(
    d_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    q_before: Tensor | None,
    k: Tensor,
    v: Tensor,
    cache_k: Tensor | None,
    cache_v: Tensor | None,
    first: Tensor | None,
    seeds: Tensor | None,
    chunk: int,
    shape: list[int],
    tables: list[Tensor],
    dropout: float,
    dropkey: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `window_op`: q, q_before, k, v, and those of the cache (empty where there is none)."""
    heads, width, dim, cached = q.shape[2], v.shape[-1], q.shape[-1], cache_k is not None
    block = _block_of(q, dropout > 0 or cached or first is not None)
    own, before = _plans(shape, tables, q, block)
    tile = shared.tiles(block, dim, width, cached)
    dq, d_turned, dk, dv = (torch.zeros_like(x) for x in (q, q, k, v))
    d_cache_k = torch.zeros_like(cache_k) if cache_k is not None else q.new_empty(0)
    d_cache_v = torch.zeros_like(cache_v) if cache_v is not None else q.new_empty(0)
    delta, rows, sizes = torch.empty_like(lse), lse.numel(), (heads, dim, width, dropout)
    turned = q if q_before is None else q_before
    slices = triton.cdiv(width, tile["values"]["DV"])
    passes = (
        (q, dq, own, seeds, chunk, False),
        (turned, d_turned, before, None if seeds is None else seeds[1:], 0, True),
    )
    with on_device(q):
        kernels.delta_kernel[(triton.cdiv(rows, 8),)](out, d_out, delta, width, rows, 8, 256)
        for query, d_query, plan, seed, frame, whole in passes:
            if not len(plan.query_work):
                continue
            flags = {
                name: _flags(tile[name], q, v, cached, first, dropout, dropkey) | {"frame": frame, "WHOLE": whole}
                for name in ("queries", "keys", "values")
            }
            inputs = (query, k, v, cache_k, cache_v, seed, plan.spans)
            kernels.query_gradients_kernel[(heads * len(plan.query_work),)](
                *inputs, plan.query_work, d_out, lse, delta, d_query, *sizes, **flags["queries"]
            )
            kernels.key_gradients_kernel[(heads * len(plan.key_work),)](
                *inputs, plan.key_work, d_out, lse, delta, dk, d_cache_k, *sizes, **flags["keys"], ADD=whole
            )
            kernels.value_gradients_kernel[(heads * slices * len(plan.key_work),)](
                query, k, cache_k, seed, plan.spans, plan.key_work, d_out, lse, dv, d_cache_v, *sizes,
                **flags["values"], ADD=whole
            )  # fmt: skip
    if q_before is None:
        dq, d_turned = dq + d_turned, q.new_empty(0)
    return dq, d_turned, dk, dv, d_cache_k, d_cache_v


@window_backward_op.register_fake
def _(d_out, out, lse, q, q_before, k, v, cache_k, cache_v, first, seeds, chunk, shape, tables, dropout, dropkey):
    optional = (q.new_empty(0) if x is None else torch.empty_like(x) for x in (q_before, cache_k, cache_v))
    d_turned, d_cache_k, d_cache_v = optional
    return torch.empty_like(q), d_turned, torch.empty_like(k), torch.empty_like(v), d_cache_k, d_cache_v


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.chunk, ctx.shape, tables, ctx.dropout, ctx.dropkey = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *tensors, *tables)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, _: Tensor | None):
    saved = ctx.saved_tensors  # once: under gradient checkpointing a second look is an error
    tensors, tables = saved[:10], list(saved[10:])
    rest = (*(None,) * 4, [None] * len(tables), None, None)
    if d_out is None:
        return *(None,) * 6, *rest
    dq, d_turned, dk, dv, d_cache_k, d_cache_v = torch.ops.megalodon.window_attention_backward(
        d_out.contiguous(), *tensors, ctx.chunk, ctx.shape, tables, ctx.dropout, ctx.dropkey
    )
    of_cache = (None, None) if tensors[6] is None else (d_cache_k, d_cache_v)
    return dq, None if tensors[3] is None else d_turned, dk, dv, *of_cache, *rest


window_op.register_autograd(_backward, setup_context=_setup_context)


def sliding_chunk_attention(
    q: Tensor,
    q_before: Tensor | None,
    k: Tensor,
    v: Tensor,
    prefix: Prefix,
    layout: Layout,
    segments: Segments | None,
    dropout: float,
    dropkey: bool,
) -> Tensor:
    """See `megalodon.ops.sliding_chunk_attention`; the tensors have a token at least, and pass `fits`."""
    chunk, open_width = layout.chunk_size, layout.longest_offset
    assert chunk is not None
    has_before = prefix.before is not None and layout.most_seen >= chunk
    parts = [] if not open_width or prefix.open is None else [tuple(x[:, :open_width] for x in prefix.open)]
    if has_before and prefix.before is not None:
        parts.append(prefix.before)
    cache: tuple[Tensor | None, Tensor | None] = (None, None)
    if parts:
        keys, values = (torch.cat([part[i] for part in parts], dim=1) for i in range(2))
        cache = keys.to(k.dtype).contiguous(), values.to(v.dtype).contiguous()
    first = first_visible(layout, segments)
    if first is not None:
        first = first.expand(q.shape[:2]).to(torch.int32).contiguous()
    shape, given = [chunk, layout.most_seen % chunk + (chunk if layout.most_seen >= chunk else 0), open_width], []
    if not isinstance(layout, PlainLayout):
        block = _block_of(q, dropout > 0 or cache[0] is not None or first is not None)
        plans = tables.two_chunk_windows(layout, open_width, block, has_before)
        given = [table for plan in plans for table in plan]
    seeds = torch.randint(2**31, (2,), device=q.device) if dropout > 0 else None
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    q_before = None if q_before is None else q_before.contiguous()
    out, _ = torch.ops.megalodon.window_attention(
        q, q_before, k, v, *cache, first, seeds, chunk, shape, given, dropout, dropkey
    )
    return out
