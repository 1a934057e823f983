"""What fused steps have left behind, of all layers at once: the next step reads it where the last one wrote it.

A state of many small objects costs more to make and to read, at every token, than the step itself takes. So a state
that a step gives holds one `Held`, and makes its layers of that when somebody asks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megalodon.models.layers.memory_block import LayerState
from megalodon.models.layers.open_chunk import OpenChunk
from megalodon.models.layers.timestep_norm import Moments
from megalodon.ops.compiled.tables import Memory

if TYPE_CHECKING:
    from megalodon.models.megalodon.state import MegalodonState


class Held:
    """A state's memory. It is a value, but for places of the open chunk that are free: see `OpenChunk`.

    Args:
        moments: float64 [2 layers + 2, B, G]; mean and variance of each block's norm, then the final norm's.
        h: complex64 [layers, B, D, N]; each block's long memory.
        keys, values: [B, places, H, ...] of each block.
        filled: places in use.
        table: int64 [layers + 1, len(Memory)]; where the step that made it read and wrote. Its last row is the final
            norm's.
    """

    __slots__ = ("_right", "filled", "h", "keys", "moments", "table", "values")

    def __init__(
        self,
        moments: Tensor,
        h: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        filled: int,
        table: np.ndarray,
    ) -> None:
        self.moments, self.h, self.keys, self.values = moments, h, keys, values
        self.filled, self.table, self._right = filled, table, [None]

    def takes(self, needed: int, dtype: torch.dtype) -> bool:
        """Whether `needed` places of the buffers may be written; then the right to it is taken."""
        keys = self.keys[0]
        return keys.shape[1] >= needed and keys.dtype == dtype and self._take_right()

    def grown(self, used: int, chunk_size: int, like: Tensor) -> Held:
        """A copy with room for a token in buffers of its own, in the dtype of `like`."""
        chunks = [
            OpenChunk(keys, values, self.filled).copied(used, chunk_size, like, like)
            for keys, values in zip(self.keys, self.values, strict=True)
        ]
        return _tabled(self.moments, self.h, chunks, used)

    def successor(self, filled: int) -> Held:
        """What a step is to fill: the same chunk, all else new. Its table reads this and writes the new one."""
        moments, h, table = torch.empty_like(self.moments), torch.empty_like(self.h), self.table.copy()
        table[:, _IN], table[:, _OUT] = self.table[:, _OUT], self.table[:, _OUT] + _apart(self.moments, moments)
        table[:, Memory.h_in] = self.table[:, Memory.h_out]
        table[:, Memory.h_out] += _apart(self.h, h)
        return Held(moments, h, self.keys, self.values, filled, table)

    def emptied(self) -> Held:
        """The same without what is in the chunk."""
        keys, values = ([x[:, :0].clone() for x in buffers] for buffers in (self.keys, self.values))
        return Held(self.moments, self.h, keys, values, 0, self.table)

    @property
    def final(self) -> Moments:
        """What the final norm remembers."""
        return Moments(*self.moments[-2:])

    def layers(self) -> tuple[LayerState, ...]:
        """What each layer remembers. The right to append goes to them."""
        mine = self._take_right()
        moments, h = self.moments.unbind(), self.h.unbind()
        return tuple(
            LayerState(Moments(mean, var), average, OpenChunk(keys, values, self.filled, mine))
            for mean, var, average, keys, values in zip(
                moments[:-2:2], moments[1:-2:2], h, self.keys, self.values, strict=True
            )
        )

    def _take_right(self) -> bool:
        try:
            self._right.pop()  # one operation: two threads cannot both succeed
        except IndexError:
            return False
        return True


_IN, _OUT = slice(Memory.mean_in, Memory.var_in + 1), slice(Memory.mean_out, Memory.var_out + 1)


def _apart(old: Tensor, new: Tensor) -> int:
    """Bytes from the one to the other."""
    return new.data_ptr() - old.data_ptr()


def _starts(x: Tensor) -> np.ndarray:
    """int64 [len(x)]: the address of each part of a contiguous x."""
    return x.data_ptr() + np.arange(len(x)) * (x.stride(0) * x.element_size())


def held_of(state: MegalodonState, offset: int, chunk_size: int, like: Tensor) -> Held:
    """The memory of a state of layers, with room for a token of rows that all hold `offset` in their chunks."""
    pairs = [layer.moments for layer in state.layers] + [state.final]
    moments = torch.stack([value.double() for pair in pairs for value in pair])
    h = torch.stack([layer.cema.resolve_conj().to(torch.complex64) for layer in state.layers])
    chunks = [layer.chunk.with_room(like, like, offset, chunk_size) for layer in state.layers]
    return _tabled(moments, h, chunks, offset)


def _tabled(moments: Tensor, h: Tensor, chunks: Sequence[OpenChunk], filled: int) -> Held:
    keys, values = [chunk.keys for chunk in chunks], [chunk.values for chunk in chunks]
    table = np.zeros((len(chunks) + 1, len(Memory)), np.int64)
    table[:, _OUT], table[:-1, Memory.h_out] = _starts(moments).reshape(-1, 2), _starts(h)
    table[:-1, Memory.keys :] = [chunk_row(*pair) for pair in zip(keys, values, strict=True)]
    return Held(moments, h, keys, values, filled, table)


def chunk_row(keys: Tensor, values: Tensor) -> list[int]:
    """The end of a block's row of the table: where keys and values [B, places, H, ...] are."""
    return [keys.data_ptr(), values.data_ptr(), *keys.stride()[:3], *values.stride()[:3]]
