"""Chunk attention on a GPU in strips, for values much wider than keys, as an operator that autograd and torch.compile
know.

The fused kernels of `triton.py` hold no score in memory, but make the scores anew for each slice of the values, eight
times for values of 2048 channels. Here a strip of a chunk's weights is written once, in the dtype of the values, and
cuBLAS multiplies it with all of them. The strip stays in the cache of the GPU; no C x C tensor ever exists.

Forward takes strips of queries, which need the keys up to their last row. Backward takes strips of keys, so that the
wide gradient of the values is one product for each; only that of the narrow queries is summed, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from megalodon.ops import launch
from megalodon.ops.chunk_attention import spans as tables
from megalodon.ops.chunk_attention import strip_kernels as kernels
from megalodon.ops.chunk_attention.spans import Group
from megalodon.ops.chunk_attention.triton_kernels import delta_kernel
from megalodon.ops.launch import on_device

ROWS_AT_ONCE = 2048
"""Rows of a strip, over all spans or heads that it is taken in: products as large fill a GPU, and weights of so many
rows and 4096 keys are 16 MiB."""

STRIP = (128, 512)
"""Fewest and most rows of a strip in one span. What lies above the diagonal in a strip is multiplied for nothing."""


def tile(dtype: torch.dtype, key: int, hopper: bool) -> dict[str, int]:
    """Block sizes of the kernels: BM queries, BN keys, DK channels in steps of DS; warps and stages. None spills."""
    queries, step = (128 if hopper else 64, 64) if dtype == torch.bfloat16 else (64 if hopper else 32, 32)
    width = max(triton.next_power_of_2(key), 16)
    return {"BM": queries, "BN": 64, "DK": width, "DS": min(width, step), "num_warps": 8, "num_stages": 3}


class _Panel(NamedTuple):
    """The spans of one head, or the heads of one span, that are worked on together."""

    group: Group
    span: int
    spans: int
    head: int
    heads: int

    @property
    def parts(self) -> int:
        return max(self.spans, self.heads)

    @property
    def rows(self) -> int:
        """Rows of a strip in each."""
        return min(max(ROWS_AT_ONCE // self.parts // STRIP[0] * STRIP[0], STRIP[0]), STRIP[1])

    def queries_of(self, x: Tensor) -> Tensor:
        """x [B, L, H, d] -> [parts, queries, d]: rows of these spans and heads, without a copy."""
        return self._view(x, self.group.first_query, self.group.query_step, self.group.queries)

    def keys_of(self, x: Tensor) -> Tensor:
        """x [B, K, H, d] -> [parts, keys, d]."""
        return self._view(x, self.group.first_key, self.group.key_step, self.group.keys)

    def _view(self, x: Tensor, first: int, step: int, rows: int) -> Tensor:
        heads, width = x.shape[2:]
        between = step * heads * width if self.spans > 1 else width
        start = ((first + self.span * step) * heads + self.head) * width
        size, strides = (self.parts, rows, width), (between, heads * width, 1)
        return x.as_strided(size, strides, x.storage_offset() + start)

    def arguments(self) -> tuple[int, ...]:
        """What `weights_kernel` wants to know of it."""
        group, several = self.group, int(self.spans > 1)
        return (
            group.first_query + self.span * group.query_step,
            several * group.query_step,
            group.first_key + self.span * group.key_step,
            several * group.key_step,
            self.head,
            int(self.heads > 1),
            group.queries,
            group.keys,
        )


def _panels(group: Group, heads: int) -> Iterator[_Panel]:
    if group.spans <= heads:
        for span in range(group.spans):
            yield _Panel(group, span, 1, 0, heads)
        return
    most = ROWS_AT_ONCE // STRIP[0]
    for head in range(heads):
        for span in range(0, group.spans, most):
            yield _Panel(group, span, min(most, group.spans - span), head, 1)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out = a @ b`, batched; out may be float32 where a and b are bfloat16, and is never rounded to that."""
    if a.dtype == out.dtype:
        torch.bmm(a, b, out=out)
    elif a.device.type == "cuda":
        torch.bmm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.bmm(a.to(out.dtype), b.to(out.dtype), out=out)


