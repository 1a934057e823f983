"""A model folder of the teacher's blocks with new mixers in them, written a block at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megalodon.convert.teachers import Teacher
from megalodon.data import Tokenizer
from megalodon.files import disk_errors, save_json, save_tensors
from megalodon.linearize.recipe import Recipe
from megalodon.linearize.transfer import started
from megalodon.models.kin import KinConfig


def assemble(
    folder: Path,
    recipe: Recipe,
    config: KinConfig,
    teacher: Teacher,
    tokenizer: Tokenizer,
    trained: Mapping[str, Tensor],
    replaced: list[int],
    seed: int,
) -> None:
    """Fill an empty folder with the model. `trained`: what moved in the stages before, by `LAYER.NAME` of mixers."""
    cpu, files, size, dtype = torch.device("cpu"), {}, 0, teacher.kept_dtype
    count = config.num_layers + 1

    def write(number: int, tensors: Mapping[str, Tensor]) -> None:
        nonlocal size
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        save_tensors(folder / name, tensors, {"format": "pt"})
        files.update(dict.fromkeys(tensors, name))
        size += sum(x.numel() * x.element_size() for x in tensors.values())

    for layer in range(config.num_layers):
        block = teacher.block(layer, cpu, dtype)
        tensors = dict(block.state_dict())
        if layer in replaced:
            tensors = {name: x for name, x in tensors.items() if not name.startswith("mixer.")}
            mixer = started(recipe, config, layer, block, seed)
            own = dict(mixer.state_dict())
            own |= {name.removeprefix(f"{layer}."): x for name, x in trained.items() if name.startswith(f"{layer}.")}
            tensors |= {f"mixer.{name}": x.to(dtype) for name, x in own.items()}
        write(layer + 1, {f"model.layers.{layer}.{name}": x for name, x in tensors.items()})
    write(count, {name: x.to(dtype) for name, x in teacher.other_tensors().items()})
    save_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": files})
    with disk_errors(folder):
        config.architectures = ["KinForCausalLM"]
        config.dtype = str(dtype).removeprefix("torch.")
        config.save_pretrained(folder)
        tokenizer.save(folder)
    generation = teacher.folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
