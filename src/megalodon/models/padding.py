"""Taking padding out of a batch, so that every row begins with its first real token, and putting it back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megalodon.ops.tiles import move_rows


class RealTokens(NamedTuple):
    """The real tokens of a padded batch: token `source` of its B*L is token `target` of the compact B*length."""

    source: Tensor
    target: Tensor
    lengths: Tensor
    length: int

    @staticmethod
    def of(attention_mask: Tensor) -> RealTokens | None:
        """None when nothing is padded.

        Raises:
            ValueError: the mask has values other than 0 and 1: numbers of documents, or what is added to scores.
        """
        real = attention_mask == 1
        if real.all():
            return None
        if not (real | (attention_mask == 0)).all():
            raise ValueError(
                "attention_mask has values other than 0 (padding) and 1: documents are told by segment_ids, "
                "and no scores are added to"
            )
        lengths = real.sum(1)
        length = max(int(lengths.max()), 1)
        place = real.cumsum(1) - 1 + torch.arange(len(real), device=real.device)[:, None] * length
        return RealTokens(real.flatten().nonzero()[:, 0], place[real], lengths, length)

    def pack(self, x: Tensor) -> Tensor:
        """[B, L, ...] -> [B, length, ...], padding moved to the end and zeroed."""
        return move_rows(x.flatten(0, 1), self.source, self.target, len(x) * self.length).unflatten(0, (len(x), -1))

    def unpack(self, x: Tensor, length: int) -> Tensor:
        """[B, length, ...] -> [B, L, ...], padding zero."""
        return move_rows(x.flatten(0, 1), self.target, self.source, len(x) * length).unflatten(0, (len(x), -1))
