"""Attamba (arXiv 2411.17685): attention whose keys and values are states of a state-space model that runs over chunks.

A query sees the ends of all earlier chunks and a few recent tokens. The state-space model starts afresh in every chunk,
so that the key of a chunk's end holds its chunk: the paper's reading. Boundaries count from the document's start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from megalodon import ops
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.base import (
    AtLeastOne,
    Memory,
    Mixer,
    MixerParameters,
    NotNegative,
    Positive,
    Reference,
)
from megalodon.models.kin.mixers.landmarks import LandmarkMemory, attend
from megalodon.models.kin.mixers.mamba2 import GroupedNorm
from megalodon.models.kin.mixers.state_space import ScanMemory, rates_of, steps_of
from megalodon.ops.layout import Layout


@dataclass(frozen=True)
class AttambaMemory(Memory):
    """key_scan, value_scan: the state-space models in the open chunk; context: keys and values of chunk ends and of
    recent tokens."""

    key_scan: ScanMemory
    value_scan: ScanMemory
    context: LandmarkMemory


class ChunkStateSpace(nn.Module):
    """Mamba-2's layer without biases: `Wo norm(scan(silu(conv xBC)) * silu z)`."""

    def __init__(self, dim: int, inner: int, heads: int, state_size: int, taps: int, eps: float) -> None:
        super().__init__()
        self.inner, self.heads, self.state_size, self.taps = inner, heads, state_size, taps
        self.channels = inner + 2 * state_size
        self.in_proj = nn.Linear(dim, inner + self.channels + heads, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.channels, taps))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.ssm_norm = GroupedNorm(inner, 1, eps)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def initialise(self, rate_min: float, rate_max: float) -> None:
        """Decays of a unit of time drawn uniformly from the range that the paper's configs ask for."""
        bound = self.taps**-0.5
        init.uniform_(self.conv_weight, -bound, bound)
        init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(rate_min, rate_max).log())
        init.ones_(self.D)
        init.ones_(self.ssm_norm.weight)

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> ScanMemory:
        """The memory of rows that have read nothing."""
        state = (self.heads, self.inner // self.heads, self.state_size)
        return ScanMemory.empty(batch, self.taps, self.channels, state, device, dtype)

    def forward(self, u: Tensor, memory: ScanMemory, layout: Layout) -> tuple[Tensor, ScanMemory]:
        """u [B, L, D] -> (y [B, L, D], the memory after it); a document of the layout is a chunk."""
        z, mixed, raw = self.in_proj(u).split([self.inner, self.channels, self.heads], dim=-1)
        mixed, recent = ops.short_convolution(mixed, self.conv_weight, None, memory.recent, layout, silu=True)
        x, b, c = mixed.split([self.inner, self.state_size, self.state_size], dim=-1)
        x = x.unflatten(-1, (self.heads, -1))
        b, c = b.unsqueeze(2), c.unsqueeze(2)
        rates = rates_of(self.A_log)
        y, state = ops.selective_scan(x, steps_of(raw, None), rates, b, c, self.D, memory.state, layout=layout)
        return self.out_proj(self.ssm_norm(y.flatten(-2) * F.silu(z))), ScanMemory(recent, state)


class Attamba(Mixer):
    """`k = n + SSMk(n), v = n + SSMv(n), out = Wo softmax(rope(Wq n) rope(k)^T / sqrt d) v`, n the normalised input."""

    kind = "growing"
    own_rotary = True

    class Parameters(MixerParameters):
        """chunk: C, tokens between boundaries; leading: earlier tokens that a query sees beside itself; offset: the
        first boundary after position 0 is C - 1 - offset (None: spread over the layers, so that not all end their
        chunks at one place); state_size: N; inner: width of the state-space models (None: 2/3 of the width, in their
        heads); heads: theirs; kernel_size: taps; rate_min, rate_max: of their decays at the start."""

        chunk: AtLeastOne = 8
        leading: NotNegative = 8
        offset: NotNegative | None = None
        state_size: AtLeastOne = 32
        inner: AtLeastOne | None = None
        heads: AtLeastOne | None = None
        kernel_size: AtLeastOne = 4
        rate_min: Positive = 0.01
        rate_max: Positive = 2.0

        def sizes(self, config: KinConfig) -> tuple[int, int]:
            """(inner width, heads) of the state-space models."""
            heads = self.heads or config.num_heads
            return self.inner or -(-2 * config.model_dim // (3 * heads)) * heads, heads

        def check(self, config: KinConfig) -> None:
            if self.offset is not None and self.offset >= self.chunk:
                raise ValueError(f"attamba: offset={self.offset}: it must be less than chunk={self.chunk}")
            if self.rate_min > self.rate_max:
                raise ValueError(f"attamba: rate_min={self.rate_min}: it must be at most rate_max={self.rate_max}")
            inner, heads = self.sizes(config)
            if inner % heads:
                raise ValueError(f"attamba: inner={inner} is not divisible by heads={heads}")
            if config.model_dim % config.num_heads:
                raise ValueError(f"attamba: model_dim={config.model_dim} is not divisible by num_heads")
            if config.rope_base is not None and (config.model_dim // config.num_heads) % 2:
                raise ValueError(
                    f"attamba: heads of {config.model_dim // config.num_heads} cannot turn: make them even"
                )

    def __init__(self, config: KinConfig, layer_index: int, parameters: Parameters) -> None:
        super().__init__(config, layer_index, parameters)
        given, self.dim, self.num_heads = parameters, config.model_dim, config.num_heads
        self.head_dim, self.rope_base = self.dim // self.num_heads, config.rope_base
        self.chunk, self.leading, self.rates = given.chunk, given.leading, (given.rate_min, given.rate_max)
        cycled = min(self.chunk - 1, layer_index * (self.chunk // config.num_layers))
        self.offset = cycled if given.offset is None else given.offset
        inner, heads = given.sizes(config)
        shape = (self.dim, inner, heads, given.state_size, given.kernel_size, config.norm_eps)
        self.wq = nn.Linear(self.dim, self.dim, bias=False)
        self.k_ssm, self.v_ssm = ChunkStateSpace(*shape), ChunkStateSpace(*shape)
        self.wo = nn.Linear(self.dim, self.dim, bias=False)
        self.initialise(config.init_std)

    @torch.no_grad()
    def initialise(self, std: float) -> None:
        self.k_ssm.initialise(*self.rates)
        self.v_ssm.initialise(*self.rates)

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> AttambaMemory:
        context = LandmarkMemory.empty(batch, self.num_heads, self.head_dim, self.head_dim, self.leading, device, dtype)
        return AttambaMemory(self.k_ssm.empty(batch, device, dtype), self.v_ssm.empty(batch, device, dtype), context)

    def boundaries(self, position: np.ndarray) -> np.ndarray:
        """Which positions of a document end a chunk: 0, C - 1 - offset, 2 C - 1 - offset, ..."""
        return _ends(position, self.chunk, self.offset)

    @classmethod
    def multiply_adds(cls, config: KinConfig, parameters: Any, length: int) -> float:
        ends = np.cumsum(_ends(np.arange(length), parameters.chunk, parameters.offset or 0))
        near = np.minimum(np.arange(length), parameters.leading) + 1  # itself and the tokens just before it
        older = np.concatenate([np.zeros(min(parameters.leading + 1, length)), ends[: -parameters.leading - 1]])
        return 2.0 * config.model_dim * float((near + older[:length]).mean())

    def chunks(self, layout: Layout) -> Layout:
        """The layout whose documents are the chunks."""
        position = layout.document_positions
        begins = (position == 0) | self.boundaries(np.maximum(position - 1, 0))
        ids = torch.from_numpy(begins.cumsum(axis=1))
        return Layout(layout.batch, layout.length, layout.device, segment_ids=ids, lengths=layout.lengths)

    def forward(self, n: Tensor, memory: AttambaMemory | None, layout: Layout) -> tuple[Tensor, AttambaMemory]:
        memory = self.empty(len(n), n.device, n.dtype) if memory is None else memory
        chunks = self.chunks(layout)
        last = np.maximum(layout.positions - 1, 0)
        is_open = torch.from_numpy((layout.positions > 0) & ~self.boundaries(last)).to(n.device)

        def opened(x: Tensor) -> Tensor:
            return x.masked_fill(~is_open.view(-1, *[1] * (x.ndim - 1)), 0)

        k, key_scan = self.k_ssm(n, memory.key_scan.map(opened), chunks)
        v, value_scan = self.v_ssm(n, memory.value_scan.map(opened), chunks)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in (self.wq(n), n + k, n + v))
        if self.rope_base is not None:
            turns = ops.rotations_of(layout, self.head_dim, self.rope_base)
            q, k = ops.rotate(q, turns), ops.rotate(k, turns)
        out, context = attend(q / math.sqrt(self.head_dim), k, v, memory.context, layout, self.boundaries)
        return self.wo(out.flatten(-2)), AttambaMemory(key_scan, value_scan, context)

    @classmethod
    def reference(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reference:
        """A layer of the authors' model. `config["layer"]` is its number, 0 if absent: boundaries depend on it."""
        ours = {name.removeprefix("attentive_ssm."): tensor for name, tensor in tensors.items()}
        around = ("attention_norm.", "ffn_norm.", "feed_forward.", "k_ssmnorm.", "v_ssmnorm.")
        ours = {name: tensor for name, tensor in ours.items() if not name.startswith(around)}
        chunk = config["token_chunk"]
        parameters = {
            "chunk": chunk,
            "leading": config["leading_tokens"],
            "offset": min(chunk - 1, config.get("layer", 0) * (chunk // config["n_layers"])),
            "state_size": config["state_dim"],
            "inner": tensors["k_ssm.out_proj.weight"].shape[1],
            "heads": config["ssm_heads"],
            "kernel_size": config["conv_size"],
        }
        fields = {
            "model_dim": config["dim"],
            "num_heads": config["n_heads"],
            "rope_base": float(config["rope_theta"]),
            "norm_eps": config["norm_eps"],
        }
        return Reference(fields, parameters, ours)


def _ends(position: np.ndarray, chunk: int, offset: int) -> np.ndarray:
    """Which positions of a document end a chunk."""
    return (position == 0) | ((position + offset) % chunk == chunk - 1)
