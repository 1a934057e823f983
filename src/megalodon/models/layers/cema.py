"""CEMA: the complex exponential moving average that carries long memory (SPEC: CEMA)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from megalodon import ops
from megalodon.models.layers.precision import FullPrecision
from megalodon.ops.backend import full_precision
from megalodon.ops.layout import Layout


class CEMA(FullPrecision):
    """Parameters: `alpha`, `delta` [D, N, 1]; `theta` [D, 1, 1]; `gamma` [D, N, 2] (re, im); `omega` [D, 1]; in float32
    or better, whatever the default dtype: powers of q forget what bfloat16 rounds away."""

    def __init__(self, dim: int, components: int) -> None:
        super().__init__()
        wide = full_precision(torch.get_default_dtype())
        self.alpha = nn.Parameter(torch.empty(dim, components, 1, dtype=wide))
        self.delta = nn.Parameter(torch.empty(dim, components, 1, dtype=wide))
        self.theta = nn.Parameter(torch.empty(dim, 1, 1, dtype=wide))
        self.gamma = nn.Parameter(torch.empty(dim, components, 2, dtype=wide))
        self.omega = nn.Parameter(torch.empty(dim, 1, dtype=wide))
        self.kept: ops.KeptTables | None = None  # for whoever reads many pieces and has the memory

    def initialize(self) -> None:
        """SPEC: Initialisation."""
        init.normal_(self.alpha, 0.0, 0.2)
        init.normal_(self.delta, 0.0, 0.2)
        init.copy_(self.theta, initial_theta(self.theta.shape[0]))
        real = torch.randn(self.gamma.shape[:2])
        init.copy_(self.gamma, torch.stack([real, torch.zeros_like(real)], dim=-1))
        init.trunc_normal_(self.omega, 0.0, 0.25, -1.0, 1.0)

    def keep_tables(self) -> None:
        """Keep the tables of the coefficients between calls."""
        self.kept = self.kept or ops.KeptTables()

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """(p real [D, N], q complex [D, N], gamma complex [D, N] scaled by 1/sqrt(N)), float32 or better."""
        wide = full_precision(self.alpha.dtype)
        components = self.alpha.shape[1]
        alpha, delta, theta, gamma = (x.to(wide) for x in (self.alpha, self.delta, self.theta, self.gamma))
        p = torch.sigmoid(alpha[..., 0])
        steps = torch.arange(1, components + 1, dtype=wide, device=theta.device) * (2 * math.pi / components)
        radius, angle = 1 - p * torch.sigmoid(delta[..., 0]), torch.sigmoid(theta[..., 0]) * steps
        q = torch.complex(radius * angle.cos(), radius * angle.sin())  # `polar` is slow in both passes
        return p, q, torch.view_as_complex(gamma * (1 / math.sqrt(components)))

    def forward(self, x: Tensor, state: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
        """x [B, L, D] and h complex [B, D, N] -> (y [B, L, D], h after it)."""
        with torch.autocast(x.device.type, enabled=False):
            p, q, gamma = self.coefficients()
        return ops.cema(x, p, q, gamma, self.omega, state, layout=layout, kept=self.kept)


def initial_theta(dim: int) -> Tensor:
    """[D, 1, 1]: logits of phases spread geometrically from near 1 to 1/D, in random channel order."""
    phase = torch.exp(-math.log(dim) / dim * torch.arange(1, dim + 1, dtype=torch.float64))
    return torch.logit(phase)[torch.randperm(dim)].float().view(dim, 1, 1)
