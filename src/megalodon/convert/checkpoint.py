"""Checkpoint folders of the authors' implementations, of any model-parallel size: read, merge, cut and write.

A folder holds `config.json`, `consolidate_config.json` and one weights file per model-parallel rank (SPEC: The
reference's checkpoints). The weights files are pickles; they are read with PyTorch's restricted loader only. The
authors' Gecko writes no folders; its configs and state dicts stand here in the folder of their Megalodon.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalodon.convert.parameters import AnyConfig, Stored, buffers, parameters
from megalodon.convert.reference import (
    TIED_HEAD,
    architecture_of,
    config_from_reference,
    config_to_reference,
    inner_config,
    state_dict_from_reference,
    state_dict_to_reference,
    without_wrapper,
)
from megalodon.models.megalodon.config import MegalodonConfig

CONFIG = "config.json"
CONSOLIDATE_CONFIG = "consolidate_config.json"
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DIVIDED = ("num_heads", "model_dim", "norm_num_groups", "ffn_hidden_dim")


def weights_file(rank: int, model_parallel_size: int) -> str:
    """The name of a rank's weights file."""
    return "consolidated.pth" if model_parallel_size == 1 else f"consolidated.{rank:02d}.pth"


def read_checkpoint(folder: Path, architecture: str | None = None) -> tuple[AnyConfig, dict[str, Tensor]]:
    """Our config and complete state dict (on the CPU, dtypes as stored) of a reference checkpoint folder.

    Args:
        architecture: "megalodon" or "gecko"; a folder of the other is refused. None: what the config's fields tell.

    Raises:
        FileNotFoundError: for a missing folder, config or rank file, naming it.
        ValueError: for a damaged file, an unknown or missing parameter, shapes that contradict the config, or a config
            with fields that the architecture does not have.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give a checkpoint folder of the reference implementation")
    config = _read_json(folder / CONFIG)
    size = _read_json(folder / CONSOLIDATE_CONFIG).get("model_parallel_size")
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"{folder / CONSOLIDATE_CONFIG}: model_parallel_size is {size!r}; it must be 1 or more")
    paths = _weights_paths(folder, size)
    architecture = architecture_of(config) if architecture is None else architecture
    _check_config(config, architecture)
    ranks = [_read_weights(path) for path in paths]
    ours = _complete_config(config, ranks, architecture)
    return ours, _complete(state_dict_from_reference(merge_ranks(ranks, ours), ours), ours)


def write_checkpoint(
    folder: Path, config: AnyConfig, state_dict: Mapping[str, Tensor], model_parallel_size: int = 1
) -> None:
    """Write our model into an existing empty folder as the reference does.

    Raises:
        ValueError: for an incomplete state dict, tensors of several dtypes or of one that the reference does not know,
            or a model_parallel_size that does not divide the model.
    """
    check_divides(config, model_parallel_size)
    renamed = state_dict_to_reference(_complete(dict(state_dict), config), config)
    dtype, model = _only_dtype(renamed), config_to_reference(config)
    for rank in range(model_parallel_size):
        part = cut_rank(renamed, config, rank, model_parallel_size)
        torch.save(OrderedDict(part), folder / weights_file(rank, model_parallel_size))
    whole_config = {
        "tokenizer": {"path": None, "additional_vocab_size": 0, "data_tokenized": False},
        "model": model,
        "model_parallel_size": model_parallel_size,
        "chunk_parallel_size": 1,
    }
    consolidated = {"model_parallel_size": model_parallel_size, "dtype": DTYPE_NAMES[dtype]}
    for name, value in ((CONFIG, whole_config), (CONSOLIDATE_CONFIG, consolidated)):
        (folder / name).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def merge_ranks(ranks: list[dict[str, Tensor]], config: AnyConfig) -> dict[str, Tensor]:
    """One state dict, under the reference's names, of the state dicts of all model-parallel ranks in order.

    Raises:
        ValueError: if the ranks hold different names, differ in a tensor that each should hold whole, or hold shapes
            that the config does not give.
    """
    check_divides(config, len(ranks))
    expected = _shapes_and_splits(config)
    for rank, tensors in enumerate(ranks):
        if differing := sorted(set(tensors) ^ set(ranks[0])):
            raise ValueError(f"ranks 0 and {rank} of the checkpoint differ in whether they hold {differing[0]!r}")
    merged = {}
    for name in ranks[0]:
        if name not in expected:
            raise ValueError(f"the checkpoint holds {name!r}, which no model of its config has")
        shape, split = expected[name]
        parts = [tensors[name] for tensors in ranks]
        part_shape = _part_shape(shape, split, len(ranks))
        for rank, part in enumerate(parts):
            if tuple(part.shape) != part_shape:
                raise ValueError(
                    f"{name} has shape {list(part.shape)} on rank {rank}; the config gives it {list(part_shape)}"
                )
        if split is not None:
            merged[name] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=split)
        elif all(torch.equal(parts[0], part) for part in parts):
            merged[name] = parts[0]
        else:
            raise ValueError(f"{name} should be the same on every rank of the checkpoint, but it is not")
    return merged


def cut_rank(
    state_dict: Mapping[str, Tensor], config: AnyConfig, rank: int, model_parallel_size: int
) -> dict[str, Tensor]:
    """What model-parallel rank `rank` holds of a state dict under the reference's names: copies, not views."""
    expected = _shapes_and_splits(config)
    part = {}
    for name, value in state_dict.items():
        split = expected[name][1]
        mine = value if split is None else value.chunk(model_parallel_size, dim=split)[rank]
        part[name] = mine.detach().clone(memory_format=torch.contiguous_format)
    return part


