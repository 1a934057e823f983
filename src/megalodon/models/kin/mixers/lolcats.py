"""LoLCATs: softmax over a window and Hedgehog's linear attention over all that left it, under one sum (2410.10254)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from megalodon import ops
from megalodon.models.implicit import Path, probe
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.attention import window_multiply_adds
from megalodon.models.kin.mixers.base import AtLeastOne, Memory, Reference
from megalodon.models.kin.mixers.feature_maps import HeadwiseMap
from megalodon.models.kin.mixers.hedgehog import distilled, distilled_fields
from megalodon.models.kin.mixers.projected import Projected, ProjectedParameters
from megalodon.models.kin.mixers.sums import WindowedSums, sums_of
from megalodon.ops.layout import Layout


class LoLCATs(Projected):
    """With A_tj = sigmoid(g_h) exp(s_tj - max_window s_t) in the window, phi_q(q_t).phi_k(k_j) before it,
    `y_t = sum_j A_tj v_j / sum_j A_tj`.

    The window slides (the authors' "sw"): so token by token equals one pass.
    """

    kind = "constant"
    turns_heads = True

    class Parameters(ProjectedParameters):
        """window: W, the token itself included. feature_dim: columns of the maps' matrices; None: head_dim. affine:
        weigh the linear part with 1 - sigmoid(g_h)."""

        window: AtLeastOne = 64
        feature_dim: AtLeastOne | None = None
        affine: bool = False

    def __init__(self, config: KinConfig, layer_index: int, parameters: Parameters) -> None:
        super().__init__(config, layer_index, parameters)
        self.window, self.affine = parameters.window, parameters.affine
        self.feature_dim = parameters.feature_dim or self.head_dim
        self.feature_map_q = HeadwiseMap(self.num_heads, self.head_dim, self.feature_dim, "softmax_both")
        self.feature_map_k = HeadwiseMap(self.num_heads, self.head_dim, self.feature_dim, "softmax_both")
        self.window_logit = nn.Parameter(torch.full((self.num_heads,), math.log(0.1 / 0.9)))

    def initialise(self, std: float) -> None:
        self.feature_map_q.initialise()
        self.feature_map_k.initialise()
        init.constant_(self.window_logit, math.log(0.1 / 0.9))

    @classmethod
    def multiply_adds(cls, config: KinConfig, parameters: Any, length: int) -> float:
        features = 2 * (parameters.feature_dim or config.head_size)
        window = window_multiply_adds(config, parameters.window, length)
        return window + 2.0 * config.num_heads * features * config.head_size

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> WindowedSums:
        heads, features, recent = self.num_heads, 2 * self.feature_dim, (batch, self.window, self.num_groups)
        return WindowedSums(
            sums_of((batch, heads, features, self.head_dim), device, dtype),
            sums_of((batch, heads, features), device, dtype),
            *(torch.zeros(*recent, self.head_dim, device=device, dtype=dtype) for _ in range(2)),
        )

    def head_outputs(self, x: Tensor, memory: Any, layout: Layout) -> tuple[Tensor, Memory | None]:
        q, k, v = self.queries_keys_values(x, layout, rotated=True)
        out, state = self.mix(q, k, v, memory, layout)
        return out, WindowedSums.of(state)

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, memory: WindowedSums | None, layout: Layout
    ) -> tuple[Tensor, ops.LinearState]:
        """The output of each head [B, L, H, d], before the output projection, and the state after it."""
        weight = torch.sigmoid(self.window_logit)
        linear = 1 - weight if self.affine else 1.0
        return ops.linear_attention(
            q,
            k,
            v,
            feature_map=(self.feature_map_q, self.feature_map_k),
            normalise=True,
            window=ops.Window(self.window, self.head_dim**-0.5, weight, linear),
            initial_state=None if memory is None else memory.state(),
            layout=layout,
        )

    def paths(self, x: Tensor, layout: Layout) -> list[Path]:
        q, k, v = self.queries_keys_values(x, layout, rotated=True)
        out, probed = (self.mix(q, k, values, None, layout)[0] for values in (v, probe(v)))
        return [self.path(v, out, probed)]

    @classmethod
    def reference(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reference:
        """The authors' layer. Its "tk" windows are trained under another operator than the one it decodes with, and
        are not causal for ragged lengths: the parameters are taken, the window slides."""
        parameters = {
            "window": config["window_size"],
            "feature_dim": config["feature_dim"],
            "affine": bool(config.get("affine_attention_factors", False)),
        }
        ours = distilled(tensors) | {"window_logit": tensors["window_factors"].flatten()}
        return Reference(distilled_fields(config, tensors), parameters, ours)
