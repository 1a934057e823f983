"""Gecko's CEMA: its output weights are taken as they are stored, and the token itself is added whole (GECKO: CEMA)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import initialization as init

from megalodon import ops
from megalodon.models.layers.cema import initial_theta
from megalodon.models.layers.precision import FullPrecision
from megalodon.ops.backend import full_precision
from megalodon.ops.layout import Layout


class GeckoCEMA(FullPrecision):
    """Parameters: `alpha`, `delta` [D, N]; `theta` [D]; `gamma` [D, N, 2] (re, im); float32 or better, whatever the
    default dtype."""

    def __init__(self, dim: int, components: int) -> None:
        super().__init__()
        wide = full_precision(torch.get_default_dtype())
        self.alpha = nn.Parameter(torch.empty(dim, components, dtype=wide))
        self.delta = nn.Parameter(torch.empty(dim, components, dtype=wide))
        self.theta = nn.Parameter(torch.empty(dim, dtype=wide))
        self.gamma = nn.Parameter(torch.empty(dim, components, 2, dtype=wide))
        self.kept: ops.KeptTables | None = None  # for whoever reads many pieces and has the memory

    def initialize(self) -> None:
        """GECKO: Initialisation."""
        init.normal_(self.alpha, 0.0, 0.2)
        init.normal_(self.delta, 0.0, 0.2)
        init.copy_(self.theta, initial_theta(len(self.theta)).flatten())
        real = torch.randn(self.alpha.shape) / math.sqrt(self.alpha.shape[1])
        init.copy_(self.gamma, torch.stack([real, torch.zeros_like(real)], dim=-1))

    def keep_tables(self) -> None:
        """Keep the tables of the coefficients between calls."""
        self.kept = self.kept or ops.KeptTables()

    @property
    def omega(self) -> Tensor:
        """[D]: the weight of the token itself, 1."""
        return torch.ones_like(self.theta, requires_grad=False)

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """(p real [D, N], q complex [D, N], gamma complex [D, N]), float32 or better."""
        wide = full_precision(self.alpha.dtype)
        components = self.alpha.shape[1]
        alpha, delta, theta, gamma = (x.to(wide) for x in (self.alpha, self.delta, self.theta, self.gamma))
        p = torch.sigmoid(alpha)
        steps = torch.arange(1, components + 1, dtype=wide, device=theta.device) * (2 * math.pi / components)
        q = torch.polar(1 - p * torch.sigmoid(delta), torch.sigmoid(theta)[:, None] * steps)
        return p, q, torch.complex(*gamma.unbind(-1))  # not a view: loaded weights stand anywhere

    def forward(self, x: Tensor, state: Tensor | None, layout: Layout) -> tuple[Tensor, Tensor]:
        """x [B, L, D] and h complex [B, D, N] -> (y [B, L, D], h after it)."""
        with torch.autocast(x.device.type, enabled=False):
            p, q, gamma = self.coefficients()
        if (segments := layout.segments) is not None:
            layout, state = segments.by_segment, segments.forgotten(state)
        return ops.cema(x, p, q, gamma, self.omega, state, layout=layout, kept=self.kept)
