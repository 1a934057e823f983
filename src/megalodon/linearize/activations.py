"""What a block of the teacher reads in a step: computed by the blocks before it, one in memory at a time, or kept on
the disk by them."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from megalodon.convert.teachers import Teacher
from megalodon.files import load_tensors, save_tensors, write_file
from megalodon.models.kin.block import KinBlock
from megalodon.ops.layout import Layout


@torch.no_grad()
def through(block: KinBlock, x: Tensor, layout: Layout) -> Tensor:
    """x [B, L, D] through a block of the teacher, from the beginnings of its rows."""
    return block(x, None, layout, False)[0]


class Recomputed:
    """The inputs of block number `first`, through the blocks before it: each is read anew for every step."""

    def __init__(self, teacher: Teacher, first: int, device: torch.device, dtype: torch.dtype) -> None:
        self.teacher, self.first, self.device, self.dtype = teacher, first, device, dtype
        self.embedding = teacher.tensor("model.embed_tokens.weight")

    def inputs(self, step: int, input_ids: Tensor, layout: Layout) -> Tensor:
        """[B, L, D] of the rows of a step."""
        x = F.embedding(input_ids.to(self.embedding.device), self.embedding).to(self.device, self.dtype)
        for layer in range(self.first):
            x = through(self.teacher.block(layer, self.device, self.dtype), x, layout)
        return x

    def keep(self, step: int, outputs: Tensor) -> None:
        """Told what the blocks in memory made of a step's rows."""

    def finish(self) -> None:
        """Told that no step needs these inputs any more."""


class OnDisk(Recomputed):
    """The inputs of block `first` from files that the blocks before it wrote, and files for the block `after` these.

    A step that is made twice, because a run was killed, finds its files as they were.
    """

    def __init__(
        self, teacher: Teacher, first: int, device: torch.device, dtype: torch.dtype, folder: Path, after: int
    ) -> None:
        super().__init__(teacher, first, device, dtype)
        self._own, self._next = folder / f"block-{first:03d}", folder / f"block-{after:03d}"
        self._last = after >= teacher.config.num_layers

    def inputs(self, step: int, input_ids: Tensor, layout: Layout) -> Tensor:
        if self.first == 0:
            return super().inputs(step, input_ids, layout)
        return load_tensors(_file(self._own, step))["x"].to(self.device)

    def keep(self, step: int, outputs: Tensor) -> None:
        if not self._last:
            self._next.mkdir(parents=True, exist_ok=True)
            write_file(_file(self._next, step), lambda path: save_tensors(path, {"x": outputs.cpu()}))

    def finish(self) -> None:
        shutil.rmtree(self._own, ignore_errors=True)


def _file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}.safetensors"
