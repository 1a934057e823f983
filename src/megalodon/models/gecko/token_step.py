"""One token of each of several sequences through all of Gecko's blocks in one compiled call: what decoding runs.

The kernel reads the layers' own weights where they lie. What is small and made from weights (CEMA's coefficients,
scales of norms) is made once and kept while the weights stand still. A module whose forward pass is not ours alone
(hooks, a subclass, a replaced `forward`, weights under a transform) is never bypassed: `TokenStep.of` says None, and
the caller takes the long way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from megalodon import ops
from megalodon.models.causal_lm import StatefulModel
from megalodon.models.gecko.block import GeckoBlock
from megalodon.models.gecko.cema import GeckoCEMA
from megalodon.models.gecko.state import GeckoDimensions, GeckoState
from megalodon.models.layers.feed_forward import FeedForward
from megalodon.models.layers.few_rows import can_fuse
from megalodon.models.layers.memory_block import LayerState
from megalodon.models.layers.norms import LayerNorm, RMSNorm, effective
from megalodon.models.layers.step_tables import ATTENTION, FEED_FORWARD, StepTables
from megalodon.models.layers.timestep_decay_norm import DecayedMoments, TimestepDecayNorm
from megalodon.models.layers.watch import Prepared, is_forwarded_as_written
from megalodon.models.layers.window import Window
from megalodon.models.layers.window_attention import GatedWindowAttention
from megalodon.ops.backend import backend_for
from megalodon.ops.compiled import tables
from megalodon.ops.compiled.tables import GeckoMemory

KERNEL = "gecko_step.blocks"


class TokenStep:
    """A model's blocks and final norm for one token a row; made anew when a weight has changed."""

    @torch.no_grad()
    def __init__(self, model: StatefulModel) -> None:
        """Of what `_step_of` has looked at."""
        config, blocks = model.config, list(_blocks(model))
        self.sizes = GeckoDimensions.of(config)
        places, widths = torch.arange(config.chunk_size), (config.head_dim, config.rope_base)
        turns = [ops.rotations(place, *widths) for place in (places, places + config.chunk_size)]
        own, before = (torch.view_as_real(turn).contiguous() for turn in turns)
        eps, self._betas = np.array([config.norm_eps] * 4), np.array([config.norm_beta1, config.norm_beta2])
        self._kept = own, before, eps
        self._tables = StepTables(
            KERNEL,
            len(blocks),
            _linear_layers(model),
            (config.model_dim, config.z_dim, config.value_dim, config.ffn_hidden_dim, config.num_heads),
            components=config.cema_ndim,
            groups=config.norm_num_groups,
            turns=own.data_ptr(),
            turns_before=before.data_ptr(),
            rotated_heads=config.rotated_heads,
            eps=eps.ctypes.data,
            betas=self._betas.ctypes.data,
            two_hop=int(config.two_hop_residual),
        )
        for number, block in enumerate(blocks):
            self._write_block(number, block)
        self._write_norm(-1, cast(TimestepDecayNorm, model.final_norm))

    def _write_block(self, number: int, block: GeckoBlock) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        p, q, gamma = block.cema.coefficients()
        self._tables.write_linear(number, attention, feed_forward)
        self._write_norm(number, block.timestep_norm)
        self._tables.write(
            number,
            q=torch.view_as_real(q),
            p=p,
            gamma=torch.view_as_real(gamma),
            omega=block.cema.omega,
            memory_scale=effective(block.memory_norm.weight, torch.float32),
            qk_scale=(attention.qk_weight.float() + 1) / math.sqrt(self.sizes.head_dim),
            qk_bias=attention.qk_bias,
            ffn_scale=effective(feed_forward.norm.weight, torch.float32),
            ffn_bias=feed_forward.norm.bias,
            alpha=feed_forward.alpha,
        )

    def _write_norm(self, number: int, norm: TimestepDecayNorm) -> None:
        self._tables.write(number, norm_scale=norm.weight.float() + 1, norm_bias=norm.bias)

    @staticmethod
    def of(model: StatefulModel, x: Tensor, state: GeckoState | None) -> TokenStep | None:
        """The step of the model's weights as they are now, for embeddings x [B, L, D]; None where it is not for them.

        It is for one token of rows that stand at the same place of their chunks, all of them in their first, in their
        second or in a later one and not at the start of a document, without gradients, autocast or a compiler at work,
        on a CPU that has kernels. After any other pass a generation starts (see `watch`); a pass with gradients says
        that weights are about to change, and memory is needed for other things.
        """
        return _STEPS.while_decoding(model, lambda: _is_next_token(x, state))

    def advance(self, x: Tensor, state: GeckoState) -> tuple[Tensor, GeckoState]:
        """Embeddings x [M, D] and the state before them, which `of` has looked at.

        Returns:
            (the final hidden states [M, D] in the dtype of x, the state after them).
        """
        sizes, rows = self.sizes, len(x)
        position = int(state.position[0])
        offset, chunk = position % sizes.chunk_size, position // sizes.chunk_size
        moments = torch.empty(2 * sizes.num_layers + 2, rows, sizes.norm_num_groups, dtype=torch.float64).unbind()
        h = torch.empty(sizes.num_layers, rows, sizes.model_dim, sizes.cema_ndim, dtype=torch.complex64).unbind()
        table, layers, read = [], [], []
        count = state.final.count + 1
        for memory, mean, var, after in zip(state.layers, moments[::2], moments[1::2], h, strict=False):
            window: Window = memory.chunk
            opened = window.open.with_room(x, x, offset, sizes.chunk_size)
            before = [_of_dtype(part, x.dtype) for part in window.before]
            sources = [*_wide(memory.moments), memory.cema.resolve_conj().contiguous(), window.memory.contiguous()]
            table.append(_memory_row(sources, (mean, var, after), list(opened), before))
            read.append((sources, before))  # alive until the kernel has read them
            layers.append(LayerState(DecayedMoments(count, mean, var), after, window._replace(open=opened)))
        final = DecayedMoments(count, *moments[-2:])
        sources = list(_wide(state.final))
        read.append((sources, []))
        row = [value.data_ptr() for value in (*sources, *final[1:])]
        table.append(row + [0] * (len(GeckoMemory) - len(row)))
        out = self._run(x, np.array(table), offset, chunk, count)
        if offset + 1 == sizes.chunk_size:
            layers = [layer._replace(chunk=_turned_over(layer.chunk, chunk)) for layer in layers]
        return out, GeckoState(layers, final, state.position + 1, sizes)

    def _run(self, x: Tensor, memory: np.ndarray, offset: int, chunk: int, count: Tensor) -> Tensor:
        rows, before = len(x), self.sizes.chunk_size if chunk else 0
        wide = x.to(torch.float32, copy=True).contiguous()
        out = torch.empty_like(wide)
        offsets, slots = np.full(rows, offset), np.arange(rows)
        corrections = -1 / np.expm1(count.numpy()[:, None] * np.log(self._betas))
        capacity = -(-(before + offset + 1) // 16) * 16
        scratch = torch.empty(tables.gecko_scratch_size(rows, *self._tables.widths, capacity))
        self._tables.run(
            rows,
            capacity=capacity,
            memory=memory.ctypes.data,
            key_kind=tables.KINDS[x.dtype],
            x=wide.data_ptr(),
            out=out.data_ptr(),
            offsets=offsets.ctypes.data,
            slots=slots.ctypes.data,
            scratch=scratch.data_ptr(),
            before=before,
            corrections=corrections.ctypes.data,
            reads=int(chunk >= 2),
        )
        return out.to(x.dtype)


def _wide(moments: DecayedMoments) -> tuple[Tensor, Tensor]:
    return moments.mean.double().contiguous(), moments.var.double().contiguous()


def _of_dtype(keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values as the kernel reads them: in the activations' dtype, a head's numbers side by side."""
    keys = keys.to(dtype)
    return keys if keys.stride(-1) == 1 else keys.contiguous()


def _memory_row(sources: list[Tensor], after: tuple[Tensor, ...], opened: list[Tensor], before: list[Tensor]) -> list:
    """A block's row of the table: `sources` are mean, var, h and the memory; `after` is what is written."""
    mean, var, h, matrix = sources
    row = [mean.data_ptr(), var.data_ptr(), after[0].data_ptr(), after[1].data_ptr(), h.data_ptr(), after[2].data_ptr()]
    for keys, values in (opened, before):
        row += [keys.data_ptr(), values.data_ptr(), *keys.stride()[:3], *values.stride()[:3]]
    return [*row, matrix.data_ptr()]


def _turned_over(window: Window, chunk: int) -> Window:
    """The window once the open chunk, number `chunk`, is complete: it becomes the one before, which is absorbed."""
    if chunk:
        width = window.before.keys.shape[-1] // 2
        keys, values = window.before.keys[..., width:], window.before.values
        parts = (x.split(1) for x in (keys, values, window.memory, window.log_mass))
        # row by row: products of several could add up in another order, and a row's bits are its own
        rows = [ops.absorb(k[None], v[None], memory, mass, [1]) for k, v, memory, mass in zip(*parts, strict=True)]
        memory, mass = (torch.cat(column) for column in zip(*rows, strict=True))
        window = window._replace(memory=memory, log_mass=mass)
    return window._replace(open=window.open.first(0), before=window.open, bos_before=window.bos_open)


_OURS = (GeckoBlock, TimestepDecayNorm, GeckoCEMA, RMSNorm, GatedWindowAttention, FeedForward, LayerNorm)


def _blocks(model: StatefulModel) -> Iterator[GeckoBlock]:
    return iter(cast(Any, model.layers))


def _linear_layers(model: StatefulModel) -> Iterator[nn.Module]:
    for block in _blocks(model):
        yield from (getattr(block.attention, name) for name in ATTENTION.values())
        layers = (getattr(block.feed_forward, name) for name in FEED_FORWARD.values())
        yield from (layer for layer in layers if layer is not None)


def _bypassed(model: StatefulModel) -> Iterator[nn.Module]:
    """The modules that a step does not call."""
    yield model.final_norm
    for block in _blocks(model):
        yield from (block, block.timestep_norm, block.cema, block.memory_norm, block.attention)
        yield from (block.feed_forward, block.feed_forward.norm)


def _is_next_token(x: Tensor, state: GeckoState | None) -> bool:
    """Whether x [B, 1, D] is one token of rows at one place, with as much before them, where kernels run."""
    if x.shape[1] != 1 or state is None or torch.is_autocast_enabled(x.device.type) or x.dtype not in tables.KINDS:
        return False
    if backend_for(x.device, x.dtype)[0] != "numba":
        return False
    positions, size = state.position.tolist(), state.dimensions.chunk_size
    places = {(position % size, min(position // size, 2)) for position in positions}
    return min(positions, default=0) > 0 and len(places) == 1


def _copied_weights(model: StatefulModel) -> list[Tensor]:
    """The weights that a step takes copies of, or makes into something else."""
    weights: list[Tensor] = [weight for module in _bypassed(model) for weight in module.parameters(recurse=False)]
    return weights + [bias for layer in _linear_layers(model) if (bias := cast(Any, layer).bias) is not None]


def _step_of(model: StatefulModel) -> tuple[TokenStep | None, list[Tensor]]:
    ours_alone = all(not m.training and is_forwarded_as_written(m, _OURS) for m in _bypassed(model))
    grouped = model.config.layernorm_num_groups > 1 or model.config.multi_segments
    if not ours_alone or grouped or not can_fuse(_linear_layers(model), model.dtype, KERNEL):
        return None, []
    return TokenStep(model), _copied_weights(model)


_STEPS: Prepared[StatefulModel, TokenStep | None] = Prepared(_step_of)


def generation_starts(model: StatefulModel) -> None:
    """Before the next token, look at every weight: it may have changed without a trace."""
    _STEPS.start(model)
