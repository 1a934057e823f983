"""A mixer as torch.export sees it: one opaque operation, whatever the length of the text.

Mixers cut a text into blocks, chunks or windows, which an exported program of any length cannot hold. It holds
`megalodon::exported_mixer` instead, which is given the mixer's tensors and its config; to run it, import this package.
"""

# No `from __future__ import annotations` here: torch reads an operator's schema from annotations that are types.
import json
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from megalodon.models.kin.config import KinConfig
from megalodon.models.kin.mixers import mixer_class
from megalodon.ops.exported import WHOLE_TEXTS
from megalodon.ops.layout import PlainLayout


@lru_cache(maxsize=256)
def _form(config: str, layer: int) -> nn.Module:
    """The layer's mixer, without values."""
    fields = KinConfig(**json.loads(config))
    name, parameters = fields.mixer_of(layer)
    with torch.device("meta"):
        return mixer_class(name)(fields, layer, parameters).eval()


def _tensors(mixer: nn.Module) -> dict[str, Tensor]:
    return {**dict(mixer.named_parameters()), **dict(mixer.named_buffers())}


@torch.library.custom_op("megalodon::exported_mixer", mutates_args=())
def exported_mixer(x: Tensor, tensors: list[Tensor], config: str, layer: int) -> Tensor:
    form = _form(config, layer)
    values = dict(zip(_tensors(form), tensors, strict=True))
    y, _ = functional_call(form, values, (x, None, PlainLayout(x.shape[0], x.shape[1], x.device)))
    return y.clone() if y is x else y.contiguous()


@exported_mixer.register_fake
def _(x, tensors, config, layer):
    return torch.empty_like(x)


class Opaque:
    """A layer's mixer as one operation.

    Args:
        mixer: as the config makes it.
    """

    def __init__(self, mixer: nn.Module, config: KinConfig, layer: int) -> None:
        self._kind, self._names, self._layer = type(mixer), list(_tensors(mixer)), layer
        self._config = json.dumps(config.identity(), sort_keys=True)

    def __call__(self, mixer: nn.Module, x: Tensor, memory: Any, layout: Any, use_cache: bool) -> Tensor:
        """What the mixer makes of x [B, L, D].

        Raises:
            NotImplementedError: it is more than whole texts without a state, or the mixer is not what it was.
        """
        if memory is not None or use_cache or not isinstance(layout, PlainLayout):
            raise NotImplementedError(WHOLE_TEXTS)
        tensors = _tensors(mixer)
        if not isinstance(mixer, self._kind) or list(tensors) != self._names or mixer.training:
            raise NotImplementedError(
                f"torch.export: layer {self._layer}'s mixer is not as it was made, or is in training: "
                "merge adapters and call eval() first"
            )
        return exported_mixer(x, list(tensors.values()), self._config, self._layer)
