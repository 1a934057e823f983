"""Llama's attention over two chunks, and Gecko's working memory of all before them behind a gate (after 2601.06463).

It has all parameters of `attention` under their names, for the recipe `gecko` of linearisation puts it in its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from megalodon import ops
from megalodon.models.implicit import Path, of_probe, probe
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.base import AtLeastOne, Memory
from megalodon.models.kin.mixers.projected import Projected, ProjectedParameters
from megalodon.models.layers.open_chunk import OpenChunk
from megalodon.models.layers.window import Window
from megalodon.ops.backend import full_precision
from megalodon.ops.layout import Layout


@dataclass(frozen=True)
class ChunksAndMemory(Memory):
    """keys [B, n, G, d + f] (rotated, and the memory's) and values [B, n, G, d] of the open chunk and of the one before
    it; working [B, G, f, d] and log_mass [B, G, f] of all chunks before those."""

    GROWING: ClassVar[frozenset[str]] = frozenset({"keys", "values", "before_keys", "before_values"})

    PARTS: ClassVar[Mapping[str, frozenset[str]]] = MappingProxyType(
        {"working_memory": frozenset({"working", "log_mass"})}
    )

    keys: Tensor
    values: Tensor
    before_keys: Tensor
    before_values: Tensor
    working: Tensor
    log_mass: Tensor

    def window(self) -> Window:
        """The same, as Gecko's attention has it."""
        before = OpenChunk(self.before_keys, self.before_values)
        return Window.without_segments(OpenChunk(self.keys, self.values), before, self.working, self.log_mass)


class WindowMemory(Projected):
    """`y = o + g (w - o)`: o is softmax attention over the token's chunk and the one before it, w what the working
    memory gives of all chunks before those, g = tanh(w_h.x + b_h) a number a head.

    The memory's keys and queries are those of attention before they turn, times a matrix a head. Its update is Gecko's
    (`ops.working_memory`). The gate is zero at the start: then this is attention over a window, and no more. Tokens of
    a document's first two chunks see all of it and read no memory, whatever was trained.
    """

    kind = "constant"
    turns_heads = True

    class Parameters(ProjectedParameters):
        """chunk_size: C; a token sees itself and C to 2C - 1 before it. feature_dim: f, rows of the memory; None:
        twice head_dim."""

        chunk_size: AtLeastOne = 64
        feature_dim: AtLeastOne | None = None

        def features(self, config: KinConfig) -> int:
            """f."""
            return self.feature_dim or 2 * config.head_size

    def __init__(self, config: KinConfig, layer_index: int, parameters: Parameters) -> None:
        super().__init__(config, layer_index, parameters)
        self.chunk_size, self.feature_dim = parameters.chunk_size, parameters.features(config)
        heads = self.num_heads + self.num_groups
        self.memory_maps = nn.Parameter(torch.empty(heads, self.head_dim, self.feature_dim))  # of queries, then of keys
        self.gate_proj = nn.Linear(config.model_dim, self.num_heads)

    def initialise(self, std: float) -> None:
        """Features begin as the head's numbers and their negatives, in turn; the gate as shut."""
        eye = torch.eye(self.head_dim)
        both = torch.cat([eye, -eye], 1).repeat(1, -(-self.feature_dim // (2 * self.head_dim)))[:, : self.feature_dim]
        init.copy_(self.memory_maps, both.expand_as(self.memory_maps))
        init.zeros_(self.gate_proj.weight)
        init.zeros_(self.gate_proj.bias)

    @classmethod
    def multiply_adds(cls, config: KinConfig, parameters: Any, length: int) -> float:
        chunk, heads, features = min(parameters.chunk_size, length), config.num_heads, parameters.features(config)
        keys = chunk / 2 + chunk * (1 - chunk / length)
        reading = max(1 - 2 * parameters.chunk_size / length, 0)
        return 2.0 * heads * config.head_size * (keys + reading * features)

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> ChunksAndMemory:
        groups, wide = self.num_groups, full_precision(dtype)
        shape = (batch, 0, groups)
        keys = torch.zeros(*shape, self.head_dim + self.feature_dim, device=device, dtype=dtype)
        values = torch.zeros(*shape, self.head_dim, device=device, dtype=dtype)
        working = torch.zeros(batch, groups, self.feature_dim, self.head_dim, device=device, dtype=wide)
        return ChunksAndMemory(keys, values, keys, values, working, working[..., 0])

    def head_outputs(self, x: Tensor, memory: ChunksAndMemory | None, layout: Layout) -> tuple[Tensor, Memory]:
        chunked = layout.with_chunks(self.chunk_size)
        q, asked, keys, v = self.asked_and_offered(x, chunked)
        window = (self.empty(len(x), x.device, v.dtype) if memory is None else memory).window()
        (attention, given), working, log_mass = self.attend(q, asked, keys, v, window, chunked)
        opened = (
            OpenChunk.append(window.open, keys, v, chunked).left_open(chunked)
            if chunked.fits_open_chunk
            else OpenChunk.after(window.open, keys, v, chunked)
        )
        before = window.before_after(keys, v, chunked)
        ends, size = chunked.end_positions, self.chunk_size
        places, earlier = int((ends % size).max(initial=0)), size if int(ends.max(initial=0)) >= size else 0
        return attention + self.gate(x, chunked) * (given - attention), ChunksAndMemory(
            opened.keys[:, :places],
            opened.values[:, :places],
            before.keys[:, :earlier],
            before.values[:, :earlier],
            working,
            log_mass.masked_fill(log_mass.isinf(), 0),  # of rows that have absorbed nothing: not read
        )

    def asked_and_offered(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [B, L, D] -> turned queries [B, L, H, d], the memory's [B, L, H, f], the keys of both [B, L, G, d + f], and
        values [B, L, G, d]."""
        q, k, v = self.queries_keys_values(x, layout, rotated=False)
        maps = self.memory_maps.to(q.dtype)
        asked = torch.einsum("blhd,hdf->blhf", q, maps[: self.num_heads])
        offered = torch.einsum("blgd,gdf->blgf", k, maps[self.num_heads :])
        if self.rotary is not None:
            q, k = self.rotary.turn(layout, q, k)
        return q, asked, torch.cat([k, offered], dim=-1), v

    def attend(
        self, q: Tensor, asked: Tensor, keys: Tensor, v: Tensor, window: Window | None, layout: Layout
    ) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """Read and absorb.

        Args:
            q: [B, L, H, d], turned; asked: [B, L, H, f]; keys: [B, L, G, d + f]; v: [B, L, G, e].
            window: what was before; None: nothing.

        Returns:
            ((what attention finds, what the memory gives), each [B, L, H, e]; the memory [B, G, f, e] and its log mass
            [B, G, f] after the tokens).
        """
        repeats = self.num_heads // self.num_groups

        def heads(x: Tensor) -> Tensor:
            return x if repeats == 1 else x.repeat_interleave(repeats, 2)

        sizes = [self.head_dim, self.feature_dim]
        k, offered = keys.split(sizes, -1)
        of_attention: dict[str, Any] = {}
        of_memory: dict[str, Any] = {}
        for name, given in ({} if window is None else window.prefix()).items():
            if given is not None:
                parts = (given, given) if name.endswith("v") else given.split(sizes, -1)
                of_attention[name], of_memory[name] = heads(parts[0]), heads(parts[1])
        v = heads(v)
        shared: dict[str, Any] = {"chunk_size": self.chunk_size, "layout": layout}
        scaled = q / math.sqrt(self.head_dim)
        attention = ops.sliding_chunk_attention(scaled, heads(k), v, **of_attention, **shared)
        if window is not None:
            of_memory["memory"] = window.memory.repeat_interleave(repeats, 1)
            of_memory["log_mass"] = window.log_mass.repeat_interleave(repeats, 1)
        given, memory, log_mass = ops.working_memory(asked, heads(offered), v, **of_memory, **shared)
        return (attention, given), memory[:, ::repeats], log_mass[:, ::repeats]

    def gate(self, x: Tensor, layout: Layout) -> Tensor:
        """[B, L, H, 1]: the memory's share for x [B, L, D], none where a token's document has left nothing in it."""
        opened = torch.tanh(self.gate_proj(x))
        return opened.masked_fill((layout.token_positions < 2 * self.chunk_size)[..., None], 0)[..., None]

    def paths(self, x: Tensor, layout: Layout) -> list[Path]:
        chunked = layout.with_chunks(self.chunk_size)
        q, asked, keys, v = self.asked_and_offered(x, chunked)
        (found, given), (o, w) = (self.attend(q, asked, keys, x, None, chunked)[0] for x in (v, probe(v)))
        gate = self.gate(x, chunked).expand_as(found)
        values = v.repeat_interleave(self.num_heads // self.num_groups, 2)
        terms = ((of_probe(o), 1 - gate), (of_probe(w), gate))
        return [
            Path("attention", values, terms, found + gate * (given - found), self.o_proj.weight, bias=self.o_proj.bias)
        ]
