"""What a model of Transformers remembers of a batch, as a value: one cache a row, never changed.

Rows of its own caches share counters of what they have read. So each row has a cache for itself: rows begin documents
anew, go on, and are taken out of a batch alone. A class whose caches cannot be trusted has the tokens read so far in
their place, and reads them again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from megalodon.models.peers import caches
from megalodon.models.state import Dimensions, State


@dataclass(frozen=True)
class PeerDimensions(Dimensions):
    """What a state and its model must share."""

    kind: str
    fields: dict[str, Any] | None
    vocab_size: int


class PeerState(State):
    """The memory of a batch of sequences.

    Attributes:
        rows: a row's cache, or the tokens int64 [n] that it has read; None where it has read nothing.
        position: int64 [B], on the CPU; tokens of its current document that each row has read.
        dimensions: of the model it belongs to.
    """

    model_type = "transformers"
    dimensions_class = PeerDimensions
    dimensions: PeerDimensions

    def __init__(self, rows: Sequence[Any], position: Tensor, dimensions: PeerDimensions) -> None:
        super().__init__((), None, position, dimensions)
        self.rows = tuple(rows)

    def _changed(self, function: Callable[[Tensor], Tensor]) -> Self:
        return type(self)([caches.mapped(row, function) for row in self.rows], self.position, self.dimensions)

    @classmethod
    def empty(cls, config: Any, batch: int, device: torch.device, dtype: torch.dtype) -> Self:
        sizes = cls.dimensions_class.of(config)
        return cls([None] * batch, torch.zeros(batch, dtype=torch.int64), sizes)

    @property
    def device(self) -> torch.device:
        places = [tensor.device for row in self.rows for tensor in caches.tensors_of(row)]
        return places[0] if places else self.position.device

    @property
    def nbytes(self) -> int:
        return self.position.nbytes + sum(map(caches.bytes_of, self.rows))

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return self._changed(lambda x: function(x).clone())

    def detach(self) -> Self:
        return self._changed(lambda x: x.detach())

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """A copy on `device`; a cache keeps the dtypes that its class gave it."""
        return self.map(lambda x: x if device is None else x.to(device))

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Self:
        index = torch.arange(self.batch_size)[torch.as_tensor(rows) if not isinstance(rows, slice) else rows]
        chosen = [self.rows[i] for i in index.reshape(-1).tolist()]
        return type(self)(chosen, self.position[index.reshape(-1)], self.dimensions).clone()

    def reset(self, rows: Tensor) -> Self:
        rows = torch.as_tensor(rows, dtype=torch.bool).cpu()
        if rows.shape != (self.batch_size,):
            raise ValueError(f"rows has shape {tuple(rows.shape)}: it must be {(self.batch_size,)}")
        kept = [None if fresh else row for row, fresh in zip(self.rows, rows.tolist(), strict=True)]
        return type(self)(kept, self.position.masked_fill(rows, 0), self.dimensions)

    @staticmethod
    def concatenate(states: Sequence[State]) -> Any:
        if not states:
            raise ValueError("states is empty: there is nothing to concatenate")
        first = states[0]
        assert isinstance(first, PeerState)
        for state in states[1:]:
            state.dimensions.check(first.dimensions)
        rows = [row for state in states if isinstance(state, PeerState) for row in state.rows]
        return type(first)(rows, torch.cat([state.position for state in states]), first.dimensions)

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors by name; of each row also what its cache knows in numbers and names, as JSON."""
        found = {"position": self.position}
        for number, row in enumerate(self.rows):
            ends = dict(caches.ends(row))
            found |= {f"rows.{number}{path}": end for path, end in ends.items() if isinstance(end, Tensor)}
            plain = {path: end for path, end in ends.items() if not isinstance(end, Tensor)}
            text = json.dumps({"read": row is not None, "ends": plain}).encode()
            found[f"rows.{number}.plain"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return found

    def save(self, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError: such a state is no context that could be opened again."""
        raise ValueError("contexts of a model of Transformers are not saved: keep its text")

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor], config: Any, form: Any) -> Self:
        """The state of `state_dict`. `form` is a cache of the model, of any text.

        Raises:
            ValueError: a row is missing.
        """
        rows: list[Any] = []
        for number in range(len(tensors["position"])):
            name = f"rows.{number}.plain"
            if name not in tensors:
                raise ValueError(f"the state lacks {name}: it is damaged or of another model")
            told = json.loads(bytes(tensors[name].cpu().tolist()))
            prefix = f"rows.{number}"
            found: dict[str, Any] = dict(told["ends"])
            found |= {
                key.removeprefix(prefix): value
                for key, value in tensors.items()
                if key == prefix or key.startswith(f"{prefix}/")
            }
            if not told["read"]:
                rows.append(None)
            else:
                rows.append(found[""] if "" in found else caches.filled(form, found))
        return cls(rows, tensors["position"].cpu(), cls.dimensions_class.of(config))
