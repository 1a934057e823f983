"""Lizard: gated linear attention over everything plus softmax over a window, each under its own sum (2507.09025)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from megalodon import ops
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.attention import window_multiply_adds
from megalodon.models.kin.mixers.base import AtLeastOne, Memory, NotNegative, NotNegativeFloat
from megalodon.models.kin.mixers.feature_maps import HeadwiseMap
from megalodon.models.kin.mixers.projected import Projected, ProjectedParameters
from megalodon.models.kin.mixers.sums import WindowedSums, sums_of
from megalodon.ops.layout import Layout

GATE_BIAS = 4.0
"""Of the gate at the start: sigmoid(4) = 0.98, a half-life of 38 tokens. Without a bias it would be one token."""


class Lizard(Projected):
    """`y = phi_q(q)^T S / phi_q(q)^T z + alpha_h window(q)`, S and z decayed by g_t = sigmoid(w_g.x_t + b).

    The window's softmax has `sinks` more terms in its denominator, exp of a trained number each. The paper leaves open
    whether heads share gate, alpha and sinks: here the gate is shared, alpha and sinks are not.
    """

    kind = "constant"

    class Parameters(ProjectedParameters):
        """window: W, the token itself included. sinks: m. feature_dim: columns of the maps' matrices; None: head_dim.
        rotary: turn queries and keys of both parts by their places, which the paper's formulas do not. gate_bias and
        alpha: b and every alpha_h at the start. eps: added to the gated part's normaliser."""

        window: AtLeastOne = 128
        sinks: NotNegative = 4
        feature_dim: AtLeastOne | None = None
        rotary: bool = False
        gate_bias: float = GATE_BIAS
        alpha: float = 1.0
        eps: NotNegativeFloat = 1e-12

    @classmethod
    def turns_with(cls, parameters: Parameters) -> bool:
        return parameters.rotary

    def __init__(self, config: KinConfig, layer_index: int, parameters: Parameters) -> None:
        super().__init__(config, layer_index, parameters)
        self.window, self.eps, self.given = parameters.window, parameters.eps, parameters
        self.feature_dim = parameters.feature_dim or self.head_dim
        self.gate_proj = nn.Linear(config.model_dim, 1)
        self.feature_map_q = HeadwiseMap(self.num_heads, self.head_dim, self.feature_dim, "softmax_both")
        self.feature_map_k = HeadwiseMap(self.num_heads, self.head_dim, self.feature_dim, "softmax_both")
        self.alpha = nn.Parameter(torch.full((self.num_heads,), parameters.alpha))
        self.sinks = nn.Parameter(torch.zeros(self.num_heads, parameters.sinks)) if parameters.sinks else None

    def initialise(self, std: float) -> None:
        self.feature_map_q.initialise()
        self.feature_map_k.initialise()
        init.constant_(self.gate_proj.bias, self.given.gate_bias)
        init.constant_(self.alpha, self.given.alpha)
        if self.sinks is not None:
            init.zeros_(self.sinks)

    @classmethod
    def multiply_adds(cls, config: KinConfig, parameters: Any, length: int) -> float:
        features = 2 * (parameters.feature_dim or config.head_size)
        window = window_multiply_adds(config, parameters.window, length)
        return window + 2.0 * config.num_heads * features * config.head_size

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> WindowedSums:
        heads, features, recent = self.num_heads, 2 * self.feature_dim, (batch, self.window - 1, self.num_groups)
        return WindowedSums(
            sums_of((batch, heads, features, self.head_dim), device, dtype),
            sums_of((batch, heads, features), device, dtype),
            *(torch.zeros(*recent, self.head_dim, device=device, dtype=dtype) for _ in range(2)),
        )

    def head_outputs(self, x: Tensor, memory: Any, layout: Layout) -> tuple[Tensor, Memory | None]:
        q, k, v = self.queries_keys_values(x, layout, rotated=self.given.rotary)
        out, state = ops.linear_attention(
            q,
            k,
            v,
            feature_map=(self.feature_map_q, self.feature_map_k),
            log_decay=F.logsigmoid(self.gate_proj(x).float()).expand(-1, -1, self.num_heads),
            normalise=True,
            eps=self.eps,
            window=ops.Window(self.window, self.head_dim**-0.5, self.alpha, shared=False, sinks=self.sinks),
            initial_state=None if memory is None else memory.state(),
            layout=layout,
        )
        return out, WindowedSums.of(state)
