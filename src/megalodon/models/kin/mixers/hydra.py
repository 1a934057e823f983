"""Hydra (the token mixer of arXiv 2502.00972, code of its own authors): a quasiseparable matrix, from two runs of
Mamba-2's scan, one from each side, with a diagonal of its own. It sees both sides: for encoders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from megalodon import ops
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.base import AtLeastOne, Mixer, MixerParameters, NotNegativeFloat, Positive, Reference
from megalodon.models.kin.mixers.mamba2 import GroupedNorm, Mamba2, mamba2_options
from megalodon.models.kin.mixers.state_space import DepthwiseConvolution, rates_of, step_bias_, steps_of
from megalodon.ops.layout import Layout, document_numbers


class Hydra(Mixer):
    """`y_t = f_t + b_t + x_t (Wd x_t + d)`, f the scan of all tokens before t, b of all after it; `out = Wout (norm(y)
    * silu z)`."""

    kind = "none"
    two_way_mode = True
    causal_mode = False

    class Parameters(MixerParameters):
        """expand: E / D; head_dim: P (None: 64, or its largest part that divides E); state_size: N; groups: of heads
        that share B and C; kernel_size: taps of the centred convolution, odd."""

        expand: AtLeastOne = 2
        head_dim: AtLeastOne | None = None
        state_size: AtLeastOne = 64
        groups: AtLeastOne = 1
        kernel_size: AtLeastOne = 7
        norm_eps: NotNegativeFloat = 1e-5
        step_min: Positive = 0.001
        step_max: Positive = 0.1
        step_floor: NotNegativeFloat = 1e-4

        def head_of(self, inner: int) -> int:
            """P for E channels."""
            return Mamba2.Parameters(head_dim=self.head_dim).head_of(inner)

        def check(self, config: KinConfig) -> None:
            if self.kernel_size % 2 == 0:
                raise ValueError(f"hydra: kernel_size={self.kernel_size}: it must be odd")
            names = ("expand", "head_dim", "state_size", "groups", "step_min", "step_max")
            sizes = {name: getattr(self, name) for name in names}
            try:
                Mamba2.Parameters(**sizes).check(config)
            except ValueError as error:
                raise ValueError(str(error).replace("mamba2:", "hydra:", 1)) from None

    def __init__(self, config: KinConfig, layer_index: int, parameters: Parameters) -> None:
        super().__init__(config, layer_index, parameters)
        given = self.given = parameters
        self.inner = given.expand * config.model_dim
        self.heads = self.inner // given.head_of(self.inner)
        self.channels = self.inner + 4 * given.groups * given.state_size
        self.in_proj = nn.Linear(config.model_dim, self.inner + self.channels + 2 * self.heads, bias=False)
        self.conv1d = DepthwiseConvolution(self.channels, given.kernel_size, bias=True)
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(self.heads))
        self.fc_D = nn.Linear(self.inner, self.heads, bias=False)
        self.norm = GroupedNorm(self.inner, 1, given.norm_eps)
        self.out_proj = nn.Linear(self.inner, config.model_dim, bias=False)
        self.initialise(config.init_std)

    @torch.no_grad()
    def initialise(self, std: float) -> None:
        given = self.given
        self.conv1d.initialise()
        step_bias_(self.dt_bias, given.step_min, given.step_max, given.step_floor)
        init.zeros_(self.A_log)
        init.ones_(self.D)
        init.ones_(self.norm.weight)

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        return None

    def forward(self, u: Tensor, memory: None, layout: Layout) -> tuple[Tensor, None]:
        z, mixed, raw = self.in_proj(u).split([self.inner, self.channels, 2 * self.heads], dim=-1)
        documents = document_numbers(layout)
        mixed = F.silu(_centred(mixed, self.conv1d, documents))
        weights = self.given.groups * self.given.state_size
        x, forwards, backwards = mixed.split([self.inner, 2 * weights, 2 * weights], dim=-1)
        heads = x.unflatten(-1, (self.heads, -1))
        raw_forwards, raw_backwards = raw.chunk(2, dim=-1)
        y = self._before(heads, raw_forwards, forwards, documents)
        turned = (value.flip(1) for value in (heads, raw_backwards, backwards, documents))
        y = y + self._before(*turned).flip(1)
        y = y + heads * (self.fc_D(x) + self.D)[..., None]
        return self.out_proj(self.norm(y.flatten(-2)) * F.silu(z)), None

    def _before(self, x: Tensor, raw: Tensor, bc: Tensor, documents: Tensor) -> Tensor:
        """For each token, the scan of the tokens before it, read with the weights of the one just before it."""
        b, c = (value.unflatten(-1, (self.given.groups, -1)) for value in bc.chunk(2, dim=-1))
        dt = steps_of(raw, self.dt_bias)
        y, _ = ops.selective_scan(x, dt, rates_of(self.A_log), b, c, segment_ids=documents)
        inside = documents[:, 1:] == documents[:, :-1]
        return F.pad(y[:, :-1] * inside[..., None, None], (0, 0, 0, 0, 1, 0))

    @classmethod
    def reference(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reference:
        """The authors' mixer, whose parameters have the same names."""
        fields, known = mamba2_options(config)
        parameters: dict[str, Any] = {
            name: known[name] for name in ("expand", "head_dim", "state_size", "groups") if name in known
        }
        return Reference(
            {**fields, "two_way": True}, {**parameters, "kernel_size": config.get("d_conv", 7)}, dict(tensors)
        )


def _centred(x: Tensor, kernel: DepthwiseConvolution, documents: Tensor) -> Tensor:
    """The convolution whose middle tap multiplies the token itself; nothing comes from other documents."""
    reach, length = kernel.taps // 2, x.shape[1]
    around = F.pad(x, (0, 0, reach, reach))
    numbers = F.pad(documents, (reach, reach), value=-2)
    y = x.new_zeros(()) if kernel.bias is None else kernel.bias
    for tap in range(kernel.taps):
        same = numbers[:, tap : tap + length] == documents
        y = torch.addcmul(y, around[:, tap : tap + length] * same[..., None], kernel.weight[:, 0, tap])
    return y
