"""A token of each of several sequences through all blocks in one call: the tables for `ops.compiled.step`.

The kernel reads the layers' own weights where they lie, so that a model that decodes holds them once, and sees what
anybody writes into them. What is small and made from weights (CEMA's coefficients, scales of norms) comes from the
`BlockStep`s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megalodon import ops
from megalodon.models.layers.few_rows import weight_kind
from megalodon.models.layers.memory_block import LayerState
from megalodon.models.layers.timestep_norm import Moments
from megalodon.models.megalodon.state import MegalodonDimensions, MegalodonState
from megalodon.ops import compiled
from megalodon.ops.compiled import tables, threads
from megalodon.ops.compiled.tables import Call, Memory, Weights

if TYPE_CHECKING:
    from megalodon.models.megalodon.token_step import BlockStep, NormStep


KERNEL = "step.blocks"


class FusedStep:
    """A model's blocks and final norm for one token a row; its memory belongs to the caller."""

    @torch.no_grad()
    def __init__(self, blocks: Sequence[BlockStep], final: NormStep, sizes: MegalodonDimensions) -> None:
        """Of what `can_fuse` has looked at."""
        self.sizes = sizes
        self._alive: list[Tensor] = []
        first, address = blocks[0], compiled.address(KERNEL)
        assert address is not None
        self._kernel = threads.Kernel(address)
        kind = weight_kind(layer for product in first.products for layer in product.layers)
        assert kind is not None
        self._weights = np.zeros((len(blocks) + 1, len(Weights)), np.int64)
        for row, block in zip(self._weights, blocks, strict=False):
            self._write_block(row, block)
        self._write(self._weights[-1], norm_scale=final.scale, norm_bias=final.bias)
        chunk = torch.arange(sizes.chunk_size)
        self._turns = torch.view_as_real(ops.rotations(chunk, sizes.head_dim, sizes.rope_base)).contiguous()
        norms = (first.norm.eps, first.block.memory_norm.eps, first.attention.eps, first.block.feed_forward.norm.eps)
        self._eps = np.array(norms)
        attention, feed_forward = first.attention, first.block.feed_forward
        self._shape = (
            sizes.model_dim,
            len(attention.z_proj.weight),
            len(attention.v_proj.weight),
            len(feed_forward.up_proj.weight),
            sizes.num_heads,
        )
        self._call = np.zeros(len(Call), np.int64)
        names = ("model_dim", "z_dim", "value_dim", "ffn_dim", "heads")
        self._set(self._call, **dict(zip(names, self._shape, strict=True)))
        self._set(
            self._call,
            layers=len(blocks),
            components=sizes.cema_ndim,
            groups=sizes.norm_num_groups,
            weights=self._weights.ctypes.data,
            weight_kind=kind,
            turns=self._turns.data_ptr(),
            eps=self._eps.ctypes.data,
        )

    def _write_block(self, row: np.ndarray, step: BlockStep) -> None:
        attention, feed_forward = step.attention, step.block.feed_forward
        layers = {
            "v": attention.v_proj,
            "z": attention.z_proj,
            "r": attention.r_proj,
            "h": attention.h_proj,
            "o": attention.o_proj,
            "up": feed_forward.up_proj,
            "gate": feed_forward.gate_proj,
            "down": feed_forward.down_proj,
        }
        for name, layer in layers.items():
            if layer is not None:
                row[getattr(Weights, name)] = self._keep(layer.weight.detach())
                self._write(row, **{f"{name}_bias": layer.bias, f"{name}_scale": getattr(layer, "scale", None)})
        p, q, gamma = step.block.cema.coefficients()
        self._write(
            row,
            norm_scale=step.norm.scale,
            norm_bias=step.norm.bias,
            q=torch.view_as_real(q),
            p=p,
            gamma=torch.view_as_real(gamma),
            omega=step.omega,
            memory_scale=step.memory_scale,
            qk_scale=step.qk_scale,
            qk_bias=step.qk_bias,
            ffn_scale=step.input_scale,
            ffn_bias=step.input_bias,
            alpha=feed_forward.alpha,
        )

    def _write(self, row: np.ndarray, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            if tensor is not None:
                row[getattr(Weights, name)] = self._keep(tensor.detach().float().contiguous())

    def _keep(self, tensor: Tensor) -> int:
        self._alive.append(tensor)
        return tensor.data_ptr()

    @staticmethod
    def _set(call: np.ndarray, **values: int) -> None:
        for name, value in values.items():
            call[getattr(Call, name)] = value

    def advance(self, x: Tensor, state: MegalodonState) -> tuple[Tensor, MegalodonState]:
        """Embeddings x [M, D] of rows that stand at the same place of their chunks, and the state before them.

        Returns:
            (the final hidden states [M, D] in the dtype of x, the state after them).
        """
        sizes, rows = self.sizes, len(x)
        offset = int(state.position[0]) % sizes.chunk_size
        moments = torch.empty(2 * sizes.num_layers + 2, rows, sizes.norm_num_groups, dtype=torch.float64).unbind()
        h = torch.empty(sizes.num_layers, rows, sizes.model_dim, sizes.cema_ndim, dtype=torch.complex64).unbind()
        table, layers, read = [], [], []
        for memory, mean, var, after in zip(state.layers, moments[::2], moments[1::2], h, strict=False):
            chunk = memory.chunk.with_room(x, x, offset, sizes.chunk_size)
            before, average = _plain(memory.moments), memory.cema.resolve_conj().contiguous()
            row = memory_row(*before, (mean, var))
            table.append(row + sequence_row(average, after, chunk.keys, chunk.values))
            layers.append(LayerState(Moments(mean, var), after, chunk))
            read.append((before, average))
        before, final = _plain(state.final), Moments(*moments[-2:])
        table.append(final_row(*before, final))
        seen = state.position.numpy() + (sizes.norm_prior_count + 1)
        places, slots = np.full(rows, offset), np.arange(rows)
        wide = x.to(torch.float32, copy=True).contiguous()
        out = self.run(wide, 1 / seen, places, slots, np.array(table), tables.KINDS[x.dtype])
        if offset + 1 == sizes.chunk_size:  # nobody attends to a chunk that is complete
            layers = [layer._replace(chunk=layer.chunk.first(0)) for layer in layers]
        return out.to(x.dtype), MegalodonState(layers, final, state.position + 1, sizes)

    def run(
        self, x: Tensor, share: np.ndarray, offsets: np.ndarray, slots: np.ndarray, memory: np.ndarray, kind: int
    ) -> Tensor:
        """One token a row.

        Args:
            x: float32 [M, D], contiguous; overwritten.
            share: float64 [M]; 1 / (tokens seen, this one and the prior's included).
            offsets: int64 [M]; tokens in each row's open chunk.
            slots: int64 [M]; where each row's memory is.
            memory: int64 [layers + 1, len(Memory)]: `memory_row` and `sequence_row` of each block, `final_row` of the
                final norm.
            kind: of keys and values.

        Returns:
            float32 [M, D]; the final hidden states.
        """
        out, rows = torch.empty_like(x), len(x)
        capacity = -(-(int(offsets.max()) + 1) // 16) * 16
        scratch = torch.empty(tables.scratch_size(rows, *self._shape, capacity))
        call = self._call.copy()
        call[_OF_RUN] = (
            rows,
            capacity,
            memory.ctypes.data,
            kind,
            x.data_ptr(),
            out.data_ptr(),
            share.ctypes.data,
            offsets.ctypes.data,
            slots.ctypes.data,
            scratch.data_ptr(),
        )
        self._kernel(call, rows)
        return out


_OF_RUN = [
    getattr(Call, name)
    for name in (
        "rows",
        "capacity",
        "memory",
        "key_kind",
        "x",
        "out",
        "share",
        "offsets",
        "slots",
        "scratch",
    )
]


def _plain(moments: Moments) -> tuple[Tensor, Tensor]:
    mean, var = moments
    return mean.double().contiguous(), var.double().contiguous()


def memory_row(mean: Tensor, var: Tensor, after: tuple[Tensor, Tensor] | None = None) -> list[int]:
    """A norm's statistics, float64 [M, G] and contiguous: what a step reads, and `after`, what it writes (None: the
    same)."""
    mean_out, var_out = after or (mean, var)
    return [mean.data_ptr(), var.data_ptr(), mean_out.data_ptr(), var_out.data_ptr()]


def final_row(mean: Tensor, var: Tensor, after: tuple[Tensor, Tensor] | None = None) -> list[int]:
    """The same of the final norm, as a whole row of the table."""
    row = memory_row(mean, var, after)
    return row + [0] * (len(Memory) - len(row))


def sequence_row(h: Tensor, h_out: Tensor, keys: Tensor, values: Tensor) -> list[int]:
    """CEMA's h, complex64 [M, D, N] and contiguous, before and after a step; keys and values [M, places, H, ...]."""
    places = [keys.data_ptr(), values.data_ptr(), *keys.stride()[:3], *values.stride()[:3]]
    return [h.data_ptr(), h_out.data_ptr(), *places]
