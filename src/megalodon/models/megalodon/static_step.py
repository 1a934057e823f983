"""One token a row with every tensor at a fixed address, wherever each row stands in its chunk: for CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megalodon import ops
from megalodon.models.layers.memory_block import LayerState, MemoryBlock
from megalodon.models.layers.open_chunk import OpenChunk
from megalodon.models.layers.timestep_norm import Moments, TimestepNorm
from megalodon.models.layers.watch import Watch
from megalodon.models.megalodon.state import MegalodonState
from megalodon.models.megalodon.token_step import passed_over


class _Norm:
    """A TimestepNorm and its moments, float64 [B, G]."""

    def __init__(self, module: TimestepNorm, moments: Moments, position: Tensor) -> None:
        self.module, self.prior = module, module.prior(position.device)
        fresh = (position == 0)[:, None]
        self.mean, self.var = (
            torch.where(fresh, new, old.to(new.dtype))
            for new, old in zip((self.prior.mean, self.prior.var), moments, strict=True)
        )

    def take_weights(self) -> None:
        """What was made of the module's weights, made of them as they are now, where it stands."""
        prior = self.module.prior(self.mean.device)
        self.prior.mean.copy_(prior.mean)
        self.prior.var.copy_(prior.var)

    def step(self, x: Tensor, position: Tensor) -> Tensor:
        module = self.module
        count = position + module.prior_count
        y, _, mean, var = ops.timestep_norm(
            x,
            module.weight,
            module.bias,
            module.num_groups,
            count,
            self.mean,
            self.var,
            eps=module.eps,
            prior=self.prior,
        )
        self.mean.copy_(mean)
        self.var.copy_(var)
        return y


class _Layer:
    """A block, its coefficients, and its memory; keys and values in buffers of so many places."""

    def __init__(self, block: MemoryBlock, memory: LayerState, position: Tensor, places: int) -> None:
        self.block = block
        self.coefficients: tuple[Tensor, Tensor, Tensor] = block.cema.coefficients()
        self.norm = _Norm(block.timestep_norm, memory.moments, position)
        self.h = torch.where((position == 0)[:, None, None], 0, memory.cema)
        self.keys, self.values = (x.new_zeros(x.shape[0], places, *x.shape[2:]) for x in memory.chunk)
        for buffer, old in zip((self.keys, self.values), memory.chunk, strict=True):
            width = min(old.shape[1], places)
            buffer[:, :width] = old[:, :width]

    def take_weights(self) -> None:
        """As `_Norm.take_weights`."""
        self.norm.take_weights()
        for mine, now in zip(self.coefficients, self.block.cema.coefficients(), strict=True):
            mine.copy_(now)

    def step(self, x: Tensor, turns: Tensor, position: Tensor, place: Tensor) -> Tensor:
        block, attention = self.block, self.block.attention
        n = self.norm.step(x, position)
        m, h = ops.cema(n, *self.coefficients, block.cema.omega, self.h)
        self.h.copy_(h)
        m = block.memory_norm(m)
        q, k = attention.queries(m, turns)
        v = F.silu(attention.v_proj(n)).unflatten(-1, (attention.num_heads, -1))
        rows = torch.arange(len(place), device=place.device)
        self.keys.index_put_((rows, place), k[:, 0].to(self.keys.dtype))
        self.values.index_put_((rows, place), v[:, 0].to(self.values.dtype))
        o = ops.causal_attention(q, self.keys, self.values, place)
        branch = attention.h_proj(m) + attention.o_proj(o.flatten(-2) * F.silu(attention.r_proj(m)))
        return x + block.feed_forward(x + branch)


class StaticStep:
    """The model's step for a fixed batch; the caller may capture `advance`.

    Attributes:
        tokens: int64 [B]; what to read next.
        logits: float32 [B, V]; what follows.
    """

    def __init__(self, model: Any, state: MegalodonState, tokens: int | None, compiled: bool) -> None:
        """
        Args:
            model: a MegalodonForCausalLM in evaluation mode. state: where the sequences stand; it is copied.
            tokens: how many will be read at most; None: any number. compiled: torch.compile the step of a layer.

        Raises:
            ValueError: a module is not as written, so that a step would not do what it does.
        """
        if name := passed_over(model.model):
            raise ValueError(
                f"{name} has hooks, a forward of its own or is in training mode: static decoding would pass it over"
            )
        self.model, self._chunk, self._sizes = model, model.config.chunk_size, state.dimensions
        self._step_layer = torch.compile(_Layer.step, dynamic=False) if compiled else _Layer.step
        self._position = state.position.to(model.device, copy=True)
        self.tokens = torch.zeros_like(self._position)
        filled = int((state.position % self._chunk).max()) if len(state.position) else 0
        places = self._chunk if tokens is None else min(filled + tokens, self._chunk)
        pairs = zip(model.model.layers, state.layers, strict=True)
        self._layers = [_Layer(block, memory, self._position, places) for block, memory in pairs]
        self._final = _Norm(model.model.final_norm, state.final, self._position)
        self.logits = torch.empty(len(self._position), model.vocab_size, device=model.device)
        self._watch = self._watched()

    def is_current(self) -> bool:
        """Whether the model's weights are those that the step was made of."""
        return self._watch.unchanged()

    def take_weights(self) -> None:
        """Make what was made of weights anew, at the same addresses."""
        self._final.take_weights()
        for layer in self._layers:
            layer.take_weights()
        self._watch = self._watched()

    def _watched(self) -> Watch:
        copied = [weight for layer in self._layers for weight in layer.block.cema.parameters()]
        norms = [self._final, *(layer.norm for layer in self._layers)]
        return Watch(self.model, copied + [weight for norm in norms for weight in norm.module.parameters()])

    @property
    def changed(self) -> list[Tensor]:
        """What a step changes and whoever warms it up must put back.

        Keys and values need not be: every step writes to the same free place of each row until the position moves on,
        and the first real step writes there too.
        """
        norms = [self._final, *(layer.norm for layer in self._layers)]
        return [self._position, *(layer.h for layer in self._layers), *(t for n in norms for t in (n.mean, n.var))]

    @property
    def state(self) -> MegalodonState:
        """Where the sequences stand now: a copy."""
        position = self._position.to("cpu", copy=True)  # the next step moves it on
        filled = self._position % self._chunk
        width = int(filled.max()) if len(position) else 0
        free = (torch.arange(width, device=filled.device) >= filled[:, None])[..., None, None]
        layers = [
            LayerState(
                Moments(layer.norm.mean.clone(), layer.norm.var.clone()),
                layer.h.clone(),
                OpenChunk(layer.keys[:, :width].masked_fill(free, 0), layer.values[:, :width].masked_fill(free, 0)),
            )
            for layer in self._layers
        ]
        final = Moments(self._final.mean.clone(), self._final.var.clone())
        return MegalodonState(layers, final, position, self._sizes)

    def advance(self) -> None:
        """Read `tokens`; `logits` are overwritten."""
        inner, config = self.model.model, self.model.config
        place = self._position % self._chunk
        x = inner.embed_tokens(self.tokens)[:, None] * inner.embedding_scale
        turns = ops.rotations(place[:, None], config.head_dim, config.rope_base)
        for layer in self._layers:
            x = self._step_layer(layer, x, turns, self._position, place)
        x = self._final.step(x, self._position)
        self.logits.copy_(self.model.lm_head(x)[:, 0])
        self._position += 1
