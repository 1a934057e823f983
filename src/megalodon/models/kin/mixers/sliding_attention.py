"""Softmax attention over the last W tokens, grouped heads, rotary embedding as in `attention`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megalodon import ops
from megalodon.models.implicit import Path, probe
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.attention import unpacked, window_multiply_adds
from megalodon.models.kin.mixers.base import AtLeastOne, Memory, Reference
from megalodon.models.kin.mixers.projected import Projected, ProjectedParameters
from megalodon.models.kin.mixers.sums import WindowMemory
from megalodon.ops.layout import Layout
from megalodon.ops.recent import recent_after, with_recent


class SlidingAttention(Projected):
    """`attention` of each token over itself and the W - 1 tokens before it; two-way, those after it too."""

    kind = "constant"
    turns_heads = True
    two_way_mode = True

    class Parameters(ProjectedParameters):
        """window: W, the token itself included."""

        window: AtLeastOne = 128

    def __init__(self, config: KinConfig, layer_index: int, parameters: Parameters) -> None:
        super().__init__(config, layer_index, parameters)
        self.window = parameters.window

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> WindowMemory:
        shape = (batch, self.window - 1, self.num_groups, self.head_dim)
        return WindowMemory(*(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)))

    def head_outputs(self, x: Tensor, memory: Any, layout: Layout) -> tuple[Tensor, Memory | None]:
        q, k, v = self.queries_keys_values(x, layout, rotated=True)
        if self.two_way:
            out = ops.two_way_window_attention(q / math.sqrt(self.head_dim), k, v, self.window, layout=layout)
            return out, None
        recent = None if memory is None else ops.RecentKeys(memory.keys, memory.values)
        out = ops.window_attention(q / math.sqrt(self.head_dim), k, v, self.window, recent, layout=layout)
        count, old = self.window - 1, (None, None) if recent is None else recent
        after = (recent_after(with_recent(b, x, count), count, layout) for b, x in zip(old, (k, v), strict=True))
        return out, WindowMemory(*after)

    def paths(self, x: Tensor, layout: Layout) -> list[Path]:
        q, k, v = self.queries_keys_values(x, layout, rotated=True)
        attention = ops.two_way_window_attention if self.two_way else ops.window_attention

        def mixed(values: Tensor) -> Tensor:
            return attention(q / math.sqrt(self.head_dim), k, values, self.window, layout=layout)

        return [self.path(v, mixed(v), mixed(probe(v)))]

    @classmethod
    def multiply_adds(cls, config: KinConfig, parameters: Any, length: int) -> float:
        return window_multiply_adds(config, parameters.window, length)

    @classmethod
    def reference(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reference:
        """Zoology's: one head, biases, no positions, `block_size` keys beside the token's own."""
        fields = {"model_dim": config["d_model"], "num_heads": 1, "rope_base": None}
        parameters = {"window": config["block_size"] + 1, "bias": True, "out_bias": True}
        return Reference(fields, parameters, unpacked(tensors))
