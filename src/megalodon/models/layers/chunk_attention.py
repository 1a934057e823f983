"""Gated attention over chunks: queries and keys from the long memory, values from the token itself (SPEC: Block)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from megalodon import ops
from megalodon.models.implicit import Path, of_probe, probe
from megalodon.models.layers.open_chunk import OpenChunk
from megalodon.models.layers.watch import is_plain
from megalodon.ops.layout import Layout


class GatedChunkAttention(nn.Module):
    """`z_proj`, `v_proj`, `r_proj`, `h_proj` are the paper's Wz, Wv, Wr, Wh1; `o_proj` is Wh2.

    `qk_weight` (offset) and `qk_bias` [2, Z] make queries (row 0) and keys (row 1) of the shared z.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, z_dim, value_dim = config.model_dim, config.z_dim, config.value_dim
        self.num_heads, self.chunk_size, self.eps = config.num_heads, config.chunk_size, config.norm_eps
        self.z_proj = nn.Linear(dim, z_dim)
        self.v_proj = nn.Linear(dim, value_dim)
        self.r_proj = nn.Linear(dim, value_dim)
        self.h_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(value_dim, dim, bias=False)
        self.qk_weight = nn.Parameter(torch.zeros(2, z_dim))
        self.qk_bias = nn.Parameter(torch.zeros(2, z_dim))
        self.hidden_dropout = config.hidden_dropout
        self.attention_dropout = config.attention_dropout
        self.dropkey = config.attention_dropout_mode == "dropkey"

    def initialize(self) -> None:
        """Queries and keys begin as the normalised z, scaled."""
        init.zeros_(self.qk_weight)
        init.zeros_(self.qk_bias)

    def forward(
        self, n: Tensor, m: Tensor, turns: Tensor, open_chunk: OpenChunk | None, layout: Layout, use_cache: bool
    ) -> tuple[Tensor, OpenChunk | None]:
        """The block's first residual branch, before its dropout.

        Args:
            n: [B, L, D]; the normalised input. m: [B, L, D]; the normalised long memory.
            turns: complex [L, d/2] or [B, L, d/2]; the rotations of each token.
            open_chunk: keys and values of the chunk that is open before the first token.
            layout: the batch's layout.
            use_cache: whether to return the chunk that is open after the last token.

        Returns:
            (out [B, L, D], the open chunk or None).
        """
        u = self.v_proj(n).unflatten(-1, (self.num_heads, -1))
        if use_cache or torch.compiler.is_compiling():
            o, open_chunk = self.attend(self.queries(m, turns), ops.silu(u), open_chunk, layout, use_cache)
        else:
            o, open_chunk = self.attend(self.queries(m, turns), u, open_chunk, layout, use_cache, activates=True)
        r, h = self.r_proj(m), self.h_proj(m)
        plain = is_plain(self.o_proj, nn.Linear) and self.o_proj.bias is None
        if plain and not (self.training and self.hidden_dropout):
            return ops.gated_linear(r, o.flatten(-2).to(r.dtype), self.o_proj.weight, h), open_chunk
        return h + self.o_proj(self.gated(r, o)), open_chunk

    def gated(self, r: Tensor, o: Tensor) -> Tensor:
        """What attention found, o [B, L, H, e], behind the gate r [B, L, V]: [B, L, V], dropped out."""
        return F.dropout(ops.silu_product(r, o.flatten(-2).to(r.dtype)), self.hidden_dropout, self.training)

    def queries(self, m: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """m [B, L, D] -> queries and keys, rotated, [B, L, H, d] each (SPEC: q and k share one normalised z)."""
        z = self.z_proj(m).unflatten(-1, (self.num_heads, -1))
        head_dim = z.shape[-1]
        scale = ((self.qk_weight + 1) / math.sqrt(head_dim)).unflatten(1, (self.num_heads, head_dim))
        bias = self.qk_bias.unflatten(1, (self.num_heads, head_dim))
        return ops.queries_and_keys(z, scale, bias, turns, self.eps)

    def attend(
        self,
        queries: tuple[Tensor, Tensor],
        v: Tensor,
        open_chunk: OpenChunk | None,
        layout: Layout,
        use_cache: bool,
        activates: bool = False,
    ) -> tuple[Tensor, OpenChunk | None]:
        """Attention inside chunks of q, k [B, L, H, d] of `queries` and v [B, L, H, e] -> ([B, L, H, e], the open chunk
        or None). `activates`, where none is asked for: the values are silu(v)."""
        q, k = queries
        dropout = self.attention_dropout if self.training else 0.0
        if use_cache and layout.fits_open_chunk:
            open_chunk = OpenChunk.append(open_chunk, k, v, layout)
            keys, values, offset = open_chunk.contents(layout)
            out = ops.causal_attention(q, keys, values, offset, None, dropout, self.dropkey)
            return out, open_chunk.left_open(layout)
        prefix_k, prefix_v = (None, None) if open_chunk is None else (open_chunk.keys, open_chunk.values)
        out = ops.chunk_attention(
            q,
            k,
            v,
            self.chunk_size,
            prefix_k=prefix_k,
            prefix_v=prefix_v,
            dropout=dropout,
            dropkey=self.dropkey,
            layout=layout,
            activates=activates,
        )
        return out, OpenChunk.after(open_chunk, k, v, layout) if use_cache else None

    def paths(self, n: Tensor, m: Tensor, turns: Tensor, layout: Layout) -> list[Path]:
        """The implicit attention of what stands beside `h_proj(m)`, for rows that have read nothing."""
        v = F.silu(self.v_proj(n)).unflatten(-1, (self.num_heads, -1))
        queries, r = self.queries(m, turns), self.r_proj(m)
        o = self.attend(queries, v, None, layout, False)[0]
        matrix = of_probe(self.attend(queries, probe(v), None, layout, False)[0])
        gate, outputs = (x.unflatten(-1, (self.num_heads, -1)) for x in (F.silu(r), self.gated(r, o)))
        return [Path("attention", v, ((matrix, gate),), outputs, self.o_proj.weight)]
