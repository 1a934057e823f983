"""Decoding for many sequences at once, over slots that each hold one: the engine's inner loop.

An architecture may bring a decoder of its own (`CausalLM.slots_class`), which runs many rows in one step. Others run
row by row. Either way **what a row gives depends on that row alone**, to the bit: not on its slot or its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megalodon.models import CausalLM, State
from megalodon.models.layers.watch import Watch

BUCKETS = (16, 32, 64, 128, 256, 512)
"""Numbers of rows that a step may run on; fewer than 16 are padded."""
WATCHED = 4096
"""Values of every copied weight that are looked at where a request begins: all, of small ones."""


class SlotDecoder(Protocol):
    """The model's step for one token of each of many sequences.

    Attributes:
        slots: how many sequences it holds at most.
        positions: tokens that each slot's sequence has read.
    """

    slots: int
    positions: list[int]

    def bucket(self, rows: int) -> int:
        """Of how many rows a step for so many is made."""
        ...

    def is_current(self) -> bool:
        """Whether the model still has the weights that the decoder was made of, by up to `WATCHED` values of each."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        ...

    def step(self, tokens: Sequence[int], active: Sequence[int]) -> Tensor:
        """Feed one token to each slot of `active` (ascending): logits float32 [len(active), V] of what follows."""
        ...

    def load(self, slot: int, state: Any) -> None:
        """Put a sequence's state (one row) into a slot."""
        ...

    def read(self, slot: int) -> State:
        """A copy of a slot's sequence."""
        ...

    def move(self, source: int, target: int) -> None:
        """Copy a slot's sequence to another slot."""
        ...


class RowDecoder:
    """Each sequence by itself, through the model's own forward pass: right for every architecture."""

    def __init__(self, model: CausalLM, slots: int) -> None:
        self.model, self.slots, self.positions = model, slots, [0] * slots
        self._states: list[State | None] = [None] * slots
        self._watch = Watch(model, model.parameters(), WATCHED)

    def bucket(self, rows: int) -> int:
        """As `SlotDecoder.bucket`: every row is a step of its own."""
        return rows

    def is_current(self) -> bool:
        """As `SlotDecoder.is_current`."""
        return self._watch.unchanged()

    @property
    def nbytes(self) -> int:
        """Bytes of the sequences that there are."""
        return sum(state.nbytes for state in self._states if state is not None)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], active: Sequence[int]) -> Tensor:
        """As `SlotDecoder.step`."""
        rows = []
        for token, slot in zip(tokens, active, strict=True):
            ids = torch.tensor([[token]], device=self.model.device)
            output = self.model(ids, past_key_values=self._states[slot], use_cache=True)
            self._states[slot] = output.past_key_values
            self.positions[slot] += 1
            rows.append(output.logits[0, -1])
        return torch.stack(rows)

    def load(self, slot: int, state: State) -> None:
        """As `SlotDecoder.load`: a state is a value, and is kept as it is."""
        self._states[slot], self.positions[slot] = state, int(state.position[0])

    @torch.inference_mode()
    def read(self, slot: int) -> State:
        """As `SlotDecoder.read`.

        Raises:
            ValueError: the slot is empty.
        """
        state = self._states[slot]
        if state is None:
            raise ValueError(f"slot {slot} holds no sequence")
        return state.clone()

    def move(self, source: int, target: int) -> None:
        """As `SlotDecoder.move`."""
        self._states[target], self.positions[target] = self._states[source], self.positions[source]


def slot_decoder(model: CausalLM, slots: int, buckets: Sequence[int] = BUCKETS) -> SlotDecoder:
    """A decoder for a model, with room for at least so many sequences.

    Args:
        model: in evaluation mode; its weights are used as they are now.
        slots: sequences that can be decoded at once; rounded up to a bucket.
        buckets: numbers of rows that a step may run on.

    Raises:
        ValueError: for less than one slot, or more than the largest bucket; or a module of the model's is not as
            written, so that a step would not do what it does.
    """
    if not 1 <= slots <= max(buckets):
        raise ValueError(f"slots is {slots}; it must be from 1 to {max(buckets)}")
    slots = min(size for size in buckets if size >= slots)
    own: SlotDecoder | None = None if model.slots_class is None else model.slots_class(model, slots, buckets, WATCHED)
    return RowDecoder(model, slots) if own is None else own


def choose_buckets(model: CausalLM, candidates: Sequence[int]) -> tuple[int, ...]:
    """The candidates whose rows come out alike, wherever they stand; the largest always stays.

    Raises:
        RuntimeError: the largest one's own rows depend on their place: results would depend on who else is served.
    """
    if model.slots_class is None:
        return tuple(sorted(candidates))
    buckets: tuple[int, ...] = model.slots_class.choose_buckets(model, candidates)
    return buckets
