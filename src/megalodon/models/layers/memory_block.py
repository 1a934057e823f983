"""The block that Megalodon and its successor share: a norm over time, a long memory, gated attention, feed-forward.

The parts decide which architecture it is: any norm over time and any attention that keep the same promises. What they
remember is one `LayerState`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from megalodon.models.implicit import Path, banded
from megalodon.models.layers.feed_forward import FeedForward
from megalodon.models.layers.norms import RMSNorm, effective
from megalodon.ops.backend import full_precision
from megalodon.ops.layout import Layout, layout_of


class LayerState(NamedTuple):
    """One layer's memory: the norm's moments, CEMA's h complex [B, D, N], and what attention remembers (`chunk`)."""

    moments: Any
    cema: Tensor
    chunk: Any

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerState:
        """A state with copies of what `function` makes of each tensor."""
        return LayerState(self.moments.map(function), function(self.cema).clone(), self.chunk.map(function))

    def detach(self) -> LayerState:
        """The same state without its history."""
        return LayerState(self.moments.detach(), self.cema.detach(), self.chunk.detach())

    def cast(self, dtype: torch.dtype) -> LayerState:
        """The state with what attention remembers in `dtype`."""
        return self._replace(chunk=self.chunk.cast(dtype))

    def reset(self, rows: Tensor) -> LayerState:
        """The state in which the rows of a bool mask [B] begin afresh."""
        return LayerState(
            self.moments.reset(rows), self.cema.masked_fill(rows[:, None, None], 0), self.chunk.reset(rows)
        )

    @staticmethod
    def concatenate(layers: Sequence[LayerState]) -> LayerState:
        """One batch of the rows of several, in order."""
        first = layers[0]
        return LayerState(
            type(first.moments).concatenate([layer.moments for layer in layers]),
            torch.cat([layer.cema for layer in layers]),
            type(first.chunk).concatenate([layer.chunk for layer in layers]),
        )

    def fitted(self, position: Tensor, sizes: Any) -> LayerState:
        """The state without room that no row uses."""
        return self._replace(chunk=self.chunk.fitted(position, sizes))

    def resolved(self) -> LayerState:
        """The same with an h that is there as it reads: a user's expression may have left it conjugated lazily."""
        if torch.compiler.is_compiling() or not self.cema.is_conj():  # the operators' own results never are
            return self
        return self._replace(cema=self.cema.resolve_conj())

    def tensors(self, position: Tensor, sizes: Any) -> dict[str, Tensor]:
        """What is kept on disk, by name; h as (re, im) in the last dimension."""
        norm = {f"norm.{name}": tensor for name, tensor in self.moments.tensors(position, sizes).items()}
        return {**norm, "cema": torch.view_as_real(self.cema), **self.chunk.tensors(position, sizes)}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], moments: Any, chunk: Any) -> LayerState:
        """The inverse of `tensors`, given the classes of what the norm and the attention remember."""
        norm = {name.removeprefix("norm."): x for name, x in tensors.items() if name.startswith("norm.")}
        return LayerState(
            moments.from_tensors(norm),
            torch.view_as_complex(tensors["cema"].contiguous()),
            chunk.from_tensors(tensors),
        )


class MemoryBlock(GradientCheckpointingLayer):
    """A pre-norm block of five parts.

    Args:
        timestep_norm: `(x, moments, layout) -> (normalised x, moments)`.
        cema: the long memory, `(n, h, layout) -> (m, h)`.
        memory_norm: of what the long memory gives.
        attention: `(n, m, turns, memory, layout, use_cache) -> (residual branch, memory or None)`.
        feed_forward: the second residual branch, with its norm.
        hidden_dropout: after the memory's norm. dropout: of the first residual branch.
        two_hop: the second residual adds the block's input, not the first residual's sum.
    """

    timestep_norm: Any  # parts that differ by architecture
    cema: Any
    attention: Any
    _can_checkpoint_with_cache = True  # the state is a value, not a store: computing it again changes nothing

    def __init__(
        self,
        timestep_norm: nn.Module,
        cema: nn.Module,
        memory_norm: RMSNorm,
        attention: nn.Module,
        feed_forward: FeedForward,
        *,
        hidden_dropout: float,
        dropout: float,
        two_hop: bool,
    ) -> None:
        super().__init__()
        self.timestep_norm, self.cema, self.memory_norm = timestep_norm, cema, memory_norm
        self.attention, self.feed_forward = attention, feed_forward
        self.hidden_dropout, self.dropout, self.two_hop = hidden_dropout, dropout, two_hop

    def forward(
        self, x: Tensor, state: LayerState | None, turns: Tensor, layout: Layout, use_cache: bool
    ) -> tuple[Tensor, LayerState | None]:
        """x [B, L, D] and this layer's memory of what came before -> (out [B, L, D], the memory after it or None)."""
        n, moments = self.timestep_norm(x, None if state is None else state.moments, layout)
        m, h = self.cema(n, None if state is None else state.cema, layout)
        m = F.dropout(self.memory_norm(m), self.hidden_dropout, self.training)
        branch, chunk = self.attention(n, m, turns, None if state is None else state.chunk, layout, use_cache)
        y = x + F.dropout(branch, self.dropout, self.training)
        out = (x if self.two_hop else y) + self.feed_forward(y)
        return out, None if chunk is None else LayerState(moments, h, chunk)

    def paths(self, x: Tensor, turns: Any, layout: Layout) -> list[Path]:
        """The implicit attention of the first residual branch for the block's input x [B, L, D]."""
        return memory_paths(self.timestep_norm, self.cema, self.memory_norm, self.attention, x, turns, layout)


def memory_paths(
    timestep_norm: Any, cema: Any, memory_norm: RMSNorm, attention: Any, x: Tensor, turns: Any, layout: Layout
) -> list[Path]:
    """The implicit attention of norm, long memory and gated attention, of rows that have read nothing.

    Two paths: "memory", from the normalised input through the moving average and its norm, and "attention", from the
    values of the same input. What the memory does to queries, keys and gates is in the matrices.
    """
    n, _ = timestep_norm(x, None, layout)
    m, _ = cema(n, None, layout)
    batch, length, dim = n.shape
    impulse = torch.zeros(1, length, dim, dtype=n.dtype, device=n.device)
    impulse[:, 0] = 1
    kernel = cema(impulse, None, layout_of(1, length, x.device))[0][0].t().flip(1)
    matrix = banded(kernel, length)[None].expand(batch, -1, -1, -1)
    if layout.segments is not None:
        numbers = layout.segments.bos.cumsum(1)
        matrix = matrix * (numbers[:, :, None] == numbers[:, None])[:, None]
    wide = full_precision(m.dtype)
    parts = m.to(wide).unflatten(-1, (memory_norm.groups, -1))
    gate = torch.rsqrt(parts.square().mean(-1, keepdim=True) + memory_norm.eps).expand_as(parts).flatten(-2)
    weight = effective(memory_norm.weight, wide)
    gate = gate if weight is None else gate * weight
    normed = memory_norm(m)
    h_proj = attention.h_proj
    memory = Path(
        "memory", n[..., None], ((matrix, gate[..., None]),), normed[..., None], h_proj.weight, bias=h_proj.bias
    )
    return [memory, *attention.paths(n, normed, turns, layout)]
