"""The weights in a sharded checkpoint (`torch.distributed.checkpoint`), read without a mesh and without all at once."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, TensorStorageMetadata

from megalodon.files import save_tensors
from megalodon.models import Config, architecture

SHARDS = "shards"
"""The folder of a checkpoint in which `torch.distributed.checkpoint` keeps its files."""

MODEL = "model/"
"""How the names of the model's parameters begin in it."""

BYTES_AT_ONCE = 1 << 30


def is_sharded(checkpoint: Path) -> bool:
    """Whether a checkpoint folder was written by a run on a mesh."""
    return (checkpoint / SHARDS).is_dir()


def sharded_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of a run on a mesh that a folder is, or whose `model` folder it is; None where it is neither."""
    if is_sharded(folder):
        return folder
    return folder.parent if folder.name == "model" and is_sharded(folder.parent) else None


def weight_shapes(checkpoint: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every parameter, by its name in the model.

    Raises:
        ValueError: the folder holds no whole sharded checkpoint.
    """
    try:
        metadata = FileSystemReader(checkpoint / SHARDS).read_metadata().state_dict_metadata
    except (OSError, EOFError) as error:
        raise ValueError(f"{checkpoint} holds no whole sharded checkpoint: {error}") from None
    return {
        name.removeprefix(MODEL): (entry.size, entry.properties.dtype)
        for name, entry in metadata.items()
        if name.startswith(MODEL) and isinstance(entry, TensorStorageMetadata)
    }


def read_weights(checkpoint: Path, names: list[str]) -> dict[str, Tensor]:
    """Some of the parameters, whole, on the CPU."""
    shapes = weight_shapes(checkpoint)
    tensors = {MODEL + name: torch.empty(*shapes[name][0], dtype=shapes[name][1]) for name in names}
    with warnings.catch_warnings():  # it says that it loads in a single process, which is what it is told to
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        distributed_checkpoint.load(tensors, storage_reader=FileSystemReader(checkpoint / SHARDS), no_dist=True)
    return {name.removeprefix(MODEL): tensor for name, tensor in tensors.items()}


def write_whole_model(checkpoint: Path, folder: Path, config: Config, dtype: torch.dtype | None = None) -> None:
    """Write config.json and safetensors that `from_pretrained` loads into an existing folder.

    No more than `BYTES_AT_ONCE` of weights, or one parameter, are in memory at a time.

    Args:
        dtype: of the weights written; None keeps them.
    """
    shapes = weight_shapes(checkpoint)
    config = copy.deepcopy(config)
    config.architectures = [architecture(config.model_type).causal_lm.__name__]
    config.dtype = dtype or shapes["model.embed_tokens.weight"][1]
    config.save_pretrained(folder)
    files = list(_files(shapes))
    index: dict[str, str] = {}
    total = 0
    for number, names in enumerate(files, 1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = read_weights(checkpoint, names)
        if dtype is not None:
            tensors = {key: value.to(dtype) for key, value in tensors.items()}
        save_tensors(folder / name, tensors, {"format": "pt"})
        index |= dict.fromkeys(names, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
        (folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


def _files(shapes: dict[str, tuple[torch.Size, torch.dtype]]) -> Iterator[list[str]]:
    """The parameters of each file, in order."""
    names: list[str] = []
    size = 0
    for name, (shape, dtype) in shapes.items():
        needed = shape.numel() * dtype.itemsize
        if names and size + needed > BYTES_AT_ONCE:
            yield names
            names, size = [], 0
        names.append(name)
        size += needed
    yield names
