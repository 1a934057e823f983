"""A model and its tokenizer from a folder, checked: every weight there, the vocabulary large enough, a usable dtype."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging

from megalodon.choices import RunDtype
from megalodon.data import Tokenizer, check_vocabulary, load_tokenizer, same_tokens
from megalodon.models import CausalLM, architecture, build_model, load_config
from megalodon.models.layers.int8 import quantize
from megalodon.parallel.sharded import read_weights, sharded_checkpoint, weight_shapes


def torch_dtype(name: str | None) -> torch.dtype | None:
    """PyTorch's dtype of a `RunDtype` or `DtypeName`.

    Raises:
        ValueError: for any other name.
    """
    if name is None:
        return None
    if name not in list(RunDtype):
        raise ValueError(f"dtype is {name!r}; it must be {', '.join(RunDtype)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def choose_device(name: str | None = None) -> torch.device:
    """The device of this name, or the first GPU, or the CPU.

    Raises:
        ValueError: for a name that PyTorch does not know, or a device that this machine does not have.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without Transformers' progress bars and reports."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def model_folder(folder: Path) -> Path:
    """The folder of config, weights and tokenizer: `folder`, or `model` in it if it is a training run or checkpoint.

    Raises:
        FileNotFoundError: if there is neither.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder {folder}: give one that training, convert or save_pretrained wrote")
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    raise FileNotFoundError(f"{folder} holds no config.json: it is not a model folder")


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder holds a tokenizer."""
    return any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))


def load_model(folder: Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> CausalLM:
    """A model in evaluation mode.

    Args:
        folder: as for `model_folder`; also a checkpoint of a run on a mesh.
        device: None for the first GPU, or the CPU.
        dtype: None for that of the weights; `torch.int8` rounds the weights of linear layers to int8, for a CPU, and
            keeps activations in the dtype that the weights have.

    Raises:
        FileNotFoundError: if the folder or its files are missing.
        ValueError: if weights are damaged, missing or of other shapes, the dtype is float16, or int8 is not possible
            for the device or the architecture.
    """
    if dtype == torch.int8:
        return _load_int8(folder, device)
    folder = model_folder(folder)
    where = choose_device(device) if device is None or isinstance(device, str) else device
    if (checkpoint := sharded_checkpoint(folder.resolve())) is not None:
        return _load_sharded(folder, checkpoint, dtype).eval().to(where)
    with quiet_transformers():
        try:
            model_class = architecture(load_config(folder).model_type).causal_lm
            loaded: Any = model_class.from_pretrained(
                folder,
                dtype=dtype or "auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, in one line
                local_files_only=True,
            )
        except SafetensorError as error:
            raise ValueError(f"the weights in {folder} are damaged: {error}") from None
        except StrictDataclassError as error:  # Transformers' wrapping of what is wrong
            raise ValueError(f"{folder / 'config.json'} is not possible: {error.__cause__ or error}") from None
    model: CausalLM
    model, report = loaded
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report[kind]:
            first = min(key if isinstance(key, str) else key[0] for key in report[kind])
            raise ValueError(
                f"the weights in {folder} do not fit its config: {kind.replace('_', ' ')}, such as {first}"
            )
    if model.dtype == torch.float16:
        raise ValueError(f"{folder} holds float16 weights; choose dtype bfloat16 or float32")
    return model.eval().to(where)


def _load_sharded(folder: Path, checkpoint: Path, dtype: torch.dtype | None) -> CausalLM:
    """The model of a checkpoint of a run on a mesh, whose weights lie beside its folder."""
    weights = read_weights(checkpoint, list(weight_shapes(checkpoint)))
    model = build_model(load_config(folder))
    missing, unexpected = model.load_state_dict(weights, strict=False)
    wrong = sorted((set(missing) - set(model.all_tied_weights_keys)) | set(unexpected))
    if wrong:
        raise ValueError(f"the weights in {checkpoint} do not fit its config: {wrong[0]} is only in one of them")
    # Transformers wraps nn.Module's `to`, and mypy sees the wrapper's signature alone.
    model.to(dtype=dtype or next(iter(weights.values())).dtype)  # type: ignore[call-arg]
    return model


def _load_int8(folder: Path, device: torch.device | str | None) -> CausalLM:
    where = choose_device("cpu" if device is None else str(device))
    if where.type != "cpu":
        raise ValueError(f"dtype int8 is for decoding on a CPU: device {where} runs bfloat16 and float32")
    model = load_model(folder, where)
    if not model.has_int8:
        raise ValueError(f"dtype int8 is not made for {model.config.model_type} models: use float32 or bfloat16")
    quantize(model)
    return model


def load_tokenizer_for(model: CausalLM, folder: Path, name: str | None = None) -> Tokenizer:
    """The tokenizer of this name, or the one in the model's folder.

    Raises:
        FileNotFoundError: if the folder holds none and no name is given.
        ValueError: if it has more ids than the model, or other tokens than the folder's own.
    """
    folder = model_folder(folder)
    if name is None and not has_tokenizer(folder):
        raise FileNotFoundError(f"{folder} holds no tokenizer: name one with --tokenizer (bytes, a file or a folder)")
    tokenizer = load_tokenizer(name or folder)
    own = load_tokenizer(folder) if name is not None and has_tokenizer(folder) else tokenizer
    if (told := same_tokens(tokenizer, own)) is not None:
        raise ValueError(f"tokenizer {name!r} is another than the one in {folder}: {told}. Leave it out")
    check_vocabulary(tokenizer, model.config.vocab_size)
    return tokenizer
