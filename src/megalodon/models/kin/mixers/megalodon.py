"""Megalodon's own token mixer: TimestepNorm, CEMA and gated attention in chunks (2404.08801)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from megalodon import ops
from megalodon.models.gated_attention_config import GatedAttentionConfig
from megalodon.models.implicit import Path
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.base import AtLeastOne, Memory, Mixer, MixerParameters
from megalodon.models.layers.cema import CEMA
from megalodon.models.layers.chunk_attention import GatedChunkAttention
from megalodon.models.layers.memory_block import memory_paths
from megalodon.models.layers.norms import RMSNorm
from megalodon.models.layers.open_chunk import OpenChunk
from megalodon.models.layers.timestep_norm import Moments, TimestepNorm
from megalodon.models.megalodon.config import MegalodonConfig
from megalodon.ops.backend import accumulator_dtype, full_precision
from megalodon.ops.layout import Layout


@dataclass(frozen=True)
class MegalodonMemory(Memory):
    """mean, var: [B, groups] of the norm; average: [B, D, N, 2], CEMA's h as (re, im); keys, values: [B, n, H, d] and
    [B, n, H, e] of the open chunk, at most a chunk of them."""

    GROWING: ClassVar[frozenset[str]] = frozenset({"keys", "values"})

    PARTS: ClassVar[Mapping[str, frozenset[str]]] = MappingProxyType({"average": frozenset({"average"})})

    mean: Tensor
    var: Tensor
    average: Tensor
    keys: Tensor
    values: Tensor


class BlockParameters(MixerParameters):
    """z_dim, value_dim: widths of queries and keys, and of values, all heads together; None: an even quarter of the
    model's, and twice it. heads: None: as many as divide z_dim. cema_ndim: N. chunk_size: C. norm_groups: of the norm
    over time; None: as many of 32 as divide the width."""

    mixer: ClassVar[str]

    z_dim: AtLeastOne | None = None
    value_dim: AtLeastOne | None = None
    heads: AtLeastOne | None = None
    cema_ndim: AtLeastOne = 16
    chunk_size: AtLeastOne = 2048
    norm_groups: AtLeastOne | None = None

    def sizes(self, config: KinConfig) -> GatedAttentionConfig:
        """Those of one layer, as the architecture's own modules take them."""
        raise NotImplementedError

    def check(self, config: KinConfig) -> None:
        try:
            self.sizes(config)
        except ValueError as error:
            raise ValueError(f"{self.mixer}: {error}") from None

    def widths(self, config: KinConfig, rope_base: float) -> dict[str, Any]:
        """The fields that both architectures have, with defaults that fit the model's width."""
        dim, z_dim = config.model_dim, self.z_dim or max(config.model_dim // 8 * 2, 2)
        groups = [count for count in range(1, 33) if dim % count == 0 and count < dim]
        fitting = [heads for heads in range(1, config.num_heads + 1) if z_dim % (2 * heads) == 0]
        return {
            "vocab_size": 1,
            "num_layers": 1,
            "model_dim": dim,
            "z_dim": z_dim,
            "value_dim": self.value_dim or 2 * dim,
            "num_heads": self.heads or max(fitting, default=1),
            "ffn_hidden_dim": 1,
            "cema_ndim": self.cema_ndim,
            "chunk_size": self.chunk_size,
            "norm_num_groups": self.norm_groups or max(groups, default=1),
            "rope_base": rope_base if config.rope_base is None else config.rope_base,
        }


class MegalodonMixer(Mixer):
    """The first residual branch of a Megalodon block. The kin's block has a residual of its own for the second hop."""

    kind = "constant"
    own_rotary = True

    class Parameters(BlockParameters):
        mixer = "megalodon"

        def sizes(self, config: KinConfig) -> MegalodonConfig:
            return MegalodonConfig(**self.widths(config, 10000.0))

    def __init__(self, config: KinConfig, layer_index: int, parameters: Parameters) -> None:
        super().__init__(config, layer_index, parameters)
        own = parameters.sizes(config)
        self.sizes, self.rope_base = own, own.rope_base
        self.timestep_norm = TimestepNorm(own.model_dim, own.norm_num_groups, 0, own.norm_eps)
        self.cema = CEMA(own.model_dim, own.cema_ndim)
        self.memory_norm = RMSNorm(own.model_dim, own.norm_eps, True)
        self.attention = GatedChunkAttention(own)

    def paths(self, x: Tensor, layout: Layout) -> list[Path]:
        chunked = layout.with_chunks(self.sizes.chunk_size)
        turns = ops.rotations(chunked.chunk_positions, self.sizes.head_dim, self.rope_base)
        return memory_paths(self.timestep_norm, self.cema, self.memory_norm, self.attention, x, turns, chunked)

    @classmethod
    def multiply_adds(cls, config: KinConfig, parameters: Any, length: int) -> float:
        return parameters.sizes(config).sequence_multiply_adds(length)

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> MegalodonMemory:
        own, sums = self.sizes, accumulator_dtype(device)
        moments = (torch.zeros(batch, own.norm_num_groups, device=device, dtype=sums) for _ in range(2))
        wide = full_precision(dtype)
        mean, var = moments
        return MegalodonMemory(
            mean,
            var,
            torch.zeros(batch, own.model_dim, own.cema_ndim, 2, device=device, dtype=wide),
            torch.zeros(batch, 0, own.num_heads, own.head_dim, device=device, dtype=dtype),
            torch.zeros(batch, 0, own.num_heads, own.value_head_dim, device=device, dtype=dtype),
        )

    def forward(self, x: Tensor, memory: MegalodonMemory | None, layout: Layout) -> tuple[Tensor, MegalodonMemory]:
        chunked = layout.with_chunks(self.sizes.chunk_size)
        moments = h = chunk = None
        if memory is not None:
            moments, h = Moments(memory.mean, memory.var), torch.view_as_complex(memory.average.contiguous())
            chunk = OpenChunk(memory.keys, memory.values)
        n, moments = self.timestep_norm(x, moments, chunked)
        m, h = self.cema(n, h, chunked)
        turns = ops.rotations(chunked.chunk_positions, self.sizes.head_dim, self.rope_base)
        out, chunk = self.attention(n, self.memory_norm(m), turns, chunk, chunked, True)
        open_tokens = int((chunked.end_positions % self.sizes.chunk_size).max(initial=0))
        keys, values = (kept[:, :open_tokens] for kept in chunk)
        return out, MegalodonMemory(moments.mean, moments.var, torch.view_as_real(h), keys, values)
