"""H3 (arXiv 2212.14052): keys delayed by a shift, their products with values kept by a diagonal state space, read by
queries.

The authors convolve with long kernels. Those of the state space are sums of powers, so here they run as the recurrence
that they are: the state is constant and no length is the last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from megalodon import ops
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.base import AtLeastOne, Memory, Mixer, MixerParameters, Reference
from megalodon.ops.backend import full_precision
from megalodon.ops.layout import Layout


@dataclass(frozen=True)
class H3Memory(Memory):
    """recent: [B, N - 1, D], the last keys before the shift; state: [B, D h, N / 2, 2], complex as pairs."""

    PARTS: ClassVar[Mapping[str, frozenset[str]]] = MappingProxyType(
        {"state": frozenset({"state"}), "convolution": frozenset({"recent"})}
    )

    recent: Tensor
    state: Tensor


class Shift(nn.Module):
    """A kernel of N taps a channel: `kernel_j = sum_n C_{n + j} B_n`."""

    def __init__(self, dim: int, taps: int) -> None:
        super().__init__()
        self.B = nn.Parameter(torch.empty(dim, taps))
        self.C = nn.Parameter(torch.empty(dim, taps))

    def initialise(self) -> None:
        """B the first unit vector, so that C is the kernel, drawn from N(0, 1)."""
        unit = torch.zeros_like(self.B)
        unit[:, 0] = 1
        init.copy_(self.B, unit)
        init.normal_(self.C)

    def kernel(self) -> Tensor:
        """[D, N], the current token's tap first."""
        taps = self.B.shape[1]
        padded = nn.functional.pad(self.C, (0, taps - 1))
        windows = padded.unfold(1, taps, 1)  # [D, N, N]: C_{j + n} at j, n
        return (windows * self.B[:, None]).sum(-1)


class DiagonalStateSpace(nn.Module):
    """`kernel_j = 2 Re sum_n C_n B'_n A'_n^j`, A' and B' by the bilinear rule from A = -exp(a) + i b and the step."""

    def __init__(self, heads: int, pairs: int) -> None:
        super().__init__()
        self.log_dt = nn.Parameter(torch.empty(heads))
        self.log_A_real = nn.Parameter(torch.empty(heads, pairs))
        self.A_imag = nn.Parameter(torch.empty(heads, pairs))
        self.B = nn.Parameter(torch.empty(heads, pairs, 2))
        self.C = nn.Parameter(torch.empty(heads, pairs, 2))

    def initialise(self) -> None:
        """S4D's linear start, with steps drawn log-uniformly from 0.001 to 0.1."""
        init.uniform_(self.log_dt, math.log(0.001), math.log(0.1))
        init.constant_(self.log_A_real, math.log(0.5))
        init.copy_(self.A_imag, (math.pi * torch.arange(self.A_imag.shape[1])).expand_as(self.A_imag))
        init.copy_(self.B, torch.tensor([1.0, 0.0]).expand_as(self.B))
        init.normal_(self.C, std=0.5**0.5)

    def recurrence(self) -> tuple[Tensor, Tensor]:
        """(A' [H, N / 2], 2 C B' [H, N / 2]), complex in float32 or better."""
        real = full_precision(self.C.dtype)
        a = torch.complex(-self.log_A_real.to(real).exp(), self.A_imag.to(real))
        half = a * self.log_dt.to(real).exp()[:, None] / 2
        b, c = (torch.complex(*value.to(real).unbind(-1)) for value in (self.B, self.C))
        dt = self.log_dt.to(real).exp()[:, None]
        return (1 + half) / (1 - half), 2 * c * b * dt / (1 - half)


