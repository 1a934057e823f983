"""SCOUT (arXiv 2509.00935): a cheap local mixer, then attention over one checkpoint token a segment.

A layer of the paper is four residual branches: local mixer, feed-forward, checkpoint attention, feed-forward. This
mixer is the first three; the block brings the fourth. It takes the residual stream itself, as the branches need it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from megalodon import ops
from megalodon.models.kin.block import SwiGLU
from megalodon.models.kin.config import KinConfig, refusal
from megalodon.models.kin.mixers import mixer_class
from megalodon.models.kin.mixers.base import AtLeastOne, Memory, Mixer, MixerParameters, Reference
from megalodon.models.kin.mixers.landmarks import LandmarkMemory, attend
from megalodon.models.kin.mixers.mamba import mamba_options
from megalodon.ops.layout import Layout

LOCAL = ("mamba", "sliding_attention")


@dataclass(frozen=True)
class ScoutMemory(Memory):
    """local: the local mixer's memory; checkpoints: keys and values of one token a segment."""

    local: Memory
    checkpoints: LandmarkMemory


class CheckpointAttention(nn.Module):
    """Query t sees itself and every earlier token i with i mod S = S - 1; rotary embedding on halves."""

    def __init__(self, config: KinConfig, segment: int) -> None:
        super().__init__()
        dim, self.head_dim, self.segment, self.rope_base = config.model_dim, config.head_size, segment, config.rope_base
        self.groups = config.key_value_heads
        self.q_proj = nn.Linear(dim, config.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(dim, self.groups * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, self.groups * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_heads * self.head_dim, dim, bias=False)

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> LandmarkMemory:
        """The memory of rows that have read nothing."""
        return LandmarkMemory.empty(batch, self.groups, self.head_dim, self.head_dim, 0, device, dtype)

    def _marks(self, position: np.ndarray) -> np.ndarray:
        return position % self.segment == self.segment - 1

    def forward(self, x: Tensor, memory: LandmarkMemory, layout: Layout) -> tuple[Tensor, LandmarkMemory]:
        """x [B, L, D] -> (y [B, L, D], the memory after it)."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope_base is not None:
            turns = ops.rotations_of(layout, self.head_dim, self.rope_base)
            q, k = ops.rotate_halves(q, turns), ops.rotate_halves(k, turns)
        out, memory = attend(q / math.sqrt(self.head_dim), k, v, memory, layout, self._marks)
        return self.o_proj(out.flatten(-2)), memory


class Scout(Mixer):
    """`x1 = x + local(norm x); x2 = x1 + mlp(norm x1); y = x2 + checkpoint_attention(norm x2) - x`."""

    kind = "growing"
    turns_heads = True
    own_rotary = True
    takes_residual = True

    class Parameters(MixerParameters):
        """segment: S, tokens for each checkpoint; over: the local mixer, "mamba" or "sliding_attention";
        local_parameters: of it."""

        segment: AtLeastOne = 10
        over: str = "mamba"
        local_parameters: dict[str, Any] = {}  # noqa: RUF012

        def check(self, config: KinConfig) -> None:
            if self.over not in LOCAL:
                raise ValueError(f"scout: over={self.over!r}: it must be one of {', '.join(LOCAL)}")
            try:
                self.local().check(config)
            except ValidationError as error:
                raise ValueError(f"scout: local_parameters: {refusal(self.over, error)}") from None

        def local(self) -> MixerParameters:
            """The local mixer's parameters."""
            return mixer_class(self.over).Parameters(**self.local_parameters)

    INNER_NAMES: ClassVar[dict[str, str]] = {
        "input_layernorm": "local_norm",
        "mamba": "local",
        "swa_attn": "local",
        "post_mamba_layernorm": "feed_forward_norm",
        "post_swa_layernorm": "feed_forward_norm",
        "mlp": "feed_forward",
        "pre_attention_layernorm": "attention_norm",
        "self_attn": "attention",
    }
    """The authors' names of a layer's parts -> ours; what is missing is the block's."""

    def __init__(self, config: KinConfig, layer_index: int, parameters: Parameters) -> None:
        super().__init__(config, layer_index, parameters)
        dim, eps = config.model_dim, config.norm_eps
        self.local_norm = nn.RMSNorm(dim, eps)
        self.local = mixer_class(parameters.over)(config, layer_index, parameters.local())
        hidden = config.ffn_hidden_dim
        self.feed_forward_norm = nn.RMSNorm(dim, eps) if hidden else None
        self.feed_forward = SwiGLU(dim, hidden) if hidden else None
        self.attention_norm = nn.RMSNorm(dim, eps)
        self.attention = CheckpointAttention(config, parameters.segment)

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> ScoutMemory:
        local = self.local.empty(batch, device, dtype)
        assert local is not None
        return ScoutMemory(local, self.attention.empty(batch, device, dtype))

    def forward(self, x: Tensor, memory: ScoutMemory | None, layout: Layout) -> tuple[Tensor, ScoutMemory]:
        memory = self.empty(len(x), x.device, x.dtype) if memory is None else memory
        total, local = self.local(self.local_norm(x), memory.local, layout)
        if self.feed_forward is not None and self.feed_forward_norm is not None:
            total = total + self.feed_forward(self.feed_forward_norm(x + total))
        y, checkpoints = self.attention(self.attention_norm(x + total), memory.checkpoints, layout)
        return total + y, ScoutMemory(local, checkpoints)

    @classmethod
    def multiply_adds(cls, config: KinConfig, parameters: Any, length: int) -> float:
        seen = 1 + float((np.arange(length) // parameters.segment).mean())  # itself, and earlier checkpoints
        local = mixer_class(parameters.over).multiply_adds(config, parameters.local(), length)
        return local + 2.0 * config.num_heads * config.head_size * seen

    @classmethod
    def reference(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reference:
        """A layer of the authors' model; its second feed-forward and the norm before it are the block's."""
        ours = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if part in cls.INNER_NAMES:
                ours[f"{cls.INNER_NAMES[part]}.{rest}"] = tensor
            elif part not in ("sec_mlp", "post_attention_layernorm"):
                raise ValueError(f"scout: {name} is no parameter of a layer")
        over_mamba = any(name.startswith("mamba.") for name in tensors)
        if over_mamba:
            local = mamba_options({"hidden_size": config["hidden_size"], **config.get("mamba", {}), **config})[1]
        else:
            local = {"window": config["sliding_window"]}
        parameters = {
            "segment": config["selection_window_size"],
            "over": "mamba" if over_mamba else "sliding_attention",
            "local_parameters": local,
        }
        fields = {
            "model_dim": config["hidden_size"],
            "num_heads": config["num_attention_heads"],
            "num_key_value_heads": config.get("num_key_value_heads"),
            "ffn_hidden_dim": config["intermediate_size"],
            "rope_base": float(config["rope_theta"]),
            "norm_eps": config["rms_norm_eps"],
        }
        return Reference(fields, parameters, ours)
