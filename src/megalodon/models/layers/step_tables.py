"""The tables of `ops.compiled.tables` that a fused step of any architecture fills in: its call, and its blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from megalodon.models.layers.few_rows import weight_kind
from megalodon.ops import compiled
from megalodon.ops.compiled import threads
from megalodon.ops.compiled.tables import Call, Weights

ATTENTION = {"v": "v_proj", "z": "z_proj", "r": "r_proj", "h": "h_proj", "o": "o_proj"}
FEED_FORWARD = {"up": "up_proj", "gate": "gate_proj", "down": "down_proj"}
"""What `Weights` calls the linear layers of a block's two branches, and what their modules call them."""

WIDTHS = ("model_dim", "z_dim", "value_dim", "ffn_dim", "heads")
"""The sizes of `Call` by which a step's scratch space is reckoned, in that order."""


class StepTables:
    """What a kernel is told once of a model; what it points to is kept alive."""

    def __init__(
        self,
        kernel: str,
        blocks: int,
        linear_layers: Iterable[nn.Module],
        widths: tuple[int, int, int, int, int],
        **values: int,
    ) -> None:
        """Of linear layers that `few_rows.can_fuse` has looked at.

        `widths`: of `WIDTHS`. `values`: whatever else of `Call` is always the same.

        The last row of `weights`, after those of the blocks, is the final norm's.
        """
        address, kind = compiled.address(kernel), weight_kind(linear_layers)
        assert address is not None and kind is not None
        self.widths = widths
        self._kernel, self._alive = threads.Kernel(address), list[Tensor]()
        self.weights = np.zeros((blocks + 1, len(Weights)), np.int64)
        self._call = np.zeros(len(Call), np.int64)
        _set(self._call, layers=blocks, weights=self.weights.ctypes.data, weight_kind=kind)
        _set(self._call, **dict(zip(WIDTHS, widths, strict=True)), **values)

    def keep(self, tensor: Tensor) -> int:
        """The address of a tensor, which lives as long as the tables."""
        self._alive.append(tensor)
        return tensor.data_ptr()

    def write_linear(self, block: int, attention: nn.Module, feed_forward: nn.Module) -> None:
        """Those of a block with these two branches."""
        layers = {name: getattr(attention, at) for name, at in ATTENTION.items()}
        self.write_layers(block, layers | {name: getattr(feed_forward, at) for name, at in FEED_FORWARD.items()})

    def write_layers(self, block: int, layers: Mapping[str, Any]) -> None:
        """A block's linear layers by their names in `Weights`, read where they lie; biases and scales are small."""
        for name, layer in layers.items():
            if layer is not None:
                self.weights[block, getattr(Weights, name)] = self.keep(layer.weight.detach())
                self.write(block, **{f"{name}_bias": layer.bias, f"{name}_scale": getattr(layer, "scale", None)})

    def write(self, block: int, **tensors: Tensor | None) -> None:
        """What is small, in float32; None is left out."""
        for name, tensor in tensors.items():
            if tensor is not None:
                self.weights[block, getattr(Weights, name)] = self.keep(tensor.detach().float().contiguous())

    def set(self, block: int, **numbers: int) -> None:
        """What is no tensor."""
        for name, number in numbers.items():
            self.weights[block, getattr(Weights, name)] = number

    def run(self, rows: int, **values: int) -> None:
        """One step; `values` are those of `Call` that change from one to the next."""
        call = self._call.copy()
        _set(call, rows=rows, **values)
        self._kernel(call, rows)


def _set(call: np.ndarray, **values: int) -> None:
    for name, value in values.items():
        call[getattr(Call, name)] = value
