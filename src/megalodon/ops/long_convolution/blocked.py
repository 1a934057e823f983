"""The causal convolution in three forms: a few taps by shifted products, a few tokens by one product with what came
before, and the rest by the Fourier transform. Documents that stand in one row are convolved each by itself.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megalodon.ops.layout import Layout
from megalodon.ops.tiles import move_rows

FEW_TAPS = 16
"""Kernels up to this long are applied tap by tap."""

FEW_TOKENS = 4
"""Pieces up to this long are multiplied with their history directly: decoding costs no transform."""


def long_convolution(x: Tensor, kernel: Tensor, history: Tensor, layout: Layout) -> Tensor:
    """See `megalodon.ops.long_convolution`."""
    length = x.shape[1]
    if not x.numel():
        return x
    if kernel.shape[1] <= FEW_TAPS:
        y = _by_taps(x, kernel, history, layout)
    elif layout.starts is not None:
        y = _by_document(x, kernel, history, layout)
    elif length <= FEW_TOKENS:
        y = _by_token(x, kernel, history)
    else:
        y = _by_transform(torch.cat([history, x], dim=1), kernel, length)
    padding = layout.padding
    return y if padding is None else y.masked_fill(padding[..., None], 0)


def _by_taps(x: Tensor, kernel: Tensor, history: Tensor, layout: Layout) -> Tensor:
    length, taps = x.shape[1], kernel.shape[1]
    within = None
    if layout.starts is not None:
        # earlier tokens of its document that a token may reach; the row's first document reaches its history
        reach = np.arange(length) - layout.document_start + np.where(layout.document_start == 0, taps, 0)
        within = torch.from_numpy(reach).to(x.device)[..., None]
    inputs = torch.cat([_last(history, taps - 1), x], dim=1)
    y = x * kernel[:, 0]
    for lag in range(1, taps):
        shifted = inputs[:, taps - 1 - lag : taps - 1 - lag + length]
        if within is not None:
            shifted = shifted * (within >= lag)
        y = torch.addcmul(y, shifted, kernel[:, lag])
    return y


def _last(history: Tensor, count: int) -> Tensor:
    """The last `count` inputs, zeros before them."""
    have = history.shape[1]
    return history[:, have - count :] if have >= count else F.pad(history, (0, 0, count - have, 0))


def _by_token(x: Tensor, kernel: Tensor, history: Tensor) -> Tensor:
    inputs, before = torch.cat([history, x], dim=1), history.shape[1]
    reach = min(kernel.shape[1], inputs.shape[1])
    reversed_taps = kernel[:, :reach].flip(1).t()
    outputs = []
    for t in range(before + 1, inputs.shape[1] + 1):
        seen = inputs[:, max(t - reach, 0) : t]
        outputs.append((seen * reversed_taps[reach - seen.shape[1] :]).sum(1))
    return torch.stack(outputs, dim=1)


def _by_transform(inputs: Tensor, kernel: Tensor, wanted: int) -> Tensor:
    """The last `wanted` outputs for inputs [B, n, D] before which nothing was."""
    have = inputs.shape[1]
    kernel = kernel[:, :have]
    # what wraps around the end falls on outputs that nobody wants
    size = _transform_length(max(have, wanted + kernel.shape[1] - 1))
    spectrum = torch.fft.rfft(inputs.mT.contiguous(), n=size) * torch.fft.rfft(kernel, n=size)
    return torch.fft.irfft(spectrum, n=size)[..., have - wanted : have].mT


def _transform_length(least: int) -> int:
    """The smallest even length from `least` on whose only odd factors are one 3, one 5 or one 9."""
    candidates = (odd << max(0, (-(-least // odd) - 1).bit_length()) for odd in (1, 3, 5, 9))
    return max(2, min(size for size in candidates if size % 2 == 0 or size == 1))


def _by_document(x: Tensor, kernel: Tensor, history: Tensor, layout: Layout) -> Tensor:
    """Documents of like length side by side, one transform for each power of two."""
    assert layout.starts is not None
    batch, before = x.shape[0], history.shape[1]
    inputs = torch.cat([history, x], dim=1)
    width, dim = inputs.shape[1:]
    tokens = inputs.reshape(-1, dim)
    total = torch.zeros_like(tokens)
    begins = np.zeros((batch, width), dtype=bool)
    begins[:, 0] = True
    begins[:, before:] |= layout.starts
    row, first = np.nonzero(begins)
    end = np.where(np.append(row[1:] != row[:-1], True), before + layout.lengths[row], np.append(first[1:], 0))
    count = end - first
    for size in np.unique(_power_of_two(count)):
        chosen = np.nonzero((_power_of_two(count) == size) & (count > 0))[0]
        if not len(chosen):
            continue
        number = np.repeat(np.arange(len(chosen)), count[chosen])
        place = np.arange(len(number)) - np.repeat(np.cumsum(count[chosen]) - count[chosen], count[chosen])
        source = torch.from_numpy((row * width + first)[chosen][number] + place).to(x.device)
        target = torch.from_numpy(number * size + place).to(x.device)
        documents = move_rows(tokens, source, target, len(chosen) * int(size)).view(len(chosen), int(size), dim)
        y = _by_transform(documents, kernel, int(size)).reshape(-1, dim)
        total = total + move_rows(y, target, source, len(tokens))
    return total.view(batch, width, dim)[:, before:]


def _power_of_two(count: np.ndarray) -> np.ndarray:
    return 2 ** np.ceil(np.log2(np.maximum(count, 1))).astype(np.int64)
