"""What the sequences of a batch remember in a kin model: one memory a layer, and how far each row has read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers import Memory, mixer_class
from megalodon.models.state import Dimensions, State


@dataclass(frozen=True)
class KinDimensions(Dimensions):
    """The sizes that a state and its model must share; `mixers` holds each layer's name and all its parameters."""

    model_dim: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_base: float | None
    mixers: list[dict[str, Any]]

    @classmethod
    def of(cls, config: KinConfig) -> Self:
        sizes = {name: getattr(config, name) for name in cls.__dataclass_fields__ if name != "mixers"}
        layers = map(config.mixer_of, range(config.num_layers))
        return cls(**sizes, mixers=[{"name": name, **parameters.model_dump()} for name, parameters in layers])

    def memories(self, dtype: torch.dtype = torch.float32) -> list[Memory | None]:
        """The form of each layer's memory for activations of this dtype: of no rows and no storage."""
        two_way = not all(mixer_class(layer["name"]).causal_mode for layer in self.mixers)
        return _memories(repr(self), dtype, lambda: KinConfig(**vars(self), two_way=two_way))


class KinState(State):
    """The memory of a batch of sequences.

    Attributes:
        layers: one `Memory` a layer; None where the mixer has none.
        final: None: the final norm remembers nothing.
        position: int64 [B], on the CPU; tokens of its current document that each row has read.
        dimensions: the sizes of the model it belongs to.
    """

    model_type = "megalodon-kin"
    dimensions_class = KinDimensions
    dimensions: KinDimensions

    @property
    def parts(self) -> tuple[str, ...]:
        """Those of its layers' memories, in order."""
        return tuple(dict.fromkeys(part for layer in self.layers if layer is not None for part in layer.PARTS))

    def _forget(self, part: str) -> KinState:
        layers = [None if layer is None else layer.forget(part) for layer in self.layers]
        return KinState(layers, self.final, self.position, self.dimensions)

    @classmethod
    def shapes(cls, sizes: KinDimensions) -> dict[str, tuple[int | None, ...]]:
        shapes: dict[str, tuple[int | None, ...]] = {"position": (None,)}
        for i, form in enumerate(sizes.memories()):
            shapes |= {} if form is None else form.shapes(f"layers.{i}.")
        return shapes

    @classmethod
    def places(cls, sizes: KinDimensions, name: str, position: int) -> int:
        """At most: attention keeps a place for every token, others fewer."""
        return position

    @classmethod
    def could_have(cls, sizes: KinDimensions, name: str, position: int, count: int) -> bool:
        return count <= position

    @classmethod
    def empty(cls, config: KinConfig, batch: int, device: torch.device, dtype: torch.dtype) -> Self:
        sizes = KinDimensions.of(config)

        def zeros(x: Tensor) -> Tensor:
            return torch.zeros(batch, *x.shape[1:], dtype=x.dtype, device=device)

        layers = [form if form is None else form.made_of(zeros) for form in sizes.memories(dtype)]
        return cls(layers, None, torch.zeros(batch, dtype=torch.int64), sizes)

    @classmethod
    def layer_from(cls, tensors: Mapping[str, Tensor], sizes: KinDimensions, layer: int) -> Memory | None:
        form = sizes.memories()[layer]
        return None if form is None else form.with_tensors(tensors)

    @classmethod
    def final_from(cls, tensors: Mapping[str, Tensor], sizes: Any) -> None:
        return None


_FORMS: dict[tuple[str, torch.dtype], list[Memory | None]] = {}


def _memories(key: str, dtype: torch.dtype, config_of: Any) -> list[Memory | None]:
    if (key, dtype) not in _FORMS:
        config, found = config_of(), []
        for layer in range(config.num_layers):
            name, parameters = config.mixer_of(layer)
            with torch.device("meta"):
                mixer = mixer_class(name)(config, layer, parameters)
                found.append(mixer.empty(0, torch.device("meta"), dtype))
        _FORMS[key, dtype] = found
    return _FORMS[key, dtype]
