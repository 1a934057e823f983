"""One layer of Megalodon and one of Llama, as the scripts time them: bfloat16, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from _gpu import COMPILER, DEVICE, ceilings, milliseconds
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from megalodon import MegalodonConfig, ops
from megalodon.models.layers.cema import CEMA
from megalodon.models.megalodon.block import MegalodonBlock

Prepare = Callable[[int, int], Callable[[Tensor], Tensor]]
"""(batch, length) -> a layer's forward pass, x [B, L, D] -> [B, L, D]."""


@dataclass
class Layer:
    """What is timed: some module's parameters, and its forward pass for a batch of one shape."""

    name: str
    module: nn.Module
    dim: int
    prepare: Prepare

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.module.parameters())


def to_bfloat16(module: nn.Module) -> nn.Module:
    """On the device, in bfloat16 but for CEMA, which the library keeps in float32."""
    module.to(DEVICE, torch.bfloat16)
    for part in module.modules():
        if isinstance(part, CEMA):
            part.float()
    return module


def randomize(module: nn.Module) -> None:
    """Small random weights: nothing is timed on zeros."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02)


def our_layer(config: MegalodonConfig, compiled: bool = False) -> Layer:
    """A block of the model."""
    block = MegalodonBlock(config, 0).train()
    randomize(to_bfloat16(block))
    if compiled:
        block.compile(fullgraph=True, **COMPILER)

    def prepare(batch: int, length: int) -> Callable[[Tensor], Tensor]:
        layout = ops.layout_of(batch, length, DEVICE, chunk_size=config.chunk_size)
        turns = ops.rotations(layout.chunk_positions, config.head_dim, config.rope_base)
        return lambda x: block(x, None, turns, layout, False)[0]

    return Layer("ours", block, config.model_dim, prepare)


def llama_layer(config: LlamaConfig, compiled: bool = False) -> Layer:
    """Transformers' decoder layer with PyTorch's fused attention; compiled whole."""
    layer = to_bfloat16(LlamaDecoderLayer(config, 0)).train()
    randomize(layer)
    if compiled:
        layer.compile(**COMPILER)
    rotary = LlamaRotaryEmbedding(config).to(DEVICE)

    def prepare(batch: int, length: int) -> Callable[[Tensor], Tensor]:
        like = torch.empty(1, device=DEVICE, dtype=torch.bfloat16)
        turns = rotary(like, torch.arange(length, device=DEVICE)[None])

        def forward(x: Tensor) -> Tensor:
            out = layer(x, position_embeddings=turns)
            return out[0] if isinstance(out, tuple) else out

        return forward

    return Layer("llama", layer, config.hidden_size, prepare)


def llama_config(dim: int, hidden: int, heads: int, **others: Any) -> LlamaConfig:
    """Llama of some width, with PyTorch's fused attention."""
    return LlamaConfig(
        hidden_size=dim, intermediate_size=hidden, num_attention_heads=heads, attn_implementation="sdpa", **others
    )


def forward_backward(layer: Layer, batch: int, length: int) -> dict[str, Any]:
    """One pass there and back: milliseconds, tokens per second, the share of the card's rate of matrix products.

    The share counts 6 FLOP for each parameter and token, the products with weights, and nothing else.
    """
    x = torch.randn(batch, length, layer.dim, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn_like(x)
    forward = layer.prepare(batch, length)
    wanted: Sequence[Tensor] = [x, *(p for p in layer.module.parameters() if p.requires_grad)]

    def step() -> None:
        # A layer may keep parameters that a training step does not reach, such as those of decoding.
        torch.autograd.grad(forward(x), wanted, upstream, allow_unused=True)

    time, spread = milliseconds(step, 10, 1.5)
    rate = ceilings().matrix_floor(6 * layer.parameters * batch * length) / time
    return {
        "parameters": layer.parameters, "ms": time, "spread": spread,
        "tokens_per_second": batch * length / time * 1e3, "of_matrix_rate": rate,
    }  # fmt: skip