class H3(Mixer):
    """`kv = outer(shift(k) + Dk k, v)` per head; `out = Wo (q . (s4d(kv) + Dv kv))`."""

    kind = "constant"

    class Parameters(MixerParameters):
        """state_size: N, taps of the shift and of the state space's complex numbers twice their count, even;
        head_dim: h, width of a head's keys and values."""

        state_size: int = 64
        head_dim: AtLeastOne = 1

        def check(self, config: KinConfig) -> None:
            if self.state_size < 2 or self.state_size % 2:
                raise ValueError(f"h3: state_size={self.state_size}: it must be even and at least 2")
            if config.model_dim % self.head_dim:
                raise ValueError(f"h3: head_dim={self.head_dim} does not divide model_dim={config.model_dim}")

    def __init__(self, config: KinConfig, layer_index: int, parameters: Parameters) -> None:
        super().__init__(config, layer_index, parameters)
        self.dim, self.head_dim, self.state_size = config.model_dim, parameters.head_dim, parameters.state_size
        self.heads = self.dim // self.head_dim
        self.q_proj = nn.Linear(self.dim, self.dim)
        self.k_proj = nn.Linear(self.dim, self.dim)
        self.v_proj = nn.Linear(self.dim, self.dim)
        self.shift = Shift(self.dim, self.state_size)
        self.shift_skip = nn.Parameter(torch.empty(self.dim))
        self.state_space = DiagonalStateSpace(self.heads, self.state_size // 2)
        self.skip = nn.Parameter(torch.empty(self.heads))
        self.out_proj = nn.Linear(self.dim, self.dim)
        self.initialise(config.init_std)

    @torch.no_grad()
    def initialise(self, std: float) -> None:
        self.shift.initialise()
        self.state_space.initialise()
        init.normal_(self.shift_skip)
        init.normal_(self.skip)

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> H3Memory:
        channels = self.dim * self.head_dim
        return H3Memory(
            torch.zeros(batch, self.state_size - 1, self.dim, device=device, dtype=dtype),
            torch.zeros(batch, channels, self.state_size // 2, 2, device=device, dtype=full_precision(dtype)),
        )

    def forward(self, u: Tensor, memory: H3Memory | None, layout: Layout) -> tuple[Tensor, H3Memory]:
        memory = self.empty(len(u), u.device, u.dtype) if memory is None else memory
        q, k, v = self.q_proj(u), self.k_proj(u), self.v_proj(u)
        k, recent = ops.long_convolution(k, self.shift.kernel(), self.shift_skip, memory.recent, layout=layout)
        q, k, v = (value.unflatten(-1, (self.heads, -1)) for value in (q, k, v))
        product = k[..., :, None] * v[..., None, :]  # [B, L, H, h, h]: key index, value index
        decay, read = self.state_space.recurrence()
        per_head = self.head_dim**2
        decay, read = (value.repeat_interleave(per_head, dim=0) for value in (decay, read))
        kept, state = ops.cema(
            product.flatten(2),
            torch.ones_like(decay.real),
            decay,
            read,
            self.skip.repeat_interleave(per_head),
            torch.view_as_complex(memory.state),
            layout=layout,
        )
        y = (q[..., :, None] * kept.view_as(product)).sum(-2)
        y = y.transpose(-1, -2).flatten(-2)  # the authors lay out heads last here
        return self.out_proj(y), H3Memory(recent, torch.view_as_real(state))

    @classmethod
    def reference(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reference:
        """Zoology's H3."""
        ours = {REFERENCE_NAMES.get(name, name): tensor for name, tensor in tensors.items()}
        for name in ("shift.C", "state_space.C"):
            ours[name] = ours[name][0]
        parameters = {"state_size": config["d_state"], "head_dim": config.get("head_dim", 1)}
        return Reference({"model_dim": config["d_model"], "num_heads": 1}, parameters, ours)


REFERENCE_NAMES = {
    "D": "skip",
    "ssm_k_D": "shift_skip",
    "ssm_k_kernel.kernel.B": "shift.B",
    "ssm_k_kernel.kernel.C": "shift.C",
    "kernel.kernel.log_dt": "state_space.log_dt",
    "kernel.kernel.inv_A_real": "state_space.log_A_real",
    "kernel.kernel.A_imag": "state_space.A_imag",
    "kernel.kernel.B": "state_space.B",
    "kernel.kernel.C": "state_space.C",
    "output_linear.weight": "out_proj.weight",
    "output_linear.bias": "out_proj.bias",
}
"""The authors' names of parameters -> ours."""
