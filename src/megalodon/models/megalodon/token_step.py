"""One token of each of several sequences, without gradients: what decoding runs, in as few operations as it needs.

`StatefulModel.forward` is written for any number of tokens, padding, packing and gradients; for a single token nearly
all its time goes into preparing. Here weights are brought into the form that a step wants once, and kept while they
stand still. `advance` is the model's own short way; the batching engine builds on the same `BlockStep` and `NormStep`.

**What a row gives depends on that row alone, to the bit**, which the engine promises. PyTorch cuts element-wise work
into parts for its threads, and the last few elements of a part are computed one by one. For products of complex
numbers and for `silu` that gives other bits than many at a time, so that a row's bits would depend on how many rows
there are. Hence h in real arithmetic, and those two for as few rows at a time as are left in one part.

A module whose forward pass is not ours alone (hooks, a subclass, a replaced `forward`, weights under a transform) is
never bypassed: `TokenStep.of` says None, and the caller takes the long way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megalodon import ops
from megalodon.models.causal_lm import StatefulModel
from megalodon.models.layers.cema import CEMA
from megalodon.models.layers.chunk_attention import GatedChunkAttention
from megalodon.models.layers.feed_forward import FeedForward
from megalodon.models.layers.few_rows import can_fuse
from megalodon.models.layers.memory_block import LayerState, MemoryBlock
from megalodon.models.layers.norms import LayerNorm, RMSNorm, effective
from megalodon.models.layers.projection import Projection, can_pack
from megalodon.models.layers.timestep_norm import Moments, TimestepNorm
from megalodon.models.layers.watch import Prepared, is_forwarded_as_written
from megalodon.models.megalodon.block import MegalodonBlock
from megalodon.models.megalodon.fused_step import KERNEL, FusedStep
from megalodon.models.megalodon.state import MegalodonDimensions, MegalodonState
from megalodon.ops.backend import backend_for, full_precision

PART = 1 << 15
"""Elements that PyTorch does not divide among threads (at::internal::GRAIN_SIZE)."""
VECTORS = 64
"""Whole vectors of any CPU: rows of a multiple of so many elements leave none to be computed one by one."""


class NormStep:
    """A `TimestepNorm` for one token a row."""

    def __init__(self, norm: TimestepNorm) -> None:
        self.groups, self.eps = norm.num_groups, norm.eps
        self.scale = norm.weight.detach().to(full_precision(norm.weight.dtype)) + 1
        self.bias = norm.bias.detach().to(self.scale.dtype)

    def __call__(self, x: Tensor, share: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Normalise.

        Args:
            x: [M, D].
            share: [M, 1] in the dtype of the statistics; 1 / (tokens seen, this one and the prior's included).
            mean, var: [M, G]; the statistics, moved on in place.

        Returns:
            [M, D] in float32 or better.
        """
        u = x.to(mean.dtype).view(x.shape[0], self.groups, -1)
        m = u.mean(-1)
        s = (u - m[..., None]).square_().mean(-1)  # quicker than var_mean, by far where rows are many
        step = m.sub_(mean)
        mean.addcmul_(share, step)
        var.addcmul_(share * step, step).lerp_(s, share)
        y = (u - mean[..., None]).mul_(torch.rsqrt(var + self.eps)[..., None]).view(x.shape)
        return torch.addcmul(self.bias, y.to(self.scale.dtype), self.scale)


