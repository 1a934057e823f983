"""A block whose channels, or whose rows, are cut over ranks: `MemoryBlock.forward` with what must travel put in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from megalodon import ops
from megalodon.models.layers.chunk_attention import GatedChunkAttention
from megalodon.models.layers.memory_block import LayerState, MemoryBlock
from megalodon.models.layers.norms import LayerNorm, RMSNorm
from megalodon.models.layers.open_chunk import OpenChunk
from megalodon.models.layers.timestep_decay_norm import DecayedMoments, TimestepDecayNorm
from megalodon.models.layers.timestep_norm import Moments, TimestepNorm
from megalodon.models.layers.window import Window
from megalodon.models.layers.window_attention import Found, GatedWindowAttention, Queries
from megalodon.ops.layout import Layout
from megalodon.parallel import tensor
from megalodon.parallel.chunk import (
    CEMAOverSpans,
    attention_prefix,
    open_chunk_after,
    timestep_norm_over_spans,
)
from megalodon.parallel.collectives import Group, gather_last, scatter_last
from megalodon.parallel.spans import SpanLayout
from megalodon.parallel.window import timestep_decay_norm_over_spans, window_attention_over_spans


@dataclass(frozen=True)
class Axes:
    """The groups a block talks to; None for an axis of one rank."""

    tensor: Group | None
    chunk: Group | None


class ParallelTimestepNorm(TimestepNorm):
    """`TimestepNorm` of this rank's groups and span."""

    axes: Axes

    def forward(self, x: Tensor, moments: Moments | None, layout: Layout) -> tuple[Tensor, Moments]:
        with tensor.local_parameters(self):
            if self.axes.chunk is None:
                return super().forward(x, moments, layout)
            assert isinstance(layout, SpanLayout)
            return timestep_norm_over_spans(self, x, moments, layout, self.axes.chunk)


class ParallelTimestepDecayNorm(TimestepDecayNorm):
    """`TimestepDecayNorm` of this rank's groups and span."""

    axes: Axes

    def forward(self, x: Tensor, moments: DecayedMoments | None, layout: Layout) -> tuple[Tensor, DecayedMoments]:
        with tensor.local_parameters(self):
            if self.axes.chunk is None:
                return super().forward(x, moments, layout)
            assert isinstance(layout, SpanLayout)
            return timestep_decay_norm_over_spans(self, x, moments, layout, self.axes.chunk)


class ParallelAttention(GatedChunkAttention):
    """`GatedChunkAttention` of this rank's heads and span."""

    axes: Axes

    def attend(
        self,
        queries: tuple[Tensor, Tensor],
        v: Tensor,
        open_chunk: OpenChunk | None,
        layout: Layout,
        use_cache: bool,
        activates: bool = False,
    ) -> tuple[Tensor, OpenChunk | None]:
        group = self.axes.chunk
        if group is None:
            return super().attend(queries, v, open_chunk, layout, use_cache, activates)
        v = F.silu(v) if activates else v
        assert isinstance(layout, SpanLayout)
        q, k = queries
        after = open_chunk_after(k, v, open_chunk, layout, group) if use_cache else None
        prefix_k, prefix_v, v = attention_prefix(k, v, open_chunk, layout, group)
        out = ops.chunk_attention(
            q,
            k,
            v,
            self.chunk_size,
            prefix_k=prefix_k,
            prefix_v=prefix_v,
            dropout=self.attention_dropout if self.training else 0.0,
            dropkey=self.dropkey,
            layout=layout,
        )
        return out, after


class ParallelWindowAttention(GatedWindowAttention):
    """`GatedWindowAttention` of this rank's heads and span."""

    axes: Axes

    def attend(
        self, queries: Queries, v: Tensor, window: Window | None, layout: Layout, use_cache: bool
    ) -> tuple[Found, Window | None]:
        group = self.axes.chunk
        if group is None:
            return super().attend(queries, v, window, layout, use_cache)
        assert isinstance(layout, SpanLayout)
        dropout = self.attention_dropout if self.training else 0.0
        return window_attention_over_spans(queries, v, window, layout, group, use_cache, dropout, self.dropkey)


