"""One decoding step for many sequences at once, over slots of preallocated state.

A slot is a row of every buffer. A step runs on the first `rows` slots, a number from a short list of *bucket sizes*,
and changes the buffers in place, so nothing is allocated, copied or re-arranged when sequences come and go.

**What a row gives depends on that row alone**, to the bit: not on its slot, its neighbours or the bucket. Matrix
products have one shape per bucket, and only buckets whose rows come out alike are used: `choose_buckets` measures this
on the model's own matrices, because a product of few rows may add up in another order than one of many. Attention runs
row by row over exactly the row's own keys. All else is element by element, or a sum inside one row, in operations whose
result does not depend on where an element stands (`token_step.py`).

For bfloat16 models too the state is kept in float32, its statistics in float64; activations, keys and values are
bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megalodon import ops
from megalodon.models.layers.few_rows import PRODUCT, FusedProduct, can_fuse
from megalodon.models.layers.memory_block import LayerState
from megalodon.models.layers.open_chunk import OpenChunk
from megalodon.models.layers.projection import Projection, can_pack
from megalodon.models.layers.timestep_norm import Moments, TimestepNorm
from megalodon.models.layers.watch import Watch
from megalodon.models.megalodon.fused_step import KERNEL, FusedStep
from megalodon.models.megalodon.held import chunk_row
from megalodon.models.megalodon.state import MegalodonDimensions, MegalodonState
from megalodon.models.megalodon.token_step import (
    BlockStep,
    NormStep,
    copied_weights,
    has_uniform_eps,
    linear_layers,
    passed_over,
)
from megalodon.ops.backend import accumulator_dtype, matmul_dtype
from megalodon.ops.compiled.tables import KINDS, Memory


class SlotNorm:
    """A `TimestepNorm` whose statistics lie in slots."""

    def __init__(self, norm: TimestepNorm, step: NormStep, slots: int) -> None:
        device = norm.weight.device
        self.norm, self.norm_step = norm, step
        wide = accumulator_dtype(device)
        self.mean = torch.zeros(slots, norm.num_groups, dtype=wide, device=device)
        self.var = torch.ones(slots, norm.num_groups, dtype=wide, device=device)

    def step(self, x: Tensor, share: Tensor) -> Tensor:
        """x [M, D] and 1 / (tokens seen, this one included) [M, 1] -> the normalised x, in the dtype of x."""
        return self.norm_step(x, share, self.mean[: len(x)], self.var[: len(x)]).to(x.dtype)


class SlotLayer:
    """One block's step, and its memory in slots."""

    def __init__(
        self, step: BlockStep, slots: int, sizes: MegalodonDimensions, capacity: int, dtype: torch.dtype
    ) -> None:
        self.step, block = step, step.block
        self.norm = SlotNorm(block.timestep_norm, self.step.norm, slots)
        device, q = self.norm.mean.device, self.step.q
        self.h = torch.zeros(slots, *q.shape, dtype=q.dtype, device=device)
        heads = (slots, sizes.num_heads, capacity)
        self.keys = torch.zeros(*heads, sizes.head_dim, dtype=dtype, device=device)
        self.values = torch.zeros(*heads, sizes.value_head_dim, dtype=dtype, device=device)
        self._keys_of, self._values_of = self.keys.transpose(-1, -2).unbind(), self.values.unbind()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, active: Active) -> Tensor:
        """Append k [M, H, d] and v [M, H, e] of the active rows, then attend with q [M, H, d] -> [M, H, e].

        Row by row, each over as many keys as it has: a product of several rows could add up in another order.
        """
        slots, offsets = active.slots, active.offsets
        self.keys[slots, :, offsets], self.values[slots, :, offsets] = k[slots], v[slots]
        wide = matmul_dtype(q)
        single, found = q[:, :, None].to(wide).unbind(), []
        for slot, length in active.lengths:
            keys = self._keys_of[slot].narrow(-1, 0, length).to(wide)
            scores = torch.bmm(single[slot], keys)
            weights = torch.softmax(scores, -1, torch.float32 if wide == torch.bfloat16 else None).to(wide)
            found.append(torch.bmm(weights, self._values_of[slot].narrow(-2, 0, length).to(wide)))
        out = torch.zeros_like(v)
        out[slots] = torch.stack(found)[:, :, 0].to(v.dtype)
        return out


