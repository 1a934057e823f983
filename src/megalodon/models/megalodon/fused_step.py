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
from megalodon.models.layers.step_tables import StepTables
from megalodon.models.megalodon.held import held_of
from megalodon.models.megalodon.state import MegalodonDimensions, MegalodonState
from megalodon.ops.compiled import tables

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
        before = state.held
        if before is None:
            before = held_of(state, offset, sizes.chunk_size, x)
        elif offset == 0 or not before.takes(offset + 1, x.dtype):
            before = before.grown(offset, sizes.chunk_size, x)
        after = before.successor(offset + 1)
        seen = state.position.numpy() + (sizes.norm_prior_count + 1)
        places, slots = np.full(rows, offset), np.arange(rows)
        wide = x.to(torch.float32, copy=True).contiguous()
        out = self.run(wide, 1 / seen, places, slots, after.table, tables.KINDS[x.dtype])
        if offset + 1 == sizes.chunk_size:  # nobody attends to a chunk that is complete
            after = after.emptied()
        return out.to(x.dtype), MegalodonState.of_held(after, state.position + 1, sizes)

    def run(
        self, x: Tensor, share: np.ndarray, offsets: np.ndarray, slots: np.ndarray, memory: np.ndarray, kind: int
    ) -> Tensor:
        """One token a row.

        Args:
            x: float32 [M, D], contiguous; overwritten.
            share: float64 [M]; 1 / (tokens seen, this one and the prior's included).
            offsets: int64 [M]; tokens in each row's open chunk.
            slots: int64 [M]; where each row's memory is.
            memory: int64 [layers + 1, len(Memory)]: where the memory of each block lies, and of the final norm.
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
