"""Whole conversions, folder to folder: checked before anything is written, and written whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from megalodon.convert.checkpoint import check_divides, read_checkpoint, write_checkpoint
from megalodon.convert.parameters import AnyConfig
from megalodon.convert.pretrained import cast, read_pretrained, write_pretrained
from megalodon.data import Tokenizer, check_vocabulary
from megalodon.files import write_folder
from megalodon.models import Config, load_config
from megalodon.parallel.sharded import is_sharded, write_whole_model


def reference_to_pretrained(
    source: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    tokenizer: Tokenizer | None = None,
    architecture: str | None = None,
) -> AnyConfig:
    """Write our model folder `target` for the reference's checkpoint folder `source`; return its config.

    Args:
        architecture: whose checkpoint it must be; None: what its config tells.
        dtype: of the weights written; None keeps those of the checkpoint. A float16 checkpoint needs one.
        tokenizer: saved beside the weights, so that the folder is all that generation needs.

    Raises:
        FileNotFoundError, ValueError: as `read_checkpoint`; and for a target that exists, float16, or a tokenizer with
            more ids than the model.
    """
    _require_new(target)
    config, state_dict = read_checkpoint(source, architecture)
    state_dict = _in_dtype(state_dict, dtype)
    if state_dict["model.embed_tokens.weight"].dtype == torch.float16:
        raise ValueError("dtype: the checkpoint is float16, which no model here runs in; choose float32 or bfloat16")
    if tokenizer is not None:
        check_vocabulary(tokenizer, config.vocab_size)
        config.eos_token_id = tokenizer.eos_token_id

    def fill(folder: Path) -> None:
        write_pretrained(folder, config, state_dict)
        if tokenizer is not None:
            tokenizer.save(folder)

    target.parent.mkdir(parents=True, exist_ok=True)
    write_folder(target, fill)
    return config


def pretrained_to_reference(
    source: Path, target: Path, model_parallel_size: int = 1, dtype: torch.dtype | None = None
) -> AnyConfig:
    """Write the reference's checkpoint folder `target` for our model folder `source`; return the config.

    Args:
        model_parallel_size: number of ranks to cut the model for.
        dtype: of the weights written; None keeps them. A model of several dtypes needs one.

    Raises:
        FileNotFoundError, ValueError: as `read_pretrained` and `write_checkpoint`; and for a target that exists.
    """
    _require_new(target)
    config, state_dict = read_pretrained(source)
    check_divides(config, model_parallel_size)
    state_dict = _in_dtype(state_dict, dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_folder(target, lambda folder: write_checkpoint(folder, config, state_dict, model_parallel_size))
    return config


def checkpoint_to_pretrained(source: Path, target: Path, dtype: torch.dtype | None = None) -> Config:
    """Write our model folder `target` for a sharded checkpoint of a run on a mesh, tokenizer included.

    Args:
        source: a folder `step-...` of the run's checkpoints.
        dtype: of the weights written; None keeps them.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if it was not written by a run on a mesh, or for a target that exists.
    """
    _require_new(target)
    if not source.is_dir():
        raise FileNotFoundError(f"there is no checkpoint {source}")
    if not is_sharded(source):
        raise ValueError(f"{source} is no sharded checkpoint: that of a run on one process has its model in model/")
    config = load_config(source / "model")

    def fill(folder: Path) -> None:
        for path in (source / "model").iterdir():
            shutil.copy(path, folder)
        write_whole_model(source, folder, config, dtype)

    target.parent.mkdir(parents=True, exist_ok=True)
    write_folder(target, fill)
    return config


def _in_dtype(state_dict: dict[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return state_dict if dtype is None else cast(state_dict, dtype)


def _require_new(target: Path) -> None:
    if target.exists():
        raise FileExistsError(f"{target} exists already: give the name of a new folder")
