"""What the mixers with long convolutions share: kernels that are functions of time, kept while their parameters stand
still, and the inputs of all that was read.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megalodon.models.kin.mixers.keys_and_values import WITHOUT_END, KeysAndValues
from megalodon.ops.layout import Layout


def time_features(length: int, features: int) -> Tensor:
    """[length, features]: the time in [0, 1], then cosines and minus sines of it at rising frequencies."""
    bands = (features - 1) // 2
    here = torch.device("cpu")  # while it loads a model, Transformers makes some of these on the meta device, some not
    frequencies = torch.linspace(1e-4, bands - 1, bands, device=here)
    angles = frequencies * (2 * torch.pi * torch.arange(length, device=here)[:, None] / length)
    time = torch.linspace(0, 1, length, device=here)[:, None]
    return torch.cat([time, torch.cos(angles), -torch.sin(angles)], dim=1)


class KeptKernel:
    """A kernel of a function of parameters, kept while their values stand still, for reading without gradients.

    A network over thousands of times is much work for one token. Whether a value has changed is found by comparing it:
    nothing else notices every way of changing it.
    """

    def __init__(self) -> None:
        self._known: tuple[Tensor, ...] = ()
        self._kernel: Tensor | None = None

    def of(self, parameters: tuple[Tensor, ...], make: Callable[[int], Tensor], taps: int, longest: int) -> Tensor:
        """`make(taps)`, [D, taps], from the parameters that it uses; at most `longest` taps are ever asked for."""
        if torch.is_grad_enabled():
            return make(taps)
        kernel = self._kernel
        if kernel is None or kernel.shape[1] < taps or not self._still(parameters):
            kernel = self._kernel = make(min(2 * taps, longest))
            self._known = tuple(parameter.detach().clone() for parameter in parameters)
        return kernel[:, :taps]

    def _still(self, parameters: tuple[Tensor, ...]) -> bool:
        return all(
            one.device == other.device and one.dtype == other.dtype and torch.equal(one, other)
            for one, other in zip(self._known, parameters, strict=True)
        )

    def __deepcopy__(self, memo: dict) -> KeptKernel:
        return KeptKernel()

    def __reduce__(self) -> tuple:
        return KeptKernel, ()


def no_inputs(batch: int, dim: int, device: torch.device, dtype: torch.dtype) -> KeysAndValues:
    """The inputs of rows that have read nothing: keys of one head, without values."""
    return KeysAndValues.empty(batch, 1, dim, 0, device, dtype)


def read_inputs(past: KeysAndValues, x: Tensor, layout: Layout) -> tuple[Tensor, KeysAndValues]:
    """What was read before, as `ops.long_convolution` wants it, and the memory with x [B, L, D].

    Returns:
        (history [B, n, D], the latest last, zeros in front of shorter rows; the memory after x).
    """
    after = past.after(x[:, :, None], x.new_empty(*x.shape[:2], 1, 0), layout)
    offset = layout.with_chunks(WITHOUT_END).uniform_offset
    inputs = past.keys[:, :, 0]
    if offset is not None:
        return inputs[:, :offset], after
    width = int(layout.positions.max(initial=0))
    index = np.arange(width) - (width - layout.positions[:, None])
    chosen = torch.from_numpy(index.clip(0)).to(x.device)[..., None].expand(-1, -1, x.shape[2])
    valid = torch.from_numpy(index >= 0).to(x.device)
    history = inputs.gather(1, chosen) if width else inputs[:, :0]
    return history.masked_fill(~valid[..., None], 0), after


def taps_needed(layout: Layout, longest: int, name: str) -> int:
    """Taps that the longest document of this batch needs.

    Raises:
        ValueError: it is longer than `longest` tokens.
    """
    if layout.plain:
        most = int(layout.positions.max(initial=0)) + layout.length
    else:
        real = np.arange(layout.length) < layout.lengths[:, None]
        most = int((layout.document_positions[real] + 1).max(initial=0))
    if most > longest:
        raise ValueError(
            f"{name}: max_length={longest}, but a document has {most} tokens: the filter ends there. Set max_length to "
            "the longest document that the model shall ever read"
        )
    return max(most, 1)