class BlockStep:
    """A block for one token a row; its memory belongs to the caller."""

    @torch.no_grad()
    def __init__(self, block: MemoryBlock, dtype: torch.dtype, packed: bool) -> None:
        """`dtype`: of the activations, which is that of the model unless `packed` (see `Projection`)."""
        attention, feed_forward = block.attention, block.feed_forward
        self.block, self.attention = block, attention
        self.norm = NormStep(block.timestep_norm)
        self.from_input, self.from_memory, self.output, self.wide, self.down = (
            Projection(*layers, packed=dtype if packed else None) for layers in _products(block)
        )
        p, self.q, gamma = block.cema.coefficients()
        self.p = _in_parts(p.to(self.q.dtype))
        self.gamma = _in_parts(gamma.conj())  # times h in parts, summed: the real part of gamma h
        self.omega = block.cema.omega.to(p.dtype).flatten()
        self.memory_scale = effective(block.memory_norm.weight, dtype)
        self.input_scale = effective(feed_forward.norm.weight, dtype)
        bias = feed_forward.norm.bias
        self.input_bias = None if bias is None else bias.detach().to(dtype)
        heads = attention.num_heads
        scale = (attention.qk_weight + 1) / math.sqrt(attention.qk_weight.shape[1] // heads)
        self.qk_scale = scale.view(2, heads, -1)
        self.qk_bias = attention.qk_bias.detach().view(2, heads, -1)

    @property
    def products(self) -> list[Projection]:
        """All products with weights."""
        return [self.from_input, self.from_memory, self.output, self.wide, self.down]

    def average(self, n: Tensor, h: Tensor) -> Tensor:
        """CEMA and its norm: n [M, D] -> [M, D]; h complex [M, D, N] is moved on in place."""
        wide = n.to(self.p.dtype)
        rows = _rows_uncut(h)
        for part in (h,) if h.shape[0] <= rows else h.split(rows):
            part.mul_(self.q)
        parts = _in_parts(h).addcmul_(wide[..., None], self.p)
        m = torch.addcmul((parts * self.gamma).sum(-1), self.omega, wide).to(n.dtype)
        return F.rms_norm(m, m.shape[1:], self.memory_scale, self.block.memory_norm.eps)

    def queries_and_keys(self, z: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """z [M, Z] and turns complex [1 or M, d/2] -> queries and keys, rotated, [M, H, d] each."""
        _, heads, size = self.qk_scale.shape
        z = F.rms_norm(z.view(-1, 1, heads, size), (size,), None, self.attention.eps)
        both = torch.addcmul(self.qk_bias, z, self.qk_scale).to(z.dtype)
        turns = turns.expand(both.shape[0], -1)
        queries, keys = _uncut(_rotated, both, turns).unbind(1)
        return queries, keys

    def values(self, n: Tensor) -> Tensor:
        """[M, D] -> [M, H, e]."""
        (v,) = self.from_input(n)
        return silu(v).view(v.shape[0], self.attention.num_heads, -1)

    def finish(self, x: Tensor, r: Tensor, h: Tensor, o: Tensor) -> Tensor:
        """The rest of the block: x, h [M, D], r [M, V] and what attention found, o [M, H, e] -> [M, D]."""
        (o,) = self.output(silu(r) * o.flatten(1).to(r.dtype))
        feed_forward = self.block.feed_forward
        n = F.layer_norm(x + h + o, x.shape[1:], self.input_scale, self.input_bias, feed_forward.norm.eps)
        up, *gate = self.wide(n)
        hidden = silu(up) * gate[0] if gate else silu(up)
        (out,) = self.down(hidden)
        return x + out if feed_forward.alpha is None else x + out * feed_forward.alpha


def silu(x: Tensor) -> Tensor:
    """`x * sigmoid(x)` of x [M, D], with the same bits whatever M and the row."""
    if x.shape[1] % VECTORS == 0 and x.shape[1] <= PART:
        return _uncut(F.silu, x)
    wide = x.to(full_precision(x.dtype))
    return (wide / torch.neg(wide).exp_().add_(1)).to(x.dtype)


def _rotated(x: Tensor, turns: Tensor) -> Tensor:
    """x [M, 2, H, d] turned by complex [M, d/2]."""
    return ops.rotate(x.flatten(1, 2)[:, None], turns[:, None]).view(x.shape)


def _uncut(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """The function of as many rows at a time as PyTorch gives to one thread."""
    rows = _rows_uncut(tensors[0])
    if tensors[0].shape[0] <= rows:
        return function(*tensors)
    return torch.cat([function(*parts) for parts in zip(*(x.split(rows) for x in tensors), strict=True)])


def _rows_uncut(x: Tensor) -> int:
    rows = x.shape[0]
    return rows if x.numel() <= PART or x.device.type != "cpu" else max(PART * rows // x.numel(), 1)


def _in_parts(z: Tensor) -> Tensor:
    """Complex [..., N] -> real [..., 2 N]: re, im, re, im, ..., in the same memory unless z is conjugated lazily."""
    return torch.view_as_real(z.resolve_conj()).flatten(-2)


class TokenStep:
    """A model's blocks and final norm for one token a row; made anew when a weight has changed."""

    def __init__(self, model: StatefulModel) -> None:
        linear = list(linear_layers(model))
        wide = full_precision(model.dtype)  # for one row, products in float32 are the quickest, bfloat16 weights or not
        packed = all(is_forwarded_as_written(layer, (nn.Linear,)) for layer in linear) and can_pack(linear, wide)
        fused = can_fuse(linear, model.dtype, KERNEL) and has_uniform_eps(model)
        self.packed = packed and not fused
        self.dtype = wide if packed or fused else model.dtype
        self.blocks = [BlockStep(block, self.dtype, self.packed) for block in blocks_of(model)]
        self.final = NormStep(cast(TimestepNorm, model.final_norm))
        sizes = MegalodonDimensions.of(model.config)
        self.fused = FusedStep(self.blocks, self.final, sizes) if fused else None

    @staticmethod
    def of(model: StatefulModel, x: Tensor, state: MegalodonState | None) -> TokenStep | None:
        """The step of the model's weights as they are now, for embeddings x [B, L, D]; None where it is not for them.

        It is for one token of rows that stand at the same place of their chunks and not at the start of a document,
        without gradients, autocast or a compiler at work. After any other pass a generation starts (see `watch`); a
        pass with gradients says that weights are about to change, and memory is needed for other things.
        """
        return _STEPS.while_decoding(model, lambda: _is_next_token(x, state))

    def advance(self, x: Tensor, state: MegalodonState) -> tuple[Tensor, MegalodonState]:
        """Embeddings x [M, D] and the state before them, which `of` has looked at.

        Returns:
            (the final hidden states [M, D], the state after them).
        """
        if self.fused is not None:
            return self.fused.advance(x, state)
        sizes = state.dimensions
        offset = int(state.position[0]) % sizes.chunk_size
        seen = state.position + (sizes.norm_prior_count + 1)
        share = seen[:, None].to(device=x.device, dtype=state.final.mean.dtype).reciprocal()
        place = torch.tensor([offset], device=x.device)
        turns = ops.rotations(place, sizes.head_dim, sizes.rope_base)
        kept, x, layers = x.dtype, x.to(self.dtype), []
        for step, memory in zip(self.blocks, state.layers, strict=True):
            moments, h = Moments(*(value.clone() for value in memory.moments)), memory.cema.clone()
            n = step.norm(x, share, *moments).to(self.dtype)
            m = step.average(n, h)
            z, r, h_proj = step.from_memory(m)
            q, k = step.queries_and_keys(z, turns)
            chunk = memory.chunk.with_token(k.to(kept), step.values(n).to(kept), offset, sizes.chunk_size)
            keys, values = (buffer[:, : offset + 1] for buffer in chunk)
            x = step.finish(x, r, h_proj, ops.causal_attention(q[:, None], keys, values, offset)[:, 0])
            layers.append(LayerState(moments, h, chunk if offset + 1 < sizes.chunk_size else chunk.first(0)))
        final = Moments(*(value.clone() for value in state.final))
        x = self.final(x, share, *final).to(kept)
        return x, MegalodonState(layers, final, state.position + 1, sizes)


def _is_next_token(x: Tensor, state: MegalodonState | None) -> bool:
    """Whether x [B, 1, D] is one token of rows that go on from one place of their chunks, where a step can run."""
    if x.shape[1] != 1 or state is None or torch.is_autocast_enabled(x.device.type):
        return False
    if backend_for(x.device, x.dtype)[0] not in ("blocked", "numba"):
        return False
    positions, chunk = state.position.tolist(), state.dimensions.chunk_size
    return min(positions, default=0) > 0 and len({position % chunk for position in positions}) == 1


_OURS = (MegalodonBlock, TimestepNorm, CEMA, RMSNorm, GatedChunkAttention, FeedForward, LayerNorm)


def _products(block: MemoryBlock) -> Iterator[list[nn.Module]]:
    """The block's linear layers, whatever has taken their place, by what they are applied to."""
    attention, feed_forward = block.attention, block.feed_forward
    yield [attention.v_proj]
    yield [attention.z_proj, attention.r_proj, attention.h_proj]
    yield [attention.o_proj]
    yield [layer for layer in (feed_forward.up_proj, feed_forward.gate_proj) if layer is not None]
    yield [feed_forward.down_proj]


def blocks_of(model: StatefulModel) -> list[MemoryBlock]:
    """The model's blocks, by their type, which a ModuleList does not tell."""
    return cast(list[MemoryBlock], list(model.layers))


def has_uniform_eps(model: StatefulModel) -> bool:
    """Whether each kind of norm has one `eps` in all blocks, as the fused step takes it; users may change one."""
    found = {
        (b.timestep_norm.eps, b.memory_norm.eps, b.attention.eps, b.feed_forward.norm.eps) for b in blocks_of(model)
    }
    return len(found) == 1 and found.pop()[0] == cast(TimestepNorm, model.final_norm).eps


def linear_layers(model: StatefulModel) -> Iterator[nn.Module]:
    """The blocks' linear layers."""
    return (layer for block in blocks_of(model) for layers in _products(block) for layer in layers)


def _bypassed(model: StatefulModel) -> Iterator[nn.Module]:
    """The modules that a step does not call."""
    yield model.final_norm
    for block in blocks_of(model):
        yield from (block, block.timestep_norm, block.cema, block.memory_norm, block.attention)
        yield from (block.feed_forward, block.feed_forward.norm)


def passed_over(model: StatefulModel) -> str | None:
    """The name of a module that a step would have to call and does not; None where it is exact."""
    names = {module: name for name, module in model.named_modules()}
    return next((names[m] for m in _bypassed(model) if m.training or not is_forwarded_as_written(m, _OURS)), None)


def copied_weights(model: StatefulModel, packed: bool) -> list[Tensor]:
    """The weights that a step takes copies of, or makes into something else."""
    weights: list[Tensor] = [weight for module in _bypassed(model) for weight in module.parameters(recurse=False)]
    linear = ((name, weight) for layer in linear_layers(model) for name, weight in layer.named_parameters())
    return weights + [weight for name, weight in linear if packed or name == "bias"]


def _step_of(model: StatefulModel) -> tuple[TokenStep | None, list[Tensor]]:
    if passed_over(model) is not None:
        return None, []
    step = TokenStep(model)
    return step, copied_weights(model, step.packed)


_STEPS: Prepared[StatefulModel, TokenStep | None] = Prepared(_step_of)


def generation_starts(model: StatefulModel) -> None:
    """Before the next token, look at every weight: it may have changed without a trace."""
    _STEPS.start(model)
