"""What a row carries from the tokens before a batch: the chunk before its open one, and the open one so far."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megalodon.ops.layout import Layout


class Prefix(NamedTuple):
    """Keys and values; None where no row has any.

    Attributes:
        before: [B, C, H, .] each; row b's are of the chunk before its open one, and mean nothing if it has none, that
            is if it has seen less than C tokens of its document.
        open: [B, n, H, .] each; row b's first `positions[b] % C` are those of its open chunk.
    """

    before: tuple[Tensor, Tensor] | None = None
    open: tuple[Tensor, Tensor] | None = None

    def of_row(self, row: int, seen: int, size: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """(keys, values, how many are carried) of a row that has seen `seen` tokens: carried ones, then k and v."""
        parts_k, parts_v = [], []
        if seen >= size and self.before is not None:
            parts_k.append(self.before[0][row])
            parts_v.append(self.before[1][row])
        if seen % size and self.open is not None:
            parts_k.append(self.open[0][row, : seen % size])
            parts_v.append(self.open[1][row, : seen % size])
        kept = sum(len(part) for part in parts_k)
        keys = torch.cat([*(part.to(k.dtype) for part in parts_k), k[row]])
        values = torch.cat([*(part.to(v.dtype) for part in parts_v), v[row]])
        return keys, values, kept

    def positions(self, batch: int, size: int) -> list[int]:
        """How many tokens each row has seen, if each has seen just what is carried."""
        before = 0 if self.before is None else size
        return [before + (0 if self.open is None else self.open[0].shape[1])] * batch

    def check(self, layout: Layout) -> None:
        """Raise ValueError unless it holds all that the rows of a layout have seen of two chunks."""
        assert layout.chunk_size is not None
        if layout.longest_offset > (0 if self.open is None else self.open[0].shape[1]):
            raise ValueError(f"the open chunk holds {layout.longest_offset} tokens: open_k and open_v must hold them")
        if self.before is None and (seen := layout.most_seen) >= layout.chunk_size:
            raise ValueError(
                f"a row has seen {seen} tokens, {layout.chunk_size} or more: before_k and before_v must hold the chunk "
                "before its open one"
            )


def checked_prefix(
    k: Tensor,
    v: Tensor,
    size: int,
    before_k: Tensor | None,
    before_v: Tensor | None,
    open_k: Tensor | None,
    open_v: Tensor | None,
) -> Prefix:
    """The prefix of a batch k [B, L, H, d], v [B, L, H, e].

    Raises:
        ValueError: a shape does not fit; the message names the argument.
    """
    given = {"before_k": (before_k, k), "before_v": (before_v, v), "open_k": (open_k, k), "open_v": (open_v, v)}
    for name, (value, like) in given.items():
        if value is not None and (value.ndim != 4 or (len(value), *value.shape[2:]) != (len(like), *like.shape[2:])):
            raise ValueError(f"{name} has shape {tuple(value.shape)}: it must be like {tuple(like.shape)} but for L")
        if value is not None and name.startswith("before") and value.shape[1] != size:
            raise ValueError(f"{name} has {value.shape[1]} tokens: a whole chunk has chunk_size={size}")
    pairs: list[tuple[Tensor, Tensor] | None] = []
    for name, one, other in (("before", before_k, before_v), ("open", open_k, open_v)):
        if one is None or other is None:
            if one is not other:
                raise ValueError(f"{name}_k and {name}_v are given together or not at all")
            pairs.append(None)
            continue
        if one.shape[1] != other.shape[1]:
            raise ValueError(
                f"{name}_k and {name}_v hold {one.shape[1]} and {other.shape[1]} tokens: both must hold as many"
            )
        pairs.append((one, other))
    return Prefix(*pairs)
