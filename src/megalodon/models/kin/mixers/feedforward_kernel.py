"""Linear attention whose features are a small trained network with a positive end (2211.04076), here causal."""

from __future__ import annotations

from typing import Any

import torch

from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.base import AtLeastOne, NotNegativeFloat
from megalodon.models.kin.mixers.feature_maps import FeedForwardMap
from megalodon.models.kin.mixers.normalised import NormalisedLinear
from megalodon.models.kin.mixers.projected import Projected, ProjectedParameters
from megalodon.models.kin.mixers.sums import WeightedSums


class FeedForwardKernel(Projected, NormalisedLinear):
    """`phi(q)^T sum phi(k) v^T / phi(q)^T sum phi(k)`, phi(x) = softplus(W2 gelu(W1 x))."""

    class Parameters(ProjectedParameters):
        """hidden_dim: of the network; None: twice head_dim. feature_dim: its features; None: head_dim. gated: a gated
        linear unit in place of the hidden layer. eps: added to the normaliser."""

        hidden_dim: AtLeastOne | None = None
        feature_dim: AtLeastOne | None = None
        gated: bool = False
        eps: NotNegativeFloat = 1e-12

    def __init__(self, config: KinConfig, layer_index: int, parameters: Parameters) -> None:
        super().__init__(config, layer_index, parameters)
        self.eps, self.rotary = parameters.eps, None
        self.features = parameters.feature_dim or self.head_dim
        hidden = parameters.hidden_dim or 2 * self.head_dim
        self.feature_map = FeedForwardMap(self.head_dim, hidden, self.features, parameters.gated)

    def initialise(self, std: float) -> None:
        self.feature_map.initialise()

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> WeightedSums:
        return WeightedSums.empty(batch, self.num_groups, self.features, self.head_dim, device, dtype)

    @classmethod
    def multiply_adds(cls, config: KinConfig, parameters: Any, length: int) -> float:
        features = parameters.feature_dim or config.head_size
        return float((config.num_heads + config.key_value_heads) * features * config.head_size)

    def maps(self) -> FeedForwardMap:
        return self.feature_map
