"""A model's parameters one module at a time, new or from a folder: for ranks that never hold the whole model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megalodon.models import CausalLM, Config, build_model

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def empty_model(config: Config) -> CausalLM:
    """A model whose parameters have shapes and no values."""
    with torch.device("meta"):
        return build_model(config)


def initial_parameters(config: Config) -> Iterator[tuple[str, Tensor]]:
    """The parameters that `build_model(config)` would draw from the global generator here, to the bit.

    Its constructor draws twice: PyTorch's modules when each is made, and the model's own initialisation when all are.
    What is given (whole, on the CPU) lives until the next is asked for.
    """
    model = empty_model(config)
    parts: list[tuple[str, nn.Module, CausalLM]] = [("model", model.model, model.model)]
    if not config.share_emb:
        parts.append(("lm_head", model.lm_head, model))
    for root, part, owner in parts:
        modules = [(f"{root}.{name}" if name else root, module) for name, module in part.named_modules()]
        for _, module in modules:
            if isinstance(module, nn.Linear | nn.Embedding):
                module.to_empty(device="cpu", recurse=False).reset_parameters()
                module.to_empty(device="meta", recurse=False)
        for name, module in modules:
            own = [key for key, _ in module.named_parameters(recurse=False)]
            if not own:
                continue
            module.to_empty(device="cpu", recurse=False)
            owner._init_weights(module)
            for key in own:
                yield f"{name}.{key}", getattr(module, key).detach()
            module.to_empty(device="meta", recurse=False)


def stored_parameters(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The parameters in a model folder, whole, float32 on the CPU, one at a time.

    Raises:
        FileNotFoundError: the folder holds no safetensors. ValueError: they are damaged.
    """
    files = [SINGLE]
    if (folder / INDEX).is_file():
        files = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    for file in files:
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} holds no {file}")
        try:
            with safe_open(folder / file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                    yield name, tensors.get_tensor(name).float()
        except SafetensorError as error:
            raise ValueError(f"the weights in {folder / file} are damaged: {error}") from None
