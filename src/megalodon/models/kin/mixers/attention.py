"""Softmax attention as Llama has it: grouped heads, rotary embedding on halves, all keys kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megalodon.models.implicit import Path, probe
from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers.base import Memory, Reference
from megalodon.models.kin.mixers.keys_and_values import KeysAndValues, attend
from megalodon.models.kin.mixers.projected import Projected
from megalodon.ops.layout import Layout, document_numbers


class Attention(Projected):
    """`out = Wo softmax(rope(Wq x) rope(Wk x)^T / sqrt(d)) Wv x`."""

    kind = "growing"
    turns_heads = True
    two_way_mode = True

    def empty(self, batch: int, device: torch.device, dtype: torch.dtype) -> KeysAndValues:
        return KeysAndValues.empty(batch, self.num_groups, self.head_dim, self.head_dim, device, dtype)

    def head_outputs(self, x: Tensor, memory: Any, layout: Layout) -> tuple[Tensor, Memory | None]:
        q, k, v = self.queries_keys_values(x, layout, rotated=True)
        if self.two_way:
            return _both_sides(q, k, v, layout), None
        memory = self.empty(len(x), x.device, k.dtype) if memory is None else memory
        return attend(q / math.sqrt(self.head_dim), k, v, memory, layout)

    def paths(self, x: Tensor, layout: Layout) -> list[Path]:
        q, k, v = self.queries_keys_values(x, layout, rotated=True)
        q = q / math.sqrt(self.head_dim)

        def mixed(values: Tensor) -> Tensor:
            if self.two_way:
                return _both_sides(q * math.sqrt(self.head_dim), k, values, layout)
            groups, size = k.shape[2:]
            nothing = KeysAndValues.empty(len(x), groups, size, values.shape[-1], x.device, k.dtype)
            return attend(q, k, values, nothing, layout)[0]

        return [self.path(v, mixed(v), mixed(probe(v)))]

    @classmethod
    def multiply_adds(cls, config: KinConfig, parameters: Any, length: int) -> float:
        return window_multiply_adds(config, length, length)

    def cross(self, x: Tensor, source: Tensor, padding: Tensor | None = None) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in self._heads(x, source))
        seen = None if padding is None else ~padding[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=self.num_heads != self.num_groups)
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    @classmethod
    def reference(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Reference:
        """Zoology's attention: one product for queries, keys and values, with biases, no positions."""
        dim, heads = config["d_model"], config["num_heads"]
        fields = {"model_dim": dim, "num_heads": heads, "rope_base": None}
        return Reference(fields, {"bias": True, "out_bias": True}, unpacked(tensors))


def window_multiply_adds(config: KinConfig, window: int, length: int) -> float:
    """Scores and weighted values of one token over the last `window` of a row of `length`, on average."""
    seen = length / 2 if window >= length else window * (1 - window / (2 * length))
    return 2.0 * config.num_heads * config.head_size * seen


def _both_sides(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Every token over all of its document: [B, L, H, e]."""
    seen = None
    if not layout.plain:
        documents = document_numbers(layout)
        seen = (documents[:, :, None] == documents[:, None])[:, None]
    heads, keys, values = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[2] != k.shape[2]
    return F.scaled_dot_product_attention(heads, keys, values, seen, enable_gqa=grouped).transpose(1, 2)


def unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zoology's `Wqkv` and `out_proj` under our names."""
    state_dict = {f"o_proj.{kind}": tensors[f"out_proj.{kind}"] for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        for name, part in zip("qkv", tensors[f"Wqkv.{kind}"].chunk(3), strict=True):
            state_dict[f"{name}_proj.{kind}"] = part
    return state_dict
