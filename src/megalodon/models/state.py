"""All that a sequence remembers: the one memory of training, generation and saved contexts, for every architecture.

A state is a value. Running a model on it never changes it, so it can be used again (a fork). It holds one memory a
layer, that of the final norm, and how many tokens each row has read; what a memory is, the architecture says.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megalodon.models.storage import Storage, check_storage, compressed, restored
from megalodon.ops.backend import accumulator_dtype, full_precision
from megalodon.ops.complex import aligned

FORMAT = "megalodon-state-1"
"""What a saved state's metadata says under `format`."""


class Memory(Protocol):
    """What one part of a network remembers of a batch of sequences: a value, rows first.

    `concatenate` is called on the class of the first. Names of tensors are those of a saved state, after the layer's.
    """

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A memory with copies of what `function` makes of each tensor; `function` keeps or selects rows alike."""
        ...

    def detach(self) -> Self:
        """The same memory without its history."""
        ...

    def cast(self, dtype: torch.dtype) -> Self:
        """The memory with what follows the activations' dtype in `dtype`; statistics and sums keep their precision."""
        ...

    def reset(self, rows: Tensor) -> Self:
        """The memory in which the rows of a bool mask [B], where the tensors are, may begin afresh. What a row's
        position of 0 already says need not be cleared."""
        ...

    @staticmethod
    def concatenate(memories: Any) -> Any:
        """One batch of the rows of several, in order."""
        ...

    def fitted(self, position: Tensor, sizes: Any) -> Self:
        """The memory without room that no row uses. `position` int64 [B]: tokens that each row has read."""
        ...

    def tensors(self, position: Tensor, sizes: Any) -> dict[str, Tensor]:
        """What is kept on disk, real tensors by name. `position` int64 [B]: tokens that each row has read."""
        ...


@dataclass(frozen=True)
class Dimensions:
    """The sizes that a state and its model must share: one subclass an architecture, of fields of its config."""

    num_layers: int

    @classmethod
    def of(cls, config: Any) -> Self:
        """The sizes of a model."""
        plain = vars(config)  # a Transformers config's own look-up takes microseconds each, at every token
        return cls(*(plain[name] if name in plain else getattr(config, name) for name in cls.__dataclass_fields__))

    @property
    def alignment(self) -> int:
        """States are smallest after multiples of so many tokens: a chunk, where there are chunks."""
        chunk: int | None = getattr(self, "chunk_size", None)
        return chunk or 1

    def check(self, other: Dimensions) -> None:
        """Raise ValueError, naming every field that differs, unless a state of `self` fits a model of `other`."""
        if self == other:
            return
        if type(self) is not type(other):
            raise ValueError("past_key_values is the state of a model of another architecture")
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__)
        differing = [f"{name} {mine} (the model has {theirs})" for name, mine, theirs in pairs if mine != theirs]
        if differing:
            raise ValueError(f"past_key_values is the state of another model: {', '.join(differing)}")


