"""Hedgehog: normalised linear attention whose features are trained to mimic softmax (2402.04347)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.base import AtLeastOne, NotNegativeFloat, Reference
from megalodon.models.kin.mixers.feature_maps import HeadwiseMap, features_of
from megalodon.models.kin.mixers.normalised import NormalisedLinear
from megalodon.models.kin.mixers.projected import Projected, ProjectedParameters
from megalodon.models.kin.mixers.sums import WeightedSums


class Hedgehog(Projected, NormalisedLinear):
    """`phi(q)^T sum phi(k) v^T / phi(q)^T sum phi(k)`, phi(x) = [softmax(x W_h), softmax(-x W_h)], after rotation."""

    turns_heads = True

    class Parameters(ProjectedParameters):
        """feature_dim: m, columns of W_h; None: the config's head_dim. activation: of the features, "relu" for T2R's.
        skip: add x to x W_h. eps: added to the normaliser."""

        feature_dim: AtLeastOne | None = None
        activation: Literal["softmax_both", "exp_both", "softmax", "exp", "relu", "elu"] = "softmax_both"
        skip: bool = False
        eps: NotNegativeFloat = 1e-12

        def check(self, config: KinConfig) -> None:
            if self.skip and self.feature_dim not in (None, config.head_dim):
                raise ValueError(
                    f"hedgehog: feature_dim={self.feature_dim}: with skip it must be the head_dim, {config.head_dim}"
                )

    def __init__(self, config: KinConfig, layer_index: int, parameters: Parameters) -> None:
        super().__init__(config, layer_index, parameters)
        self.eps, size = parameters.eps, parameters.feature_dim or self.head_dim
        self.features = features_of(parameters.activation, size)
        sizes = (self.num_heads, self.head_dim, size)
        self.feature_map_q = HeadwiseMap(*sizes, parameters.activation, parameters.skip)
        self.feature_map_k = HeadwiseMap(*sizes, parameters.activation, parameters.skip)

    def initialise(self, std: float) -> None:
        self.feature_map_q.initialise()
        self.feature_map_k.initialise()

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> WeightedSums:
        return WeightedSums.empty(batch, self.num_heads, self.features, self.head_dim, device, dtype)

    @classmethod
    def multiply_adds(cls, config: KinConfig, parameters: Any, length: int) -> float:
        features = features_of(parameters.activation, parameters.feature_dim or config.head_size)
        return 2.0 * config.num_heads * features * config.head_size

    def maps(self) -> tuple[HeadwiseMap, HeadwiseMap]:
        return self.feature_map_q, self.feature_map_k

    @classmethod
    def reference(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reference:
        """The later code of the same authors (LoLCATs' repository)."""
        parameters = {"feature_dim": config["feature_dim"], "eps": float(config.get("eps", 1e-12))}
        return Reference(distilled_fields(config, tensors), parameters, distilled(tensors))


def distilled_fields(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Sizes of LoLCATs' repository as fields of `KinConfig`."""
    return {
        "model_dim": config["hidden"],
        "num_heads": config["heads"],
        "num_key_value_heads": config.get("kv_heads", config["heads"]),
        "head_dim": tensors["q_proj.weight"].shape[0] // config["heads"],
        "rope_base": float(config["rope_theta"]),
    }


def distilled(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Projections and maps of LoLCATs' repository under our names."""
    ours = {f"{name}_proj.weight": tensors[f"{name}_proj.weight"] for name in "qkvo"}
    return ours | {f"feature_map_{name}.weight": tensors[f"feature_map_{name}.mlp.layer"] for name in "qk"}
