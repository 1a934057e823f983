"""All keys that the queries of a batch may see, and where keys and queries stand: for attention that chooses among
them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megalodon.models.kin.mixers.keys_and_values import WITHOUT_END, KeysAndValues
from megalodon.ops.layout import Layout


class Context(NamedTuple):
    """S keys: what was read before, then the batch's own. One row of tables stands for all rows that are alike.

    Attributes:
        keys, values: [B, S, G, .].
        key_document, key_position: int64 [B or 1, S]; the number of the key's document in its row (-1: no key) and its
            place in it.
        query_document, query_position: int64 [B or 1, L].
    """

    keys: Tensor
    values: Tensor
    key_document: np.ndarray
    key_position: np.ndarray
    query_document: np.ndarray
    query_position: np.ndarray

    def on_device(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tables as tensors."""
        tables = (self.key_document, self.key_position, self.query_document, self.query_position)
        first, second, third, fourth = (torch.from_numpy(table).to(self.keys.device) for table in tables)
        return first, second, third, fourth


def context_of(past: KeysAndValues, k: Tensor, v: Tensor, layout: Layout) -> tuple[Context, KeysAndValues]:
    """The context of the tokens k [B, L, G, d], v [B, L, G, e], and the memory after them."""
    after = past.after(k, v, layout)
    offset = layout.with_chunks(WITHOUT_END).uniform_offset
    if offset is not None:
        total = offset + layout.length
        position = np.arange(total)[None]
        document = np.zeros_like(position)
        keys, values = after.keys[:, :total], after.values[:, :total]
        return Context(keys, values, document, position, document[:, offset:], position[:, offset:]), after
    known = past.keys.shape[1]
    query_position = layout.document_positions
    starts = np.zeros(query_position.shape, dtype=np.int64) if layout.starts is None else layout.starts
    query_document = starts.cumsum(axis=1)
    own = np.where(np.arange(layout.length) < layout.lengths[:, None], query_document, -1)
    before = np.where(np.arange(known) < layout.positions[:, None], 0, -1)
    place = np.broadcast_to(np.arange(known), before.shape)
    keys, values = (torch.cat([old.to(new.dtype), new], dim=1) for old, new in zip(past, (k, v), strict=True))
    context = Context(
        keys,
        values,
        np.concatenate([before, own], axis=1),
        np.concatenate([place, query_position], axis=1),
        query_document,
        query_position,
    )
    return context, after
