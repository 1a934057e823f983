"""What the sequences of a batch remember in a kin model: one memory a layer, and how far each row has read.

A state is a value, as in every architecture here: running a model on it never changes it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megalodon.models.kin.mixers import Memory, mixer_class

if TYPE_CHECKING:
    from megalodon.models.kin.config import KinConfig

FORMAT = "megalodon-kin-state-1"
"""What a saved state's metadata says under `format`."""

_SIZES = ("num_layers", "model_dim", "num_heads", "num_key_value_heads", "head_dim", "rope_base")


def dimensions_of(config: KinConfig) -> dict[str, Any]:
    """The sizes that a state and its model must share."""
    layers = [config.mixer_of(layer) for layer in range(config.num_layers)]
    mixers = [{"name": name, **parameters.model_dump()} for name, parameters in layers]
    return {**{name: getattr(config, name) for name in _SIZES}, "mixers": mixers}


def check_dimensions(mine: Mapping[str, Any], models: Mapping[str, Any]) -> None:
    """Raise ValueError, naming every field that differs, unless a state of `mine` fits a model of `models`."""
    differing = [
        f"{name} {mine.get(name)} (the model has {models[name]})" for name in models if mine.get(name) != models[name]
    ]
    if differing:
        raise ValueError(f"past_key_values is the state of another model: {', '.join(differing)}")


