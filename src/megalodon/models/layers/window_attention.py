"""Gated attention over two chunks, with a working memory of all before them (GECKO: Block)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from megalodon import ops
from megalodon.models.implicit import Path, of_probe, probe
from megalodon.models.layers.open_chunk import OpenChunk
from megalodon.models.layers.window import Window
from megalodon.ops.layout import Layout


class Turns(NamedTuple):
    """The rotations of each token, complex [L, d/2] or [B, L, d/2]: for its own chunk, and for the one before."""

    own: Tensor
    before: Tensor

    @staticmethod
    def of(config: Any, places: Tensor) -> Turns | None:
        """Of tokens at these places of their chunks, int64 [L] or [B, L]; None where no head is rotated."""
        if not config.rotated_heads:
            return None
        sizes = config.head_dim, config.rope_base
        return Turns(ops.rotations(places, *sizes), ops.rotations(places + config.chunk_size, *sizes))


class Queries(NamedTuple):
    """What a token asks and offers, [B, L, H, d] each: see GECKO, `q, k, aq, ak`. `before` is q for the chunk before,
    None where that is q itself."""

    q: Tensor
    before: Tensor | None
    k: Tensor
    memory_q: Tensor
    memory_k: Tensor

    @property
    def keys(self) -> Tensor:
        """[B, L, H, 2d]: what is remembered."""
        return torch.cat([self.k, self.memory_k], dim=-1)


class Found(NamedTuple):
    """What attention (`o`) and the working memory (`w`, None for nothing) give, [B, L, H, e] each."""

    o: Tensor
    w: Tensor | None


class GatedWindowAttention(nn.Module):
    """`z_proj`, `v_proj`, `r_proj`, `h_proj` are the paper's Wz, Wv, Wr, Wh1; `o_proj` is Wh2.

    `qk_weight` (offset) and `qk_bias` [4, Z] make of the shared z the queries (row 0) and keys (row 1) of attention and
    those of the working memory (rows 2 and 3).
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim, z_dim, value_dim = config.model_dim, config.z_dim, config.value_dim
        self.num_heads, self.chunk_size, self.eps = config.num_heads, config.chunk_size, config.norm_eps
        self.rotated_heads = config.rotated_heads
        self.z_proj = nn.Linear(dim, z_dim)
        self.v_proj = nn.Linear(dim, value_dim)
        self.r_proj = nn.Linear(dim, value_dim)
        self.h_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(value_dim, dim, bias=False)
        self.qk_weight = nn.Parameter(torch.zeros(4, z_dim))
        self.qk_bias = nn.Parameter(torch.zeros(4, z_dim))
        self.hidden_dropout = config.hidden_dropout
        self.attention_dropout = config.attention_dropout
        self.dropkey = config.attention_dropout_mode == "dropkey"

    def initialize(self) -> None:
        """Queries and keys begin as the normalised z, scaled."""
        init.zeros_(self.qk_weight)
        init.zeros_(self.qk_bias)

    def forward(
        self, n: Tensor, m: Tensor, turns: Turns | None, window: Window | None, layout: Layout, use_cache: bool
    ) -> tuple[Tensor, Window | None]:
        """The block's first residual branch, before its dropout.

        Args:
            n: [B, L, D]; the normalised input. m: [B, L, D]; the normalised long memory.
            turns: the rotations of each token; None: no head is rotated.
            window: what attention remembers of the tokens before the first.
            layout: the batch's layout, with its segments.
            use_cache: whether to return what it remembers after the last token.

        Returns:
            (out [B, L, D], the window or None).
        """
        v = F.silu(self.v_proj(n)).unflatten(-1, (self.num_heads, -1))
        found, window = self.attend(self.queries(m, turns), v, window, layout, use_cache)
        return self.h_proj(m) + self.o_proj(self.gated(self.r_proj(m), found)), window

    def gated(self, r: Tensor, found: Found) -> Tensor:
        """What attention found behind the gate r [B, L, V], and what the memory gave beside it: [B, L, V], dropped
        out."""
        o, w = found
        gated = ops.silu_product(r, o.flatten(-2).to(r.dtype))
        gated = gated if w is None else gated + w.flatten(-2).to(gated.dtype)
        return F.dropout(gated, self.hidden_dropout, self.training)

    def queries(self, m: Tensor, turns: Turns | None) -> Queries:
        """m [B, L, D] -> what attention and memory ask and offer: all from one normalised z."""
        z = self.z_proj(m).unflatten(-1, (self.num_heads, -1))
        head_dim = z.shape[-1]
        z = F.rms_norm(z, (head_dim,), None, self.eps)
        scale = ((self.qk_weight + 1) / math.sqrt(head_dim)).unflatten(1, (self.num_heads, head_dim))
        bias = self.qk_bias.unflatten(1, (self.num_heads, head_dim))
        q, k, memory_q, memory_k = torch.addcmul(bias, z[..., None, :, :], scale).to(z.dtype).unbind(-3)
        before = None
        if turns is not None:
            q, before, k = self.rotated(q, turns.own), self.rotated(q, turns.before), self.rotated(k, turns.own)
        return Queries(q, before, k, memory_q, memory_k)

    def rotated(self, x: Tensor, turns: Tensor) -> Tensor:
        """x [B, L, H, d] with its first heads turned."""
        if self.rotated_heads == self.num_heads:
            return ops.rotate(x, turns)
        turned, still = x.split([self.rotated_heads, self.num_heads - self.rotated_heads], dim=2)
        return torch.cat([ops.rotate(turned, turns), still], dim=2)

    def _has_read_memory(self, layout: Layout) -> bool:
        """Whether a token may find something in the working memory: before its third chunk, no document has any."""
        if torch.compiler.is_exporting():  # the length is not known
            return True
        return bool(layout.length) and int(layout.document_positions.max(initial=0)) >= 2 * self.chunk_size

    def attend(
        self, queries: Queries, v: Tensor, window: Window | None, layout: Layout, use_cache: bool
    ) -> tuple[Found, Window | None]:
        """What attention and the memory give for v [B, L, H, e], and the window after the tokens or None."""
        keys = None
        if window is None and use_cache:
            keys = queries.keys
            window = Window.empty(keys, v)
        prefix: dict[str, Any] = {} if window is None else window.prefix()
        width = queries.k.shape[-1]
        both = {name: (x, x) if x is None or name[-1] == "v" else x.split(width, -1) for name, x in prefix.items()}
        of_attention: dict[str, Any] = {name: parts[0] for name, parts in both.items()}
        of_memory: dict[str, Any] = {name: parts[1] for name, parts in both.items()}
        dropout = self.attention_dropout if self.training else 0.0
        shared: dict[str, Any] = {"chunk_size": self.chunk_size, "layout": layout, "segments": layout.segments}
        o = ops.sliding_chunk_attention(
            queries.q,
            queries.k,
            v,
            q_before=queries.before,
            dropout=dropout,
            dropkey=self.dropkey,
            **of_attention,
            **shared,
        )
        w = memory = log_mass = None
        if use_cache or self._has_read_memory(layout):
            carried: dict[str, Any] = {} if window is None else {"memory": window.memory, "log_mass": window.log_mass}
            w, memory, log_mass = ops.working_memory(
                queries.memory_q, queries.memory_k, v, **of_memory, **carried, **shared, use_cache=use_cache
            )
        if not use_cache:
            return Found(o, w), None
        assert window is not None and memory is not None and log_mass is not None
        keys = queries.keys if keys is None else keys
        places = (window.bos_before, window.bos_open) if layout.segments is None else layout.segments.after
        before = window.before_after(keys, v, layout)
        opened = (
            OpenChunk.append(window.open, keys, v, layout).left_open(layout)
            if layout.fits_open_chunk
            else OpenChunk.after(window.open, keys, v, layout)
        )
        return Found(o, w), Window(opened, before, memory, log_mass, *places)

    def paths(self, n: Tensor, m: Tensor, turns: Turns | None, layout: Layout) -> list[Path]:
        """The implicit attention of what stands beside `h_proj(m)`, for rows that have read nothing; the working memory
        is a term without a gate."""
        v = F.silu(self.v_proj(n)).unflatten(-1, (self.num_heads, -1))
        queries, r = self.queries(m, turns), self.r_proj(m)
        found = self.attend(queries, v, None, layout, False)[0]
        o, w = self.attend(queries, probe(v), None, layout, False)[0]
        gate, outputs = (x.unflatten(-1, (self.num_heads, -1)) for x in (F.silu(r), self.gated(r, found)))
        terms: list[tuple[Tensor, Tensor | None]] = [(of_probe(o), gate)]
        if w is not None:
            terms.append((of_probe(w), None))
        return [Path("attention", v, tuple(terms), outputs, self.o_proj.weight)]
