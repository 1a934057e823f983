"""The normalised feed-forward layer, plain or gated (SPEC: Block)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from megalodon import ops
from megalodon.models.layers.norms import LayerNorm, effective
from megalodon.models.layers.watch import is_plain


class FeedForward(nn.Module):
    """`alpha * W2 dropout(silu(W1 n))`, or with swiglu `alpha * W2 dropout(silu(W1 n) * W3 n)`, n = LayerNorm(y).

    W1 is `up_proj`, W3 `gate_proj`, W2 `down_proj`; `alpha` [D] exists with `rescale_nffn` only.
    """

    def __init__(self, config: Any, layer: int, norm_groups: int = 1) -> None:
        super().__init__()
        dim, hidden = config.model_dim, config.ffn_hidden_dim
        self.norm = LayerNorm(dim, config.norm_eps, config.norm_affine, norm_groups)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.gate_proj = nn.Linear(dim, hidden, bias=False) if config.swiglu else None
        self.down_proj = nn.Linear(hidden, dim, bias=False)
        self.initial_alpha = 0.1 * 0.5**layer
        self.alpha = nn.Parameter(torch.full((dim,), self.initial_alpha)) if config.rescale_nffn else None
        self.hidden_dropout, self.dropout = config.hidden_dropout, config.dropout

    def initialize(self) -> None:
        """Only `alpha` is the layer's own."""
        if self.alpha is not None:
            init.constant_(self.alpha, self.initial_alpha)

    def forward(self, y: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        out = self._at_once(y)
        if out is None:
            n = self.norm(y)
            up = self.up_proj(n)
            hidden = F.silu(up) if self.gate_proj is None else ops.silu_product(up, self.gate_proj(n))
            out = self.down_proj(F.dropout(hidden, self.hidden_dropout, self.training))
        out = F.dropout(out, self.dropout, self.training)
        return out if self.alpha is None else out * self.alpha

    def _at_once(self, y: Tensor) -> Tensor | None:
        """All but `alpha` as one operator; None where a part has to be called."""
        if self.gate_proj is None or self.norm.groups > 1 or (self.training and self.hidden_dropout):
            return None
        layers = (self.up_proj, self.gate_proj, self.down_proj)
        plain = all(is_plain(layer, nn.Linear) and layer.bias is None for layer in layers)
        if not plain or not is_plain(self.norm, LayerNorm):
            return None
        scale = effective(self.norm.weight, y.dtype)
        bias = None if self.norm.bias is None else self.norm.bias.to(y.dtype)
        return ops.feed_forward(y, scale, bias, self.norm.eps, *(layer.weight for layer in layers))