def check_divides(config: AnyConfig, model_parallel_size: int) -> None:
    """Raises ValueError, naming the field, if the model cannot be cut into so many ranks."""
    if model_parallel_size < 1:
        raise ValueError(f"model_parallel_size is {model_parallel_size}; it must be 1 or more")
    for field in DIVIDED:
        value = getattr(config, field)
        if value % model_parallel_size:
            raise ValueError(f"model_parallel_size {model_parallel_size} does not divide {field}, {value}")


def _shapes_and_splits(config: AnyConfig) -> dict[str, tuple[tuple[int, ...], int | None]]:
    entries: list[Stored] = [*parameters(config), *buffers(config)]
    table = {entry.reference: (entry.shape, entry.split) for entry in entries}
    if config.share_emb:
        table[TIED_HEAD[0]] = table[TIED_HEAD[1]]
    return table


def _part_shape(shape: tuple[int, ...], split: int | None, ranks: int) -> tuple[int, ...]:
    return tuple(size // ranks if axis == split else size for axis, size in enumerate(shape))


def _check_config(config: Mapping[str, Any], architecture: str) -> None:
    """That it is one of this architecture, before any weights are read; an unset vocab_size is left to them."""
    inner = dict(inner_config(config))
    if inner.get("vocab_size", -1) == -1:
        inner["vocab_size"] = 1
    config_from_reference(inner, architecture)


def _complete_config(config: Mapping[str, Any], ranks: list[dict[str, Tensor]], architecture: str) -> AnyConfig:
    """The config, with what the reference leaves to the weights: an unset vocab_size, and the norms' prior count."""
    inner = dict(inner_config(config))
    if inner.get("vocab_size", -1) == -1 and "embed.weight" in ranks[0]:
        inner["vocab_size"] = ranks[0]["embed.weight"].shape[0]
    ours: AnyConfig = config_from_reference(inner, architecture)
    prior_count = ranks[0].get("output.final_norm.prior_count")
    if isinstance(ours, MegalodonConfig) and prior_count is not None and int(prior_count) > 0:
        ours.norm_prior_count = int(prior_count)
    return ours


def _complete(state_dict: dict[str, Tensor], config: AnyConfig) -> dict[str, Tensor]:
    missing = [entry for entry in parameters(config) if entry.ours not in state_dict]
    if missing:
        first = f"{missing[0].ours} (the reference's {missing[0].reference})"
        raise ValueError(f"the weights lack {len(missing)} parameters of their config, {first} among them")
    return state_dict


def _only_dtype(state_dict: Mapping[str, Tensor]) -> torch.dtype:
    dtypes = {value.dtype for value in state_dict.values() if value.is_floating_point()}
    if len(dtypes) != 1 or not dtypes <= set(DTYPE_NAMES):
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(f"the weights' dtypes are {names}; the reference stores one of float32, bfloat16, float16")
    return dtypes.pop()


def _weights_paths(folder: Path, size: int) -> list[Path]:
    paths = [folder / weights_file(rank, size) for rank in range(size)]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {CONSOLIDATE_CONFIG} says model_parallel_size {size}")
    return paths


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a consolidated checkpoint of the reference holds it")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def _read_weights(path: Path) -> dict[str, Tensor]:
    _check_archive(path)
    try:
        # mapped, not read: merging ranks then needs memory for one copy of the weights, not for two
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} holds more than tensors, or is damaged, and is not read: {reason}") from None
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is damaged or no PyTorch file: {str(error).splitlines()[0]}") from None
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path} must hold a state dict: names and tensors")
    return dict(without_wrapper(loaded))


def _check_archive(path: Path) -> None:
    """Raises ValueError if a part of the file (a ZIP archive unless it is very old) has not the checksum stored."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if (part := archive.testzip()) is not None:
            raise ValueError(f"{path} is damaged: the checksum of its part {part!r} is wrong")