def _add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`out += a @ b`, as `_product`."""
    if a.dtype == out.dtype:
        out.baddbmm_(a, b)
    elif a.device.type == "cuda":
        torch.baddbmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.baddbmm_(a.to(out.dtype), b.to(out.dtype))


class _Buffer:
    """Memory for matrices [n, rows, columns] whose rows begin at multiples of 16 elements, kept for all strips."""

    def __init__(self, like: Tensor, elements: int, dtype: torch.dtype) -> None:
        self._memory = like.new_empty(elements, dtype=dtype)

    def matrices(self, count: int, rows: int, columns: int) -> Tensor:
        width = padded(columns)
        return self._memory[: count * rows * width].view(count, rows, width)[:, :, :columns]


def padded(columns: int) -> int:
    """Elements of a row in memory."""
    return -(-columns // 16) * 16


def _buffer_size(groups: list[Group], heads: int) -> int:
    """Elements of the largest strip of any panel, of queries or of keys."""
    panels = (panel for group in groups for panel in _panels(group, heads))
    return max(p.parts * max(p.rows * padded(p.group.keys), p.group.queries * padded(p.rows)) for p in panels)


def _launch_weights(
    panel: _Panel,
    tensors: tuple[Tensor | None, ...],
    sizes: tuple[int, int],
    rows: range,
    keys: range,
    weights: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor] | None,
    dropout: float,
    flags: dict[str, Any],
) -> None:
    """`weights_kernel` for queries `rows` and `keys` of a panel; gradients are (delta, d_weights, d_scores)."""
    tiles = triton.cdiv(len(rows), flags["BM"]) * triton.cdiv(len(keys), flags["BN"])
    delta, d_weights, d_scores = gradients or (None, None, None)
    kernels.weights_kernel[(tiles * panel.parts,)](
        *tensors, delta, d_weights, weights, d_scores, *sizes, *panel.arguments(), rows.start, rows.stop, keys.start,
        keys.stop, padded(len(keys)), dropout, GRADIENT=gradients is not None,
        DROPOUT=dropout > 0 and not flags["DROPKEY"], **flags
    )  # fmt: skip


def _flags(q: Tensor, dropout: float, dropkey: bool) -> dict[str, Any]:
    sizes = tile(q.dtype, q.shape[-1], launch.capability(q) >= (9, 0))
    return {**sizes, "FULL": sizes["DK"] == q.shape[-1], "DROPKEY": dropout > 0 and dropkey}


def _groups(q: Tensor, k: Tensor, shape: list[int], groups: list[int]) -> list[Group]:
    """The groups given, or those of a plain batch: shape is [chunk size], or [0, offset] for one window of each row."""
    if groups:
        size = len(Group._fields)
        return [Group(*groups[i : i + size]) for i in range(0, len(groups), size)]
    if len(shape) == 1:
        return list(tables.groups_of_chunks(*q.shape[:2], shape[0]))
    return list(tables.groups_of_window(*q.shape[:2], k.shape[1], shape[1]))


@torch.library.custom_op("megalodon::strip_attention", mutates_args=())
def strip_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor | None,
    shape: list[int],
    groups: list[int],
    dropout: float,
    dropkey: bool,
) -> tuple[Tensor, Tensor]:
    """q [B, L, H, d], k [B, K, H, d], v [B, K, H, e] -> (out [B, L, H, e], lse float32 [B, L, H]).

    All contiguous and of one dtype, bfloat16 or float32. `shape` describes a plain batch, `groups` (the numbers of
    `Group`s, one after another) any other; tokens in no group give zero. seed int64 [1], with dropout only.
    """
    heads, dim = q.shape[2:]
    plan, flags = _groups(q, k, shape, groups), _flags(q, dropout, dropkey)
    out = q.new_zeros(*q.shape[:3], v.shape[-1]) if groups else q.new_empty(*q.shape[:3], v.shape[-1])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    buffer = _Buffer(v, _buffer_size(plan, heads), v.dtype)
    with on_device(q):
        for group in plan:
            blocks = triton.cdiv(group.queries, flags["BM"])
            where = group.first_query, group.query_step, group.first_key, group.key_step, group.queries, group.keys
            kernels.normaliser_kernel[(blocks * heads * group.spans,)](
                q, k, seed, lse, heads, dim, *where, group.spans, dropout, **flags
            )
            for panel in _panels(group, heads):
                values, target = panel.keys_of(v), panel.queries_of(out)
                for start in range(0, group.queries, panel.rows):
                    rows = range(start, min(start + panel.rows, group.queries))
                    keys = range(rows.stop + group.keys - group.queries)
                    weights = buffer.matrices(panel.parts, len(rows), len(keys))
                    _launch_weights(panel, (q, k, seed, lse), (heads, dim), rows, keys, weights, None, dropout, flags)
                    _product(weights, values[:, : len(keys)], target[:, rows.start : rows.stop])
    return out, lse


@strip_attention_op.register_fake
def _(q, k, v, seed, shape, groups, dropout, dropkey):
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("megalodon::strip_attention_backward", mutates_args=())
def strip_attention_backward_op(
    d_out: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor | None,
    shape: list[int],
    groups: list[int],
    dropout: float,
    dropkey: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `strip_attention_op`: dq, dk, dv."""
    heads, dim = q.shape[2:]
    plan, flags = _groups(q, k, shape, groups), _flags(q, dropout, dropkey)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = torch.empty_like(lse)
    size = _buffer_size(plan, heads)
    weight_buffer, score_buffer = _Buffer(v, size, v.dtype), _Buffer(v, size, v.dtype)
    wide_buffer = _Buffer(v, size, torch.float32)
    with on_device(q):
        delta_kernel[(triton.cdiv(lse.numel(), 8),)](out, d_out, delta, v.shape[-1], lse.numel(), 8, 256)
        for group in plan:
            shift = group.keys - group.queries
            for panel in _panels(group, heads):
                queries, upstream = panel.queries_of(q), panel.queries_of(d_out)
                key_rows, values = panel.keys_of(k), panel.keys_of(v)
                to_keys, to_values = panel.keys_of(dk), panel.keys_of(dv)
                to_queries = q.new_zeros(queries.shape, dtype=torch.float32)
                for start in range(0, group.keys, panel.rows):
                    keys = range(start, min(start + panel.rows, group.keys))
                    rows = range(max(start - shift, 0), group.queries)
                    of_rows, of_keys = slice(rows.start, rows.stop), slice(keys.start, keys.stop)
                    sizes = panel.parts, len(rows), len(keys)
                    weights, d_scores = weight_buffer.matrices(*sizes), score_buffer.matrices(*sizes)
                    d_weights = wide_buffer.matrices(*sizes)
                    _product(upstream[:, of_rows], values[:, of_keys].transpose(1, 2), d_weights)
                    _launch_weights(
                        panel, (q, k, seed, lse), (heads, dim), rows, keys, weights, (delta, d_weights, d_scores),
                        dropout, flags
                    )  # fmt: skip
                    _product(weights.transpose(1, 2), upstream[:, of_rows], to_values[:, of_keys])
                    _product(d_scores.transpose(1, 2), queries[:, of_rows], to_keys[:, of_keys])
                    _add_product(d_scores, key_rows[:, of_keys], to_queries[:, of_rows])
                panel.queries_of(dq).copy_(to_queries)
    return dq, dk, dv


@strip_attention_backward_op.register_fake
def _(d_out, out, lse, q, k, v, seed, shape, groups, dropout, dropkey):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, seed, ctx.shape, ctx.groups, ctx.dropout, ctx.dropkey = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, q, k, v, seed)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, _: Tensor | None):
    if d_out is None:
        return (None,) * 8
    gradients = torch.ops.megalodon.strip_attention_backward(
        d_out.contiguous(), *ctx.saved_tensors, ctx.shape, ctx.groups, ctx.dropout, ctx.dropkey
    )
    return *gradients, *(None,) * 5


strip_attention_op.register_autograd(_backward, setup_context=_setup_context)


def attend(
    q: Tensor, k: Tensor, v: Tensor, shape: list[int], groups: tuple[Group, ...], dropout: float, dropkey: bool
) -> Tensor:
    """Attention of a plain batch (`shape`: [chunk size], or [0, offset] for one window of each row) or of groups."""
    seed = torch.randint(2**31, (1,), device=q.device) if dropout > 0 else None
    numbers = [number for group in groups for number in group]
    tensors = (x.contiguous() for x in (q, k, v))
    out, _ = torch.ops.megalodon.strip_attention(*tensors, seed, shape, numbers, dropout, dropkey)
    return out