class State:
    """The memory of a batch of sequences. An architecture's subclass says what `layers` and `final` are.

    Attributes:
        layers: one memory a layer; None where a layer has none.
        final: the final norm's memory; None where it has none.
        position: int64 [B], on the CPU; tokens of its current document that each row has read.
        dimensions: the sizes of the model it belongs to.
    """

    is_compileable = False
    model_type: ClassVar[str]
    cut_dimensions: ClassVar[Mapping[str, int]] = {}
    """Along which dimension of a tensor of `state_dict`, by the last part of its name, a mesh's tensor axis cuts it."""
    dimensions_class: ClassVar[type[Dimensions]] = Dimensions

    def __init__(self, layers: Sequence[Any], final: Any, position: Tensor, dimensions: Any) -> None:
        self.layers, self.final, self.position, self.dimensions = tuple(layers), final, position, dimensions

    # --- what an architecture says ---------------------------------------------------------------------------------

    @classmethod
    def shapes(cls, sizes: Any) -> dict[str, tuple[int | None, ...]]:
        """The shape of each tensor of `state_dict`; None stands for the batch, -1 for any length."""
        raise NotImplementedError

    @classmethod
    def places(cls, sizes: Any, name: str, position: int) -> int:
        """How long a tensor of `state_dict` of any length (-1 in `shapes`) is for one row of so many tokens."""
        return position % int(sizes.alignment)

    @classmethod
    def could_have(cls, sizes: Any, name: str, position: int, count: int) -> bool:
        """Whether a tensor of any length could be so long for one row of so many tokens."""
        return count == cls.places(sizes, name, position)

    @classmethod
    def is_possible(cls, name: str, tensor: Tensor) -> bool:
        """Whether a tensor of `state_dict` could be that of a state: finite, and no variance negative."""
        return bool(tensor.isfinite().all()) and not (name.endswith(".var") and bool((tensor < 0).any()))

    @classmethod
    def layer_from(cls, tensors: Mapping[str, Tensor], sizes: Any, layer: int) -> Any:
        """The memory of a layer, from what its `tensors` gave."""
        raise NotImplementedError

    @classmethod
    def final_from(cls, tensors: Mapping[str, Tensor], sizes: Any) -> Any:
        """The final norm's memory, from what its `tensors` gave; None where there is none."""
        raise NotImplementedError

    compressible: ClassVar[frozenset[str]] = frozenset({"keys", "values"})
    """Which tensors of `state_dict`, by the last part of their names, `storage` makes smaller."""
    wide: ClassVar[frozenset[str]] = frozenset()
    """Those of them that are float32 at least, whatever the activations' dtype."""

    @classmethod
    def tensor_dtype(cls, name: str, activations: torch.dtype, statistics: torch.dtype) -> torch.dtype:
        """The dtype of a tensor of `state_dict` for these dtypes of keys and values, and of statistics."""
        kind = name.rsplit(".", 1)[-1]
        if kind in ("position", "count"):
            return torch.int64
        if kind == "cema":
            return full_precision(activations)
        return activations if kind in ("keys", "values") else statistics

    @classmethod
    def layer_bytes(cls, sizes: Any, open_tokens: int = 0, activations: torch.dtype = torch.float32) -> int:
        """Bytes that one layer remembers of one row with so many tokens in what is open (its keys and values)."""
        bytes_ = 0
        for name, shape in cls.shapes(sizes).items():
            if name.startswith("layers.0."):
                numbers = math.prod(1 if size is None else open_tokens if size < 0 else size for size in shape)
                bytes_ += numbers * cls.tensor_dtype(name, activations, torch.float64).itemsize
        return bytes_

    @classmethod
    def row_bytes(cls, sizes: Any, open_tokens: int = 0, activations: torch.dtype = torch.float32) -> int:
        """Bytes of a state of one row, with so many tokens in what is open."""
        others = sum(
            math.prod(size or 1 for size in shape) * cls.tensor_dtype(name, activations, torch.float64).itemsize
            for name, shape in cls.shapes(sizes).items()
            if not name.startswith("layers.")
        )
        return sizes.num_layers * cls.layer_bytes(sizes, open_tokens, activations) + others

    @classmethod
    def nothing(cls, name: str) -> float:
        """What a tensor of `state_dict` is full of, of rows that have read nothing."""
        return 0.0

    @classmethod
    def empty(cls, config: Any, batch: int, device: torch.device, dtype: torch.dtype) -> Self:
        """The state of `batch` rows that have read nothing, made without running the network.

        Args:
            config: the model's. dtype: of keys and values.
        """
        sizes = cls.dimensions_class.of(config)
        statistics = accumulator_dtype(device)
        tensors = {}
        for name, shape in cls.shapes(sizes).items():
            where = "cpu" if name == "position" else device
            of = [batch if size is None else max(size, 0) for size in shape]
            kind = cls.tensor_dtype(name, dtype, statistics)
            tensors[name] = torch.full(of, cls.nothing(name), dtype=kind, device=where)
        return cls.from_state_dict(tensors, sizes)

    # --- size and place -------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.position)

    @property
    def device(self) -> torch.device:
        """Where the tensors are; `position` stays on the CPU."""
        places = (tensor.device for name, tensor in self.state_dict().items() if name != "position")
        return next(places, self.position.device)

    @property
    def bos_places(self) -> tuple[Tensor, Tensor] | None:
        """What the rows carry of segments (`megalodon.ops.Segments`); None where the architecture knows none."""
        return None

    @property
    def open_tokens(self) -> Tensor:
        """int64 [B]; tokens in each row's open chunk; zeros where the architecture has no chunks."""
        return self.position % self.dimensions.alignment

    @property
    def nbytes(self) -> int:
        """Bytes of all that is remembered."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())

    def __len__(self) -> int:
        return self.batch_size

    def __repr__(self) -> str:
        return f"{type(self).__name__}(batch_size={len(self)}, position={self.position.tolist()}, nbytes={self.nbytes})"

    # --- values made of it ----------------------------------------------------------------------------------------

    def _with(self, change: Callable[[Any], Any], position: Tensor) -> Self:
        *layers, final = (None if memory is None else change(memory) for memory in (*self.layers, self.final))
        return type(self)(layers, final, position, self.dimensions)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """A state with copies of what `function` makes of each tensor; `function` keeps the batch as it is."""
        return self._with(lambda memory: memory.map(function), self.position.clone())

    def clone(self) -> Self:
        """A copy that shares nothing."""
        return self.map(lambda x: x)

    def detach(self) -> Self:
        """The same memory without gradients: where truncated back-propagation cuts."""
        return self._with(lambda memory: memory.detach(), self.position)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """A copy on `device`. `dtype` is that of keys and values; statistics and h keep their precision."""
        moved = self.map(lambda x: x.to(device) if device is not None else x)
        return moved if dtype is None else moved._with(lambda memory: memory.cast(dtype), moved.position)

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Self:
        """The state of some rows, in the order given; an int keeps a batch of one; a bool mask selects."""
        index = torch.arange(self.batch_size)[torch.as_tensor(rows) if not isinstance(rows, slice) else rows]
        index = index.reshape(-1)
        position = self.position[index]
        selected = self.map(lambda x: x.index_select(0, index.to(x.device)))
        return selected._with(lambda memory: memory.fitted(position, self.dimensions), position)

    def repeat(self, times: int) -> Self:
        """Each row `times` times, neighbours together, as beams and several samples of one prompt need."""
        return self[torch.arange(self.batch_size).repeat_interleave(times)]

    def reset(self, rows: Tensor) -> Self:
        """A state in which the rows of a bool mask [B] start afresh and the others go on."""
        rows = torch.as_tensor(rows, dtype=torch.bool).cpu()
        if rows.shape != (self.batch_size,):
            raise ValueError(f"rows has shape {tuple(rows.shape)}: it must be {(self.batch_size,)}")
        if not rows.any():
            return self
        there = rows.to(self.device)
        return self._with(lambda memory: memory.reset(there), self.position.masked_fill(rows, 0))

    @property
    def parts(self) -> tuple[str, ...]:
        """What `forget` can take out of this state, by name; empty where an architecture's memory is one piece."""
        return ()

    def forget(self, part: str) -> Self:
        """The state in which one of its `parts` has read nothing, in every row, while the others go on.

        Raises:
            ValueError: there is no such part, or it cannot be told apart from the others here; the message says why.
        """
        if part not in self.parts:
            there = ", ".join(self.parts) or "none that can be forgotten alone"
            raise ValueError(f"part={part!r}: a {self.model_type} state has {there}")
        return self._forget(part)

    def _forget(self, part: str) -> Self:
        raise NotImplementedError

    def _begun_again(self) -> Self:
        """This state with every row at position 0: whatever is counted or placed by the position has read nothing.

        Raises:
            ValueError: a row is inside a chunk, whose keys and values are placed by the position too.
        """
        if self.open_tokens.any():
            raise ValueError(
                f"position={self.position.tolist()}: this part is forgotten where a chunk of "
                f"{self.dimensions.alignment} tokens is complete"
            )
        return type(self)(self.layers, self.final, torch.zeros_like(self.position), self.dimensions)

    @staticmethod
    def concatenate(states: Sequence[State]) -> Any:
        """One batch of the rows of several, in order.

        Raises:
            ValueError: there is none, or they belong to different models.
        """
        if not states:
            raise ValueError("states is empty: there is nothing to concatenate")
        first = states[0]
        for state in states[1:]:
            state.dimensions.check(first.dimensions)

        def join(memories: Sequence[Any]) -> Any:
            return None if memories[0] is None else type(memories[0]).concatenate(memories)

        layers = [join(column) for column in zip(*(state.layers for state in states), strict=True)]
        final = join([state.final for state in states])
        return type(first)(layers, final, torch.cat([state.position for state in states]), first.dimensions)

    # --- to and from disk -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by name; complex ones as (re, im) in the last dimension; only the filled part of what is open."""
        tensors = {"position": self.position}
        parts = [("final_norm.", self.final), *((f"layers.{i}.", layer) for i, layer in enumerate(self.layers))]
        for prefix, memory in parts:
            named = {} if memory is None else memory.tensors(self.position, self.dimensions)
            tensors |= {prefix + name: tensor for name, tensor in named.items()}
        return tensors

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor], config: Any) -> Self:
        """The state of `state_dict`, for a model of this config (or of these `Dimensions`).

        Raises:
            ValueError: a tensor is missing or has another model's shape; the message names it.
        """
        sizes = config if isinstance(config, Dimensions) else cls.dimensions_class.of(config)
        expected = cls.shapes(sizes)
        missing = sorted(expected.keys() - tensors.keys())
        if missing:
            raise ValueError(f"the state lacks {', '.join(missing[:3])}: it is damaged or of another model")
        batch = len(tensors["position"])
        for name, shape in expected.items():
            actual = tuple(tensors[name].shape)
            wanted = tuple(
                batch if s is None else actual[i] if s < 0 and i < len(actual) else s for i, s in enumerate(shape)
            )
            if actual != wanted:
                raise ValueError(f"the state's {name} has shape {actual}: a state of this model has {wanted}")

        def part(prefix: str) -> dict[str, Tensor]:
            own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
            return {name: aligned(x) if x.is_floating_point() else x for name, x in own.items()}

        layers = [cls.layer_from(part(f"layers.{i}."), sizes, i) for i in range(sizes.num_layers)]
        return cls(layers, cls.final_from(part("final_norm."), sizes), tensors["position"].cpu(), sizes)

    def save(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, str] | None = None,
        storage: Storage = "exact",
    ) -> None:
        """Write one safetensors file, under a temporary name and then renamed.

        Args:
            metadata: kept beside the sizes.
            storage: "int8" or "fp8" store keys, values and working memories in a quarter of the bytes of float32, and
                lose a little (`megalodon.models.storage`).

        Raises:
            ValueError: there is no such storage.
        """
        path, storage = Path(path), check_storage(storage)
        header = {
            **(metadata or {}),
            "format": FORMAT,
            "architecture": self.model_type,
            "dimensions": json.dumps(vars(self.dimensions)),
        }
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        if storage != "exact":
            dtypes = [x.dtype for name, x in tensors.items() if name.endswith((".keys", ".values"))]
            header["restored_dtype"] = str((dtypes or [torch.float32])[0]).removeprefix("torch.")
            tensors = compressed(tensors, storage, self.compressible)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            save_file(tensors, temporary, header)
            with Path(temporary).open("rb") as file:
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], config: Any = None) -> Self:
        """Read a saved state; with `config`, refuse another model's.

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
        kind = header.get("architecture", "megalodon")  # files from before there were several
        if kind != cls.model_type:
            raise ValueError(f"{path} is the state of a model of type {kind!r}, not {cls.model_type!r}")
        sizes = cls.dimensions_class(**json.loads(header["dimensions"]))
        if config is not None:
            sizes.check(cls.dimensions_class.of(config))
        if (dtype := header.get("restored_dtype")) is not None:
            if dtype not in ("float32", "float64", "bfloat16"):
                raise ValueError(f"{path} is damaged: its restored_dtype is {dtype!r}")
            tensors = restored(tensors, getattr(torch, dtype), cls.wide)
        return cls.from_state_dict(tensors, sizes)

    # --- what Transformers' generation asks of a cache ------------------------------------------------------------

    @property
    def is_linear(self) -> list[bool]:
        """Which layers cannot tell how much they have read, as Transformers asks since 5.24: none."""
        return [False] * len(self.layers)

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take tokens away, as assisted decoding asks: what was averaged cannot be told apart."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read by the row that has read most."""
        return int(self.position.max()) if self.batch_size else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace the rows by those at `beam_idx`, in place, as beam search needs."""
        self.__dict__.update(vars(self[beam_idx.cpu()]))

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` tokens, in place, as Transformers asks of a cache; negative: drop so many.

        A state does not hold the tokens that it has read: it can be left as it is, or forget all.

        Raises:
            ValueError: for any other length; the message says what to do instead.
        """
        longest = self.get_seq_length()
        kept = longest + max_length if max_length < 0 else max_length
        if kept >= longest:
            return
        if kept > 0 or max_length < -longest:
            raise ValueError(
                f"crop({max_length}): a state that has read {longest} tokens cannot unread some of them; keep the "
                "state from before them (states are values, and stay as they are), or crop(0) to begin afresh"
            )
        self.__dict__.update(vars(self.reset(torch.ones(self.batch_size, dtype=torch.bool))))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """`repeat` in place."""
        self.__dict__.update(vars(self.repeat(repeats)))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, in place."""
        self.__dict__.update(vars(self[indices.cpu()]))
