"""Linear layers for a few rows through a compiled kernel, which reads the weights where they lie."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from megalodon.models.layers.int8 import Int8Linear
from megalodon.models.layers.watch import is_forwarded_as_written
from megalodon.ops import compiled
from megalodon.ops.backend import backend_for
from megalodon.ops.compiled import tables, threads
from megalodon.ops.compiled.tables import Product

PRODUCT = "step.matrix"

LINEAR = (nn.Linear, Int8Linear)
"""Layers whose weights kernels can read."""


def weight_kind(layers: Iterable[nn.Module]) -> int | None:
    """How kernels are told of these layers' weights; None where they cannot read them: all plain, in one dtype."""
    dtypes = set()
    for layer in layers:
        if not isinstance(layer, LINEAR) or not is_forwarded_as_written(layer, LINEAR):
            return None
        weight = layer.weight
        if type(weight) not in (nn.Parameter, Tensor):  # another library's, that stands for numbers elsewhere
            return None
        if weight.device.type != "cpu" or weight.layout is not torch.strided or not weight.is_contiguous():
            return None
        dtypes.add(layer.weight.dtype)
    return tables.KINDS.get(dtypes.pop()) if len(dtypes) == 1 else None


def can_fuse(layers: Iterable[nn.Module], dtype: torch.dtype, kernel: str) -> bool:
    """Whether a kernel reads these linear layers of a model of `dtype` in this process."""
    if backend_for(torch.device("cpu"), dtype)[0] != "numba" or weight_kind(layers) is None:
        return False
    return compiled.address(kernel) is not None


class FusedProduct:
    """`x @ layer.weight.T + layer.bias` of a few rows, the weights read where they lie."""

    def __init__(self, layer: nn.Linear | Int8Linear) -> None:
        """Of what `can_fuse` has looked at."""
        kind, address = weight_kind([layer]), compiled.address(PRODUCT)
        assert kind is not None and address is not None
        self._kernel, self._width = threads.Kernel(address), len(layer.weight)
        weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach().float()
        scale = layer.scale.detach().float() if isinstance(layer, Int8Linear) else None
        self._alive = (weight, scale, bias)
        self._table = np.zeros(len(Product), np.int64)
        for name, value in (
            ("weight", weight.data_ptr()),
            ("kind", kind),
            ("scale", 0 if scale is None else scale.data_ptr()),
            ("bias", 0 if bias is None else bias.data_ptr()),
            ("inputs", weight.shape[1]),
            ("width", self._width),
        ):
            self._table[getattr(Product, name)] = value

    def __call__(self, x: Tensor) -> Tensor:
        """[M, in] -> float32 [M, out]."""
        x = x.float().contiguous()
        out, table = x.new_empty(len(x), self._width), self._table.copy()
        table[Product.x], table[Product.rows], table[Product.out] = x.data_ptr(), len(x), out.data_ptr()
        self._kernel(table, len(x))
        return out
