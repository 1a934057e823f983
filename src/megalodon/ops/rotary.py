"""Rotary position embedding as complex numbers: on adjacent pairs (x0, x1), (x2, x3), ... (SPEC: Chunk attention), or
on the halves of a head, (x0, x_{d/2}), (x1, x_{d/2 + 1}), ... as Llama has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon.ops.layout import Layout


def rotations(positions: Tensor, dim: int, base: float) -> Tensor:
    """Unit complex numbers that turn pair i of a token at position t by `t * base**(-2i / dim)` radians.

    Args:
        positions: int64 [...]; positions inside the chunk.
        dim: size of a head; even.
        base: the slowest pair turns once in about `2 pi base` tokens.

    Returns:
        complex64 [..., dim / 2]; angles are computed in float64 where the device has it.
    """
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=wide, device=positions.device) / dim)
    angles = positions[..., None].to(wide) * frequencies
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def rotations_of(layout: Layout, dim: int, base: float) -> Tensor:
    """The `rotations` of a batch's tokens at their places in their documents, made once: complex [(B,) L, dim / 2]."""
    cache = layout.__dict__.setdefault("_rotations", {})
    if (dim, base) not in cache:
        cache[dim, base] = rotations(layout.token_positions, dim, base)
    return cache[dim, base]


def turns_of(layout: Layout, frequencies: tuple[float, ...], amplitude: float) -> Tensor:
    """`rotations_of` where pair i turns by `frequencies[i]` radians a token, every number times `amplitude`."""
    cache = layout.__dict__.setdefault("_rotations", {})
    if (frequencies, amplitude) not in cache:
        positions = layout.token_positions
        wide = torch.float32 if positions.device.type == "mps" else torch.float64
        angles = positions[..., None].to(wide) * torch.tensor(frequencies, dtype=wide, device=positions.device)
        cache[frequencies, amplitude] = torch.polar(torch.full_like(angles, amplitude), angles).to(torch.complex64)
    return cache[frequencies, amplitude]


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the pairs of each head.

    Args:
        x: [B, L, H, d], any floating dtype; computed in float32 (float64 for float64).
        turns: complex [L, d / 2] or [B, L, d / 2], from `rotations`.

    Returns:
        [B, L, H, d] in the dtype of x.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if torch.compiler.is_compiling():  # the compiler fuses real arithmetic only
        even, odd = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
        cosine, sine = torch.view_as_real(turns)[..., None, :, :].to(wide).unbind(-1)
        return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], -1).flatten(-2).to(x.dtype)
    pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns[..., None, :]).flatten(-2).to(x.dtype)


def rotate_halves(x: Tensor, turns: Tensor) -> Tensor:
    """`rotate` with pairs (i, i + d/2): arguments and result are those of `rotate`. Turns of fewer pairs turn the first
    numbers of each head, in halves, and leave the others."""
    turned = 2 * turns.shape[-1]
    if turned < x.shape[-1]:
        return torch.cat([rotate_halves(x[..., :turned], turns), x[..., turned:]], dim=-1)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    cosine, sine = torch.view_as_real(turns)[..., None, :, :].to(wide).unbind(-1)
    low, high = x.to(wide).chunk(2, dim=-1)
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine], dim=-1).to(x.dtype)
