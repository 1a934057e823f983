"""States in fewer bytes: keys, values and working memories as int8 or fp8 numbers with a scale for each block of 64.

What is not compressed (statistics, moving averages, log masses, positions) keeps every bit. Compression loses some: it
is for whoever keeps many contexts, off unless asked for. docs/gecko.md has the loss that it costs, measured.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Storage = Literal["exact", "int8", "fp8"]
BLOCK = 64
"""Numbers of a head, along its last dimension, that share a scale."""
SCALE = ".scale"
"""What the name of a compressed tensor's scales ends in."""
_KINDS: dict[str, tuple[torch.dtype, float]] = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


def check_storage(storage: str) -> Storage:
    """The name of a way of storing, checked.

    Raises:
        ValueError: there is no such way.
    """
    for known in get_args(Storage):
        if storage == known:
            return known
    raise ValueError(f"storage={storage!r}: it must be one of {', '.join(get_args(Storage))}")


def compressed(tensors: Mapping[str, Tensor], storage: Storage, kinds: Collection[str]) -> dict[str, Tensor]:
    """The tensors with those whose last name is one of `kinds` as small numbers, each beside its scales.

    Args:
        tensors: by name, floating-point where compressed, [..., n].
        storage: "exact" changes nothing.
        kinds: such as `State.compressible`.

    Returns:
        for [..., n] one of the same shape in int8 or float8_e4m3fn, and under `name.scale` bfloat16 [..., n / 64].
    """
    if storage == "exact":
        return dict(tensors)
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.rsplit(".", 1)[-1] in kinds and tensor.is_floating_point():
            found[name], found[name + SCALE] = _compress(tensor, *_KINDS[storage])
        else:
            found[name] = tensor
    return found


def restored(tensors: Mapping[str, Tensor], dtype: torch.dtype, wide: Collection[str] = ()) -> dict[str, Tensor]:
    """The inverse of `compressed`, as near as it is: in `dtype`, or float32 at least for the kinds in `wide`.

    Raises:
        ValueError: scales do not fit their numbers.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE):
            continue
        scale = tensors.get(name + SCALE)
        if scale is None:
            found[name] = tensor
            continue
        if scale.shape != scale_shape(tuple(tensor.shape)):
            raise ValueError(f"{name}{SCALE} has shape {tuple(scale.shape)}: it does not fit {tuple(tensor.shape)}")
        kept = torch.promote_types(dtype, torch.float32) if name.rsplit(".", 1)[-1] in wide else dtype
        found[name] = _restore(tensor, scale, kept)
    return found


def scale_shape(shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """The shape of the scales of a tensor of this shape."""
    last = shape[-1]
    assert last is not None
    return (*shape[:-1], -(-last // BLOCK))


def _compress(x: Tensor, dtype: torch.dtype, largest: float) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    blocks = F.pad(x.float(), (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = (blocks.abs().amax(-1) / largest).to(torch.bfloat16)
    scaled = blocks / scale.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    scaled = scaled.round() if dtype == torch.int8 else scaled
    return scaled.clamp(-largest, largest).flatten(-2)[..., :width].to(dtype).contiguous(), scale


def _restore(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    width = x.shape[-1]
    blocks = F.pad(x.float(), (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK)) * scale.float()[..., None]
    return blocks.flatten(-2)[..., :width].to(dtype).contiguous()
