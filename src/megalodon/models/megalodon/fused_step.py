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
from megalodon.models.layers.memory_block import LayerState
from megalodon.models.layers.step_tables import StepTables
from megalodon.models.layers.timestep_norm import Moments
from megalodon.models.megalodon.state import MegalodonDimensions, MegalodonState
from megalodon.ops.compiled import tables
from megalodon.ops.compiled.tables import Memory

if TYPE_CHECKING:
    from megalodon.models.megalodon.token_step import BlockStep, NormStep


KERNEL = "step.blocks"


class FusedStep:
    """A model's blocks and final norm for one token a row; its memory belongs to the caller."""

    @torch.no_grad()
    def __init__(self, blocks: Sequence[BlockStep], final: NormStep, sizes: MegalodonDimensions) -> None:
        """Of what `can_fuse` has looked at."""
        self.sizes = sizes
        first = blocks[0]
        chunk = torch.arange(sizes.chunk_size)
        self._turns = torch.view_as_real(ops.rotations(chunk, sizes.head_dim, sizes.rope_base)).contiguous()
        norms = (first.norm.eps, first.block.memory_norm.eps, first.attention.eps, first.block.feed_forward.norm.eps)
        self._eps = np.array(norms)
        attention, feed_forward = first.attention, first.block.feed_forward
        widths = (
            sizes.model_dim,
            len(attention.z_proj.weight),
            len(attention.v_proj.weight),
            len(feed_forward.up_proj.weight),
            sizes.num_heads,
        )
        self._tables = StepTables(
            KERNEL,
            len(blocks),
            (layer for product in first.products for layer in product.layers),
            widths,
            components=sizes.cema_ndim,
            groups=sizes.norm_num_groups,
            turns=self._turns.data_ptr(),
            eps=self._eps.ctypes.data,
        )
        for number, block in enumerate(blocks):
            self._write_block(number, block)
        self._tables.write(-1, norm_scale=final.scale, norm_bias=final.bias)

    def _write_block(self, number: int, step: BlockStep) -> None:
        feed_forward = step.block.feed_forward
        p, q, gamma = step.block.cema.coefficients()
        self._tables.write_linear(number, step.attention, feed_forward)
        self._tables.write(
            number,
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
        scratch = torch.empty(tables.scratch_size(rows, *self._tables.widths, capacity))
        self._tables.run(
            rows,
            capacity=capacity,
            memory=memory.ctypes.data,
            key_kind=kind,
            x=x.data_ptr(),
            out=out.data_ptr(),
            share=share.ctypes.data,
            offsets=offsets.ctypes.data,
            slots=slots.ctypes.data,
            scratch=scratch.data_ptr(),
        )
        return out


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
