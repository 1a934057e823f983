"""Gecko's own token mixer: TimestepDecayNorm, CEMA, attention over two chunks and a working memory (2601.06463)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from megalodon.models.gecko.block import norm_over_time
from megalodon.models.gecko.cema import GeckoCEMA
from megalodon.models.gecko.config import GeckoConfig
from megalodon.models.implicit import Path
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.base import Memory, Mixer
from megalodon.models.kin.mixers.megalodon import BlockParameters
from megalodon.models.layers.memory_block import memory_paths
from megalodon.models.layers.norms import RMSNorm
from megalodon.models.layers.open_chunk import OpenChunk
from megalodon.models.layers.timestep_decay_norm import DecayedMoments
from megalodon.models.layers.window import Window
from megalodon.models.layers.window_attention import GatedWindowAttention, Turns
from megalodon.ops.backend import accumulator_dtype, full_precision
from megalodon.ops.layout import Layout


@dataclass(frozen=True)
class GeckoMemory(Memory):
    """count [B], mean, var [B, groups] of the norm; average [B, D, N, 2], CEMA's h as (re, im); keys [B, n, H, 2d] and
    values [B, n, H, e] of the open chunk and of the one before it; working [B, H, d, e] and log_mass [B, H, d] of all
    chunks before those."""

    GROWING: ClassVar[frozenset[str]] = frozenset({"keys", "values", "before_keys", "before_values"})

    PARTS: ClassVar[Mapping[str, frozenset[str]]] = MappingProxyType(
        {
            "average": frozenset({"average"}),
            "statistics": frozenset({"count", "mean", "var"}),
            "working_memory": frozenset({"working", "log_mass"}),
        }
    )

    count: Tensor
    mean: Tensor
    var: Tensor
    average: Tensor
    keys: Tensor
    values: Tensor
    before_keys: Tensor
    before_values: Tensor
    working: Tensor
    log_mass: Tensor

    def window(self) -> Window:
        """What attention remembers, without segments of BOS tokens."""
        before = OpenChunk(self.before_keys, self.before_values)
        return Window.without_segments(OpenChunk(self.keys, self.values), before, self.working, self.log_mass)


class GeckoMixer(Mixer):
    """The first residual branch of a Gecko block."""

    kind = "constant"
    own_rotary = True

    class Parameters(BlockParameters):
        mixer = "gecko"

        def sizes(self, config: KinConfig) -> GeckoConfig:
            return GeckoConfig(**self.widths(config, 500000.0))

    def __init__(self, config: KinConfig, layer_index: int, parameters: Parameters) -> None:
        super().__init__(config, layer_index, parameters)
        self.sizes = parameters.sizes(config)
        self.timestep_norm = norm_over_time(self.sizes)
        self.cema = GeckoCEMA(self.sizes.model_dim, self.sizes.cema_ndim)
        self.memory_norm = RMSNorm(self.sizes.model_dim, self.sizes.norm_eps, True)
        self.attention = GatedWindowAttention(self.sizes)

    def paths(self, x: Tensor, layout: Layout) -> list[Path]:
        chunked = layout.with_chunks(self.sizes.chunk_size)
        turns = Turns.of(self.sizes, chunked.chunk_positions)
        return memory_paths(self.timestep_norm, self.cema, self.memory_norm, self.attention, x, turns, chunked)

    @classmethod
    def multiply_adds(cls, config: KinConfig, parameters: Any, length: int) -> float:
        return parameters.sizes(config).sequence_multiply_adds(length)

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> GeckoMemory:
        own, wide, sums = self.sizes, full_precision(dtype), accumulator_dtype(device)
        heads, key, value = own.num_heads, own.z_dim // own.num_heads, own.value_dim // own.num_heads

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(batch, *shape, device=device, dtype=dtype)

        return GeckoMemory(
            count=zeros(dtype=torch.int64),
            mean=zeros(own.norm_num_groups, dtype=sums),
            var=zeros(own.norm_num_groups, dtype=sums),
            average=zeros(own.model_dim, own.cema_ndim, 2, dtype=wide),
            keys=zeros(0, heads, 2 * key, dtype=dtype),
            values=zeros(0, heads, value, dtype=dtype),
            before_keys=zeros(0, heads, 2 * key, dtype=dtype),
            before_values=zeros(0, heads, value, dtype=dtype),
            working=zeros(heads, key, value, dtype=wide),
            log_mass=zeros(heads, key, dtype=wide),
        )

    def forward(self, x: Tensor, memory: GeckoMemory | None, layout: Layout) -> tuple[Tensor, GeckoMemory]:
        chunked = layout.with_chunks(self.sizes.chunk_size)
        moments = h = window = None
        if memory is not None:
            moments = DecayedMoments(memory.count, memory.mean, memory.var)
            h, window = torch.view_as_complex(memory.average.contiguous()), memory.window()
        n, moments = self.timestep_norm(x, moments, chunked)
        m, h = self.cema(n, h, chunked)
        turns = Turns.of(self.sizes, chunked.chunk_positions)
        out, window = self.attention(n, self.memory_norm(m), turns, window, chunked, True)
        return out, self._memory(moments, h, window, chunked)

    def _memory(self, moments: DecayedMoments, h: Tensor, window: Window, layout: Layout) -> GeckoMemory:
        ends, size = layout.end_positions, self.sizes.chunk_size
        opened = int((ends % size).max(initial=0))
        before = size if int(ends.max(initial=0)) >= size else 0
        return GeckoMemory(
            moments.count,
            moments.mean,
            moments.var,
            torch.view_as_real(h),
            window.open.keys[:, :opened],
            window.open.values[:, :opened],
            window.before.keys[:, :before],
            window.before.values[:, :before],
            window.memory,
            window.log_mass.masked_fill(window.log_mass.isinf(), 0),  # of rows that have absorbed nothing: not read
        )
