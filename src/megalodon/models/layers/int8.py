"""Linear layers with weights in int8, a scale for each output: a quarter of float32's bytes to read for each token.

For decoding on a CPU, where a token costs what reading the weights costs. Few rows go through the compiled kernel,
which widens weights in registers; many rows, as of a prompt, are multiplied with weights that are widened first.
Activations stay in the model's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST = 127
"""Weights are rounded to whole numbers from -LARGEST to LARGEST."""


class Int8Linear(nn.Module):
    """What `layer` computes, its weights rounded to 255 levels of each output's largest.

    Attributes:
        weight: int8 [out, in]; scale: float32 [out]: what a step of a weight is worth; bias: as the layer's, or None.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        wide = layer.weight.detach().float()
        scale = wide.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
        rounded = (wide / scale[:, None]).round_().to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the dtype of x."""
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def quantize(model: nn.Module) -> int:
    """Put an `Int8Linear` in the place of every plain linear layer of a model, for inference; how many there were.

    Raises:
        ValueError: the model is not on a CPU.
    """
    found = [
        (parent, name, layer)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if type(layer) is nn.Linear
    ]
    for parent, name, layer in found:
        if layer.weight.device.type != "cpu":
            raise ValueError(f"the weights are on {layer.weight.device}: int8 is for decoding on a CPU")
        setattr(parent, name, Int8Linear(layer).train(layer.training))
    return len(found)