class KinState:
    """The memory of a batch of sequences.

    Attributes:
        layers: one `Memory` a layer; None where the mixer has none.
        position: int64 [B], on the CPU; tokens of its current document that each row has read.
        dimensions: the sizes of the model it belongs to.
    """

    is_compileable = False

    def __init__(self, layers: Sequence[Memory | None], position: Tensor, dimensions: Mapping[str, Any]) -> None:
        self.layers, self.position, self.dimensions = tuple(layers), position, dict(dimensions)

    # --- size and place -------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.position)

    @property
    def device(self) -> torch.device:
        """Where the tensors are; `position` stays on the CPU."""
        for layer in self.layers:
            for tensor in {} if layer is None else layer.tensors().values():
                return tensor.device
        return self.position.device

    @property
    def nbytes(self) -> int:
        """Bytes of all that is remembered."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def __len__(self) -> int:
        return self.batch_size

    def __repr__(self) -> str:
        return f"KinState(batch_size={self.batch_size}, position={self.position.tolist()}, nbytes={self.nbytes})"

    # --- values made of it ----------------------------------------------------------------------------------------

    def _made(self, function: Callable[[Tensor], Tensor], position: Tensor) -> KinState:
        return KinState([None if x is None else x.map(function) for x in self.layers], position, self.dimensions)

    def map(self, function: Callable[[Tensor], Tensor]) -> KinState:
        """A state with copies of what `function` makes of each tensor; `function` keeps the batch as it is."""
        return self._made(lambda x: function(x).clone(), self.position.clone())

    def clone(self) -> KinState:
        """A copy that shares nothing."""
        return self.map(lambda x: x)

    def detach(self) -> KinState:
        """The same memory without gradients: where truncated back-propagation cuts."""
        return self._made(lambda x: x.detach(), self.position)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> KinState:
        """A copy on `device`; tensors of less than float32 become `dtype`, sums keep their precision."""

        def move(x: Tensor) -> Tensor:
            narrow = x.is_floating_point() and (x.element_size() < 4 or (dtype is not None and dtype.itemsize >= 4))
            return x.to(device=device, dtype=dtype if narrow and dtype is not None else x.dtype)

        return self.map(move)

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> KinState:
        """The state of some rows, in the order given; an int keeps a batch of one; a bool mask selects."""
        index = torch.arange(self.batch_size)[torch.as_tensor(rows) if not isinstance(rows, slice) else rows]
        index = index.reshape(-1)
        return self._made(lambda x: x.index_select(0, index.to(x.device)), self.position[index])

    def repeat(self, times: int) -> KinState:
        """Each row `times` times, neighbours together, as beams and several samples of one prompt need."""
        return self[torch.arange(self.batch_size).repeat_interleave(times)]

    def reset(self, rows: Tensor) -> KinState:
        """A state in which the rows of a bool mask [B] start afresh and the others go on."""
        rows = torch.as_tensor(rows, dtype=torch.bool).cpu()
        if rows.shape != (self.batch_size,):
            raise ValueError(f"rows has shape {tuple(rows.shape)}: it must be {(self.batch_size,)}")
        if not rows.any():
            return self

        def clear(x: Tensor) -> Tensor:
            return x.masked_fill(rows.to(x.device).view(-1, *[1] * (x.ndim - 1)), 0)

        return self._made(clear, self.position.masked_fill(rows, 0))

    @staticmethod
    def concatenate(states: Sequence[KinState]) -> KinState:
        """One batch of the rows of several, in order.

        Raises:
            ValueError: there is none, or they belong to different models.
        """
        if not states:
            raise ValueError("states is empty: there is nothing to concatenate")
        for state in states[1:]:
            check_dimensions(state.dimensions, states[0].dimensions)
        columns = zip(*(state.layers for state in states), strict=True)
        layers = [None if column[0] is None else Memory.concatenate(column) for column in columns]
        return KinState(layers, torch.cat([state.position for state in states]), states[0].dimensions)

    # --- to and from disk -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by name."""
        tensors = {"position": self.position}
        for i, layer in enumerate(self.layers):
            if layer is not None:
                tensors |= layer.tensors(f"layers.{i}.")
        return tensors

    @staticmethod
    def from_state_dict(tensors: Mapping[str, Tensor], config: KinConfig) -> KinState:
        """The state of `state_dict`, for a model of this config.

        Raises:
            ValueError: a tensor is missing or has another model's shape; the message names it.
        """
        if "position" not in tensors:
            raise ValueError("the state lacks position: it is damaged or of another model")
        layers = [form and form.with_tensors(tensors, f"layers.{i}.") for i, form in enumerate(empty_memories(config))]
        return KinState(layers, tensors["position"].cpu(), dimensions_of(config))

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write one safetensors file, under a temporary name and then renamed; `metadata` is kept beside the sizes."""
        path = Path(path)
        header = {**(metadata or {}), "format": FORMAT, "dimensions": json.dumps(self.dimensions)}
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.state_dict().items()}
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            save_file(tensors, temporary, header)
            with Path(temporary).open("rb") as file:
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    @staticmethod
    def load(path: str | os.PathLike[str], config: KinConfig) -> KinState:
        """Read a saved state of a model of this config.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, is no state, or is the state of another model.
        """
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT:
                    raise ValueError(
                        f"{path} is no saved state: its format is {header.get('format')!r}, not {FORMAT!r}"
                    )
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        check_dimensions(json.loads(header["dimensions"]), dimensions_of(config))
        return KinState.from_state_dict(tensors, config)

    # --- what Transformers' generation asks of a cache ------------------------------------------------------------

    @property
    def is_linear(self) -> list[bool]:
        """Which layers cannot tell how much they have read, as Transformers asks since 5.24: none."""
        return [False] * len(self.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read by the row that has read most."""
        return int(self.position.max()) if self.batch_size else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows by those at `beam_idx`, in place, as beam search needs."""
        self.__dict__.update(vars(self[beam_idx.cpu()]))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """`repeat` in place."""
        self.__dict__.update(vars(self.repeat(repeats)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, in place."""
        self.__dict__.update(vars(self[indices.cpu()]))


def empty_memories(config: KinConfig) -> list[Memory | None]:
    """The form of each layer's memory, of no rows and no storage."""
    found = []
    for layer in range(config.num_layers):
        name, parameters = config.mixer_of(layer)
        with torch.device("meta"):
            mixer = mixer_class(name)(config, layer, parameters)
            found.append(mixer.empty(0, torch.device("meta"), torch.float32))
    return found
