"""Segments: a sequence cut at BOS tokens, while its chunks go on (GECKO: Segments).

A document (`segment_ids`) restarts everything, chunks included. A segment restarts what remembers and hides what came
before from attention; the places of its tokens in their chunks are the sequence's. What a row has to carry of it is
small: where in the chunk before, and where in the open chunk, the last BOS token stood.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from megalodon.ops.layout import Layout, layout_of

NEVER = -(2**40)
"""The position of the last BOS token where there is none that matters."""


class Segments:
    """The segments of a batch; made once for all layers.

    Args:
        bos: bool [B, L]; True where a token starts a segment.
        layout: the batch's layout, with its chunk size.
        places: (before, open), int64 [B] each; the place in the chunk before, and in the open chunk, of the last BOS
            token read earlier; -1 where it holds none. None: the rows carry none.

    Raises:
        ValueError: a shape or dtype does not fit; the message names the argument.
    """

    def __init__(self, bos: Tensor, layout: Layout, places: tuple[Tensor, Tensor] | None = None) -> None:
        if bos.shape != (layout.batch, layout.length) or bos.dtype != torch.bool:
            raise ValueError(
                f"bos_mask is {bos.dtype} of shape {tuple(bos.shape)}: it must be bool {(layout.batch, layout.length)}"
            )
        if places is not None and any(place.shape != (layout.batch,) for place in places):
            raise ValueError(
                f"bos_places has shapes {[tuple(p.shape) for p in places]}: both must be {(layout.batch,)}"
            )
        padding = layout.padding
        self.bos = bos if padding is None else bos & ~padding
        self.layout = layout
        none = torch.full((layout.batch,), -1, dtype=torch.int64, device=bos.device)
        self.before, self.open = (none, none) if places is None else (place.to(bos.device) for place in places)

    @cached_property
    def carried(self) -> Tensor:
        """int64 [B]: the position, in the row's first document, of its last BOS token before the batch."""
        size, seen = self.layout.chunk_size, self.layout.seen
        assert size is not None
        start = seen - seen % size
        in_before = torch.where(self.before >= 0, start - size + self.before, NEVER)
        return torch.where(self.open >= 0, start + self.open, in_before)

    @cached_property
    def last(self) -> Tensor:
        """int64 [B, L]: the position in its document of the last BOS token up to each token, or far below zero."""
        index = torch.arange(self.layout.length, device=self.bos.device)
        at = torch.where(self.bos, index, -1).cummax(1).values
        begins = self.layout.document_starts
        own = self.layout.token_positions - (index - at)
        carried = torch.where(begins == 0, self.carried[:, None], NEVER)
        return torch.where((at >= begins) & (at >= 0), own, carried)

    @cached_property
    def reach(self) -> Tensor:
        """int64 [B, L]: how many tokens attention sees, up to and with the token itself."""
        return torch.minimum(self.layout.window_reach, self.layout.token_positions - self.last + 1)

    @cached_property
    def readable(self) -> Tensor:
        """bool [B, L]: the working memory, that ends two chunks before the token's, is of the token's segment."""
        size = self.layout.chunk_size
        assert size is not None
        return self.last < (self.layout.token_positions // size - 1) * size

    @cached_property
    def after(self) -> tuple[Tensor, Tensor]:
        """`places` after the batch."""
        layout, size = self.layout, self.layout.chunk_size
        assert size is not None
        if layout.length == 0:
            return self.before, self.open
        lengths = torch.from_numpy(layout.lengths).to(self.bos.device)
        ends = torch.from_numpy(layout.end_positions).to(self.bos.device)
        start = ends - ends % size
        last = self._at(lengths - 1, self.carried)
        boundary = lengths - 1 - ends % size  # the last token of the chunk before
        in_before = self._at(boundary, torch.where(self.before >= 0, start - size + self.before, NEVER)) - start + size
        in_before = torch.where(ends >= size, in_before, -1)  # a document's first chunk has none before it
        return in_before.clamp(min=-1), (last - start).clamp(min=-1)

    @cached_property
    def by_segment(self) -> Layout:
        """`segmented`: the layout of the operators that only start afresh where a segment begins."""
        return segmented(self.layout, self.bos)

    def forgotten(self, state: Tensor | None) -> Tensor | None:
        """A carried state [B, ...], zero in the rows whose first token starts a segment."""
        if state is None or self.layout.length == 0:
            return state
        return torch.where(self.bos[:, 0].view(-1, *[1] * (state.ndim - 1)), 0, state)

    def _at(self, token: Tensor, otherwise: Tensor) -> Tensor:
        """`last` at a token of each row; what it was before the batch where that lies before it."""
        found = self.last.gather(1, token.clamp(min=0)[:, None])[:, 0]
        return torch.where(token >= 0, found, otherwise)


def segmented(layout: Layout, bos: Tensor) -> Layout:
    """The layout in which every BOS token starts a document, for the operators that only start afresh there.

    A BOS token that is a row's first starts no new document of the batch: whoever carries a state resets it.
    """
    starts = bos.clone()
    if layout.starts is not None:
        starts |= torch.from_numpy(layout.starts).to(bos.device)
    if layout.length < 2 or not starts[:, 1:].any():
        return layout
    lengths = None if layout.padding is None else layout.lengths
    return layout_of(layout.batch, layout.length, layout.device, segment_ids=starts.cumsum(1), lengths=lengths)