class ParallelBlock(MemoryBlock):
    """`MemoryBlock` on a mesh with a tensor or a chunk axis: the residual stream is [B, l, D / T]."""

    axes: Axes

    def forward(
        self, x: Tensor, state: LayerState | None, turns: Any, layout: Layout, use_cache: bool
    ) -> tuple[Tensor, LayerState | None]:
        n, moments = self.timestep_norm(x, None if state is None else state.moments, layout)
        m, v, h = self._memory_and_values(n, None if state is None else state.cema, layout)
        branch, open_chunk = self._attention(m, v, turns, None if state is None else state.chunk, layout, use_cache)
        y = x + F.dropout(branch, self.dropout, self.training)
        out = (x if self.two_hop else y) + self._feed_forward(y)
        return out, None if open_chunk is None else LayerState(moments, h, open_chunk)

    def _memory_and_values(self, n: Tensor, carried: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """The normalised memory [B, l, D], the values [B, l, H / T, V / H], and CEMA's state after the row."""
        axes, attention = self.axes, self.attention
        with tensor.local_parameters(self.cema):
            if axes.chunk is None:
                m, h = self.cema(n, carried, layout)
                v = attention.v_proj(gather_last(n, axes.tensor))
            else:
                assert isinstance(layout, SpanLayout)
                over_spans = CEMAOverSpans(self.cema, n, carried, layout, axes.chunk)
                v = attention.v_proj(gather_last(n, axes.tensor))  # while the summaries travel
                m, h = over_spans.finish()
        m = F.dropout(_norm(self.memory_norm, m, axes.tensor), self.hidden_dropout, self.training)
        v = F.silu(v).unflatten(-1, (attention.num_heads, -1))
        return gather_last(m, axes.tensor), v, h

    def _attention(
        self, m: Tensor, v: Tensor, turns: Any, memory: Any, layout: Layout, use_cache: bool
    ) -> tuple[Tensor, Any]:
        """The attention's `forward`, given the values; gives this rank's channels [B, l, D / T]."""
        attention = self.attention
        with tensor.local_parameters(attention):
            queries = attention.queries(m, turns)
        found, memory = attention.attend(queries, v, memory, layout, use_cache)
        gated = attention.gated(attention.r_proj(m), found)
        return attention.h_proj(m) + scatter_last(attention.o_proj(gated), self.axes.tensor), memory

    def _feed_forward(self, y: Tensor) -> Tensor:
        """`FeedForward.forward` of this rank's channels and hidden units."""
        layer = self.feed_forward
        n = gather_last(_norm(layer.norm, y, self.axes.tensor), self.axes.tensor)
        up = layer.up_proj(n)
        hidden = F.silu(up) if layer.gate_proj is None else ops.silu_product(up, layer.gate_proj(n))
        out = scatter_last(layer.down_proj(F.dropout(hidden, self.hidden_dropout, self.training)), self.axes.tensor)
        out = F.dropout(out, self.dropout, self.training)
        return out if layer.alpha is None else out * tensor.local(layer.alpha)


def _norm(norm: RMSNorm | LayerNorm, x: Tensor, group: Group | None) -> Tensor:
    if group is None:
        return norm(x)
    with tensor.local_parameters(norm):
        if norm.groups > 1:  # whole groups on each rank
            return norm(x)
        return tensor.rms_norm(norm, x, group) if isinstance(norm, RMSNorm) else tensor.layer_norm(norm, x, group)


def parallelize_blocks(root: nn.Module, axes: Axes) -> None:
    """Turn a model's plain blocks and norms into parallel ones, in place; parameters stay as they are."""
    ranks, rank = (1, 0) if axes.tensor is None else (axes.tensor.size(), axes.tensor.rank())
    for module in root.modules():
        kind = ParallelBlock if isinstance(module, MemoryBlock) else _KINDS.get(type(module))
        if kind is not None:
            module.__class__ = kind
            module.axes = axes  # type: ignore[assignment]  # a type checker takes a module's attributes for modules
        if isinstance(module, TimestepNorm | TimestepDecayNorm):
            module.num_groups //= ranks
        if isinstance(module, RMSNorm | LayerNorm) and module.groups > 1:
            module.groups //= ranks
        if isinstance(module, GatedChunkAttention | GatedWindowAttention):
            module.num_heads //= ranks
        if isinstance(module, GatedWindowAttention):  # the first heads of all are rotated
            module.rotated_heads = min(max(module.rotated_heads - rank * module.num_heads, 0), module.num_heads)


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    TimestepNorm: ParallelTimestepNorm,
    TimestepDecayNorm: ParallelTimestepDecayNorm,
    GatedChunkAttention: ParallelAttention,
    GatedWindowAttention: ParallelWindowAttention,
}
