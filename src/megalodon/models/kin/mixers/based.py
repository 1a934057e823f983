"""Based: normalised linear attention whose features are a Taylor series of exp (2402.18668)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.base import AtLeastOne, MixerParameters, NotNegativeFloat, Reference
from megalodon.models.kin.mixers.normalised import NormalisedLinear
from megalodon.models.kin.mixers.sums import WeightedSums


class Based(NormalisedLinear):
    """`o_t = sum_{j <= t} (1 + s + s^2 / 2) v_j / sum_{j <= t} (1 + s + s^2 / 2)`, s = q_t.k_j / sqrt(d).

    The state holds 1 + d + d^2 features a head, 273 for d = 16.
    """

    class Parameters(MixerParameters):
        """feature_dim: d, size of a query and key head. value_dim: e, of a value head; None: the config's head_dim.
        eps: added to the normaliser."""

        feature_dim: AtLeastOne = 16
        value_dim: AtLeastOne | None = None
        eps: NotNegativeFloat = 1e-12

    def __init__(self, config: KinConfig, layer_index: int, parameters: Parameters) -> None:
        super().__init__(config, layer_index, parameters)
        dim, self.feature_dim, self.eps = config.model_dim, parameters.feature_dim, parameters.eps
        self.rotary = None
        self.num_heads, self.num_groups = config.num_heads, config.key_value_heads
        self.value_dim = parameters.value_dim or config.head_size
        self.q_proj = nn.Linear(dim, self.num_heads * self.feature_dim, bias=False)
        self.k_proj = nn.Linear(dim, self.num_groups * self.feature_dim, bias=False)
        self.v_proj = nn.Linear(dim, self.num_groups * self.value_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.value_dim, dim, bias=False)

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> WeightedSums:
        features = 1 + self.feature_dim + self.feature_dim**2
        return WeightedSums.empty(batch, self.num_groups, features, self.value_dim, device, dtype)

    @classmethod
    def multiply_adds(cls, config: KinConfig, parameters: Any, length: int) -> float:
        features = 1 + parameters.feature_dim + parameters.feature_dim**2
        heads, values = config.num_heads + config.key_value_heads, parameters.value_dim or config.head_size
        return float(heads * features * values)

    def maps(self) -> str:
        return "taylor"

    @classmethod
    def reference(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reference:
        """Zoology's `Based` (`proj_o`) and the based repository's `LinearAttention` (`out_proj`)."""
        if config.get("feature_map", "taylor_exp") != "taylor_exp":
            raise ValueError(f"based: feature_map={config['feature_map']!r} is not reproduced: it must be 'taylor_exp'")
        heads = config["num_heads"]
        fields = {
            "model_dim": config["d_model"],
            "num_heads": heads,
            "num_key_value_heads": config.get("num_key_value_heads", heads),
            "head_dim": config.get("head_dim", config["d_model"] // heads),
        }
        parameters = {"feature_dim": config["feature_dim"], "eps": float(config.get("eps", 1e-12))}
        out = "proj_o.weight" if "proj_o.weight" in tensors else "out_proj.weight"
        names = {"q": "proj_q.weight", "k": "proj_k.weight", "v": "proj_v.weight", "o": out}
        return Reference(fields, parameters, {f"{ours}_proj.weight": tensors[name] for ours, name in names.items()})
