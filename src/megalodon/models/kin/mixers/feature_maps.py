"""Feature maps that are trained: Hedgehog's matrix for each head, and a small network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from megalodon.ops.linear_attention import FEATURE_MAPS
from megalodon.ops.linear_attention.feature_maps import LEAST


class HeadwiseMap(nn.Module):
    """`phi(x) = activation(x W_h)`, a matrix `weight` [H, d, m] for each query head (2402.04347).

    x may come with fewer heads, of which query head h uses head h // (H / G).

    Args:
        activation: a name of `FEATURE_MAPS`; "softmax_both" and "exp_both" give 2 m features, the others m. "relu" is
            T2R's `relu(x W_h + b_h)`, b one number a head (2103.13076).
        skip: add x to x W_h; m = d then.
    """

    def __init__(self, num_heads: int, head_dim: int, feature_dim: int, activation: str, skip: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, head_dim, feature_dim))
        self.bias = nn.Parameter(torch.zeros(num_heads)) if activation == "relu" else None
        self.activation, self.skip = FEATURE_MAPS[activation], skip
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Start as the identity: the first m dimensions of a head; with x added, as nothing."""
        heads, size, features = self.weight.shape
        start = torch.zeros(size, features) if self.skip else torch.eye(size, features)
        init.copy_(self.weight, start.expand(heads, -1, -1))
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, H or G, d] -> [B, L, H, f]."""
        if x.shape[2] != len(self.weight):
            x = x.repeat_interleave(len(self.weight) // x.shape[2], 2)
        u = torch.einsum("blhd,hdm->blhm", x, self.weight.to(x.dtype))
        if self.skip:
            u = u + x
        if self.bias is not None:
            return self.activation(u + self.bias.to(x.dtype)[:, None]).clamp(min=LEAST)
        return self.activation(u)


def features_of(activation: str, size: int) -> int:
    """How many features `HeadwiseMap` gives for m = size."""
    return 2 * size if activation in ("softmax_both", "exp_both") else size


class FeedForwardMap(nn.Module):
    """`phi(x) = softplus(W2 gelu(W1 x))`, or with a gate `softplus(W2 (sigmoid(Wg x) * W1 x))`, one network for the
    queries and keys of all heads (2211.04076)."""

    def __init__(self, head_dim: int, hidden: int, feature_dim: int, gated: bool) -> None:
        super().__init__()
        self.up = nn.Linear(head_dim, hidden)
        self.gate = nn.Linear(head_dim, hidden) if gated else None
        self.down = nn.Linear(hidden, feature_dim)

    @torch.no_grad()
    def initialise(self) -> None:
        """Orthogonal matrices, which the paper's regulariser keeps them near."""
        for linear in self.children():
            if isinstance(linear, nn.Linear):
                init.orthogonal_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., d] -> [..., f], positive."""
        wide, x = x.dtype, x.to(self.up.weight.dtype)
        hidden = self.up(x)
        hidden = F.gelu(hidden) if self.gate is None else hidden * torch.sigmoid(self.gate(x))
        return F.softplus(self.down(hidden).to(wide))
