"""Our own model folders, tensor by tensor: what `save_pretrained` writes, with every dtype as it is.

Loading a model may change dtypes (some parameters are always computed in float32), so conversion works on the files.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from megalodon.convert.parameters import AnyConfig
from megalodon.convert.reference import FIELDS
from megalodon.models import architecture

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def write_pretrained(folder: Path, config: AnyConfig, state_dict: Mapping[str, Tensor]) -> None:
    """Write what `from_pretrained` loads, config.json and safetensors, sharded when large, into an existing folder."""
    config = copy.deepcopy(config)
    config.architectures = [architecture(config.model_type).causal_lm.__name__]
    config.dtype = state_dict["model.embed_tokens.weight"].dtype
    config.save_pretrained(folder)
    save_torch_state_dict({name: value.contiguous() for name, value in state_dict.items()}, folder)


def read_pretrained(folder: Path) -> tuple[AnyConfig, dict[str, Tensor]]:
    """The config and the tensors of a model folder, on the CPU.

    Raises:
        FileNotFoundError: if the folder, its config or a weights file is missing.
        ValueError: if it holds another kind of model, or a weights file is damaged.
    """
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: give a folder that save_pretrained wrote")
    if (model_type := json.loads((folder / "config.json").read_text()).get("model_type")) not in FIELDS:
        raise ValueError(f"{folder} holds a model of type {model_type!r}; it must be {' or '.join(map(repr, FIELDS))}")
    config = FIELDS[model_type].config.from_pretrained(folder)
    state_dict: dict[str, Tensor] = {}
    for name in _weights_files(folder):
        try:
            state_dict |= load_file(folder / name)
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged: {error}") from None
    return config, state_dict


def cast(state_dict: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same tensors, floating ones in `dtype`."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in state_dict.items()}


def _weights_files(folder: Path) -> list[str]:
    if (folder / INDEX).is_file():
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    else:
        names = [WEIGHTS]
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: the model's weights cannot be read")
    return names