class Active:
    """The slots that a step moves on, and where each stands in its chunk."""

    def __init__(self, slots: Sequence[int], offsets: Sequence[int], device: torch.device) -> None:
        self.slots = torch.tensor(slots, device=device)
        self.offsets = torch.tensor(offsets, device=device)
        self.lengths = [(slot, offset + 1) for slot, offset in zip(slots, offsets, strict=True)]


def padded(x: Tensor, rows: int) -> Tensor:
    """x [M, D] with rows of zeros after it: [rows, D]."""
    return x if len(x) == rows else F.pad(x, (0, 0, 0, rows - len(x)))


class MegalodonSlots:
    """The model's step for one token of each of many sequences.

    Attributes:
        slots: how many rows the buffers have.
        buckets: the numbers of rows that a step may run on, ascending; the last one is `slots`.
        positions: tokens that each slot's sequence has read.
    """

    def __init__(self, model: Any, slots: int, buckets: Sequence[int], watched: int) -> None:
        """
        Args:
            model: in evaluation mode; its weights are used as they are now.
            slots: sequences that can be decoded at once; one of the buckets.
            buckets: numbers of rows to choose from.
            watched: values of every copied weight that `is_current` looks at.

        Raises:
            ValueError: a module is not as written, so that a step would not do what it does.
        """
        if name := passed_over(model.model):
            raise ValueError(
                f"{name} has hooks, a forward of its own or is in training mode: batched decoding would pass it over"
            )
        self.model, self.sizes = model, MegalodonDimensions.of(model.config)
        self.slots = slots
        self.buckets = tuple(size for size in sorted(buckets) if size <= self.slots)
        self.positions = [0] * self.slots
        capacity = -(-self.sizes.chunk_size // 32) * 32  # keeps every row of the buffers on a 64-byte boundary
        with torch.inference_mode():
            fused = _can_fuse(model)
            packed = _can_pack(model) and not fused
            self.head = Projection(model.lm_head, packed=model.dtype if packed else None)
            copied = copied_weights(model.model, packed) + [*model.lm_head.parameters()] * packed
            self._watch = Watch(model, copied, watched)
            self.layers = [
                SlotLayer(BlockStep(block, model.dtype, packed), self.slots, self.sizes, capacity, model.dtype)
                for block in model.model.layers
            ]
            final = model.model.final_norm
            self.final = SlotNorm(final, NormStep(final), self.slots)
            chunk = torch.arange(self.sizes.chunk_size, device=model.device)
            self.turns = ops.rotations(chunk, self.sizes.head_dim, self.sizes.rope_base)
            self._fused = _Fused(self) if fused else None

    def is_current(self) -> bool:
        """Whether the model still has the weights that were copied."""
        return self._watch.unchanged()

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        norms = [self.final, *(layer.norm for layer in self.layers)]
        tensors = [x for norm in norms for x in (norm.mean, norm.var)]
        tensors += [x for layer in self.layers for x in (layer.h, layer.keys, layer.values)]
        return sum(tensor.nbytes for tensor in tensors)

    def bucket(self, rows: int) -> int:
        """The smallest bucket of at least so many rows."""
        return min(size for size in self.buckets if size >= rows)

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], active: Sequence[int]) -> Tensor:
        """Feed one token to each active slot.

        Args:
            tokens: ids, one for each slot of `active`.
            active: slots, ascending.

        Returns:
            logits float32 [len(active), V]: what follows each token.
        """
        if self._fused is not None:
            return self._fused.step(tokens, active)
        live, device = active[-1] + 1, self.model.device
        rows = self.bucket(live)  # matrix products run on all of them, the memory's own work only where it may count
        ids = torch.zeros(rows, dtype=torch.int64)
        ids[list(active)] = torch.tensor(tokens)
        offsets = [position % self.sizes.chunk_size for position in self.positions[:rows]]
        where = Active(active, [offsets[slot] for slot in active], device)
        seen = torch.tensor(self.positions[:live]) + self.model.config.norm_prior_count + 1
        share = seen[:, None].to(device=device, dtype=self.final.mean.dtype).reciprocal()
        turns = self.turns[torch.tensor(offsets, device=device)]
        x = self.model.model.embed_tokens(ids.to(device)) * self.model.model.embedding_scale
        for layer in self.layers:
            x = self._block(layer, x, share, turns, where)
        x = padded(self.final.step(x[:live], share), rows)
        for slot in active:
            self.positions[slot] += 1
        (logits,) = self.head(x)
        return logits[where.slots].float()

    def _block(self, layer: SlotLayer, x: Tensor, share: Tensor, turns: Tensor, active: Active) -> Tensor:
        step = layer.step
        n = layer.norm.step(x[: len(share)], share)
        m = padded(step.average(n, layer.h[: len(n)]), len(x))
        n = padded(n, len(x))
        z, r, h = step.from_memory(m)
        q, k = step.queries_and_keys(z, turns)
        return step.finish(x, r, h, layer.attend(q, k, step.values(n), active))

    # --- sequences in and out ---------------------------------------------------------------------------------------

    @torch.inference_mode()
    def load(self, slot: int, state: MegalodonState) -> None:
        """Put a sequence's state (one row) into a slot."""
        position = self.positions[slot] = int(state.position[0])
        filled = position % self.sizes.chunk_size
        for mine, theirs in [(self.final, state.final)] + [
            (layer.norm, memory.moments) for layer, memory in zip(self.layers, state.layers, strict=True)
        ]:
            prior = mine.norm.prior(mine.mean.device)
            mine.mean[slot] = theirs.mean[0] if position else prior.mean
            mine.var[slot] = theirs.var[0] if position else prior.var
        for layer, memory in zip(self.layers, state.layers, strict=True):
            layer.h[slot] = memory.cema[0]
            layer.keys[slot, :, :filled] = memory.chunk.keys[0, :filled].transpose(0, 1)
            layer.values[slot, :, :filled] = memory.chunk.values[0, :filled].transpose(0, 1)

    @torch.inference_mode()
    def read(self, slot: int) -> MegalodonState:
        """A copy of a slot's sequence."""
        filled = self.positions[slot] % self.sizes.chunk_size
        rows = slice(slot, slot + 1)

        def moments(norm: SlotNorm) -> Moments:
            return Moments(norm.mean[rows].clone(), norm.var[rows].clone())

        def open_part(buffer: Tensor) -> Tensor:
            return buffer[rows, :, :filled].transpose(1, 2).clone()

        layers = [
            LayerState(
                moments(layer.norm),
                layer.h[rows].clone(),
                OpenChunk(open_part(layer.keys), open_part(layer.values)),
            )
            for layer in self.layers
        ]
        return MegalodonState(layers, moments(self.final), torch.tensor([self.positions[slot]]), self.sizes)

    @torch.inference_mode()
    def move(self, source: int, target: int) -> None:
        """Copy a slot's sequence to another slot."""
        filled = self.positions[source] % self.sizes.chunk_size
        self.positions[target] = self.positions[source]
        for norm in [self.final, *(layer.norm for layer in self.layers)]:
            norm.mean[target], norm.var[target] = norm.mean[source], norm.var[source]
        for layer in self.layers:
            layer.h[target] = layer.h[source]
            for buffer in (layer.keys, layer.values):
                buffer[target, :, :filled] = buffer[source, :, :filled]

    @staticmethod
    @torch.inference_mode()
    def choose_buckets(model: Any, candidates: Sequence[int]) -> tuple[int, ...]:
        """The candidates whose matrix products give each row, wherever it stands, the bits that the largest gives.

        Every distinct shape among the products of a block, which are those of all blocks, and the head are multiplied
        with random rows. The largest candidate always stays; its own rows must not depend on their place.

        Raises:
            RuntimeError: if they do: results on this machine would depend on who else is being served.
        """
        largest = max(candidates)
        if _can_fuse(model):  # sums each row's terms in one order, whatever the number of rows
            return tuple(sorted(candidates))
        packed = _can_pack(model)
        block = BlockStep(model.model.layers[0], model.dtype, packed)
        products = [Projection(model.lm_head, packed=model.dtype if packed else None), *block.products]
        shapes = {tuple(tuple(layer.weight.shape) for layer in product.layers): product for product in products}
        alike = set(candidates)
        generator = torch.Generator().manual_seed(0)
        for product in shapes.values():
            weight = product.layers[0].weight

            def multiply(x: Tensor, product: Projection = product) -> Tensor:
                return torch.cat(list(product(x)), dim=1)

            x = torch.randn(largest, weight.shape[1], generator=generator).to(model.device, model.dtype)
            whole = multiply(x)
            order = torch.randperm(largest, generator=generator).to(model.device)
            if not torch.equal(multiply(x[order]), whole[order]):
                raise RuntimeError(
                    f"a product of {largest} rows with a matrix of {weight.shape[1]} x {whole.shape[1]} gives a "
                    "row other bits in another place: this machine's matrix library cannot serve reproducibly"
                )
            for size in candidates:
                places = [*range(0, largest - size + 1, max(1, size // 2)), largest - size]
                if not all(
                    torch.equal(multiply(x[start : start + size].clone()), whole[start : start + size])
                    for start in places
                ):
                    alike.discard(size)
        return tuple(sorted(alike | {largest}))


class _Fused:
    """The same step as one kernel, on exactly the active rows: no row's bits depend on how many there are."""

    def __init__(self, decoder: MegalodonSlots) -> None:
        self._decoder, self._model = decoder, decoder.model
        layers, final = decoder.layers, decoder.final
        self._step = FusedStep([layer.step for layer in layers], final.norm_step, decoder.sizes)
        self._head, self._kind = FusedProduct(decoder.model.lm_head), KINDS[layers[0].keys.dtype]
        self._memory = np.zeros((len(layers) + 1, len(Memory)), np.int64)
        for row, layer in zip(self._memory, layers, strict=False):
            h = layer.h.data_ptr()
            row[Memory.h_in], row[Memory.h_out] = h, h
            row[Memory.keys :] = chunk_row(*(buffer.transpose(1, 2) for buffer in (layer.keys, layer.values)))
        for row, norm in zip(self._memory, [*(layer.norm for layer in layers), final], strict=True):
            row[:4] = 2 * [norm.mean.data_ptr(), norm.var.data_ptr()]

    def step(self, tokens: Sequence[int], active: Sequence[int]) -> Tensor:
        """As `MegalodonSlots.step`."""
        embedded = self._model.model.embed_tokens(torch.tensor(tokens)) * self._model.model.embedding_scale
        slots, positions = np.array(active), np.array([self._decoder.positions[slot] for slot in active])
        share = 1 / (positions + (self._model.config.norm_prior_count + 1))
        places = positions % self._decoder.sizes.chunk_size
        x = self._step.run(embedded.to(torch.float32, copy=True), share, places, slots, self._memory, self._kind)
        for slot in active:
            self._decoder.positions[slot] += 1
        return self._head(x)


def _can_pack(model: Any) -> bool:
    return can_pack([*linear_layers(model.model), model.lm_head], model.dtype)


def _can_fuse(model: Any) -> bool:
    layers = [*linear_layers(model.model), model.lm_head]
    plain = all(can_fuse(layers, model.dtype, kernel) for kernel in (KERNEL, PRODUCT))
    return plain and has_uniform_eps(model.model)
