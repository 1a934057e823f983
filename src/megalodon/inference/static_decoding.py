"""Decoding with every tensor at a fixed address: one step is one CUDA graph, whatever the position of each sequence.

`Session` is for one sequence that reads and writes; this is the inner loop of many tokens for a fixed batch. Where each
row stands in its chunk is a tensor on the device, so the captured step is right at every position and never captured
again. On a CPU the same step runs without a graph.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from megalodon import ops
from megalodon.model import MegalodonForCausalLM, MegalodonState
from megalodon.model.block import MegalodonBlock
from megalodon.model.state import Dimensions, LayerState, OpenChunk
from megalodon.model.timestep_norm import Moments, TimestepNorm
from megalodon.model.token_step import passed_over
from megalodon.model.watch import Watch


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

    def __init__(self, block: MegalodonBlock, memory: LayerState, position: Tensor, places: int) -> None:
        self.block, self.coefficients = block, block.cema.coefficients()
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
        q, k = attention.queries_and_keys(m, turns)
        v = F.silu(attention.v_proj(n)).unflatten(-1, (attention.num_heads, -1))
        rows = torch.arange(len(place), device=place.device)
        self.keys.index_put_((rows, place), k[:, 0].to(self.keys.dtype))
        self.values.index_put_((rows, place), v[:, 0].to(self.values.dtype))
        o = ops.causal_attention(q, self.keys, self.values, place)
        branch = attention.h_proj(m) + attention.o_proj(o.flatten(-2) * F.silu(attention.r_proj(m)))
        return x + block.feed_forward(x + branch)


class StaticDecoder:
    """A fixed batch of sequences, one token at a time.

    Memory: keys and values of a whole chunk for each row, [B, C, H, d] and [B, C, H, e] a layer, or of as much of it as
    `tokens` will fill.
    """

    def __init__(
        self, model: MegalodonForCausalLM, state: MegalodonState, tokens: int | None = None, compiled: bool = False
    ) -> None:
        """
        Args:
            model: in evaluation mode. Weights that change later count from the next step on (see `model.watch`; on a
                GPU, a write through `.data` to a moving average's coefficients leaves no trace that a step would see).
            state: where the sequences stand; it is copied. Rows may stand at different positions.
            tokens: how many will be read at most. None: any number.
            compiled: torch.compile the step of a layer, which fuses what stands between products and kernels.

        Raises:
            ValueError: the model is in training mode, the state belongs to another model or device, or `tokens` is
                less than one; or a module is not as written, so that a step would not do what it does.
        """
        if model.training:
            raise ValueError("model is in training mode: call model.eval() first")
        if name := passed_over(model.model):
            raise ValueError(
                f"{name} has hooks, a forward of its own or is in training mode: static decoding would pass it over"
            )
        state.dimensions.check(Dimensions.of(model.config))
        if state.device != model.device:
            raise ValueError(f"state is on {state.device}: the model is on {model.device} (use .to)")
        if tokens is not None and tokens < 1:
            raise ValueError(f"tokens={tokens}: it must be at least 1")
        self.model, self._chunk, self._left = model, model.config.chunk_size, tokens
        self._graph: torch.cuda.CUDAGraph | None = None
        self._step_layer = torch.compile(_Layer.step, dynamic=False) if compiled else _Layer.step
        with torch.inference_mode():
            self._position = state.position.to(model.device, copy=True)
            self._tokens = torch.zeros_like(self._position)
            filled = int((state.position % self._chunk).max()) if len(state.position) else 0
            places = self._chunk if tokens is None else min(filled + tokens, self._chunk)
            pairs = zip(model.model.layers, state.layers, strict=True)
            self._layers = [_Layer(block, memory, self._position, places) for block, memory in pairs]
            self._final = _Norm(model.model.final_norm, state.final, self._position)
            self._logits = torch.empty(len(self._position), model.vocab_size, device=model.device)
            self._watch = self._watched()
            if model.device.type == "cuda":
                self._capture()

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Read one token a row, int64 [B]; logits float32 [B, V] for the next, overwritten by the next step.

        Raises:
            ValueError: `tokens` has another shape, or as many as were announced have been read.
        """
        if tokens.shape != self._tokens.shape:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}: it must be {tuple(self._tokens.shape)}")
        if self._left is not None:
            if self._left == 0:
                raise ValueError("all tokens that the decoder was made for (its argument tokens) have been read")
            self._left -= 1
        self._tokens.copy_(tokens)
        if not self._watch.unchanged():
            self._take_weights()
        if self._graph is None:
            self._advance()
        else:
            self._graph.replay()
        return self._logits

    @property
    def state(self) -> MegalodonState:
        """Where the sequences stand now: a copy."""
        with torch.inference_mode():
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
        return MegalodonState(layers, final, position, Dimensions.of(self.model.config))

    def _watched(self) -> Watch:
        copied = [weight for layer in self._layers for weight in layer.block.cema.parameters()]
        norms = [self._final, *(layer.norm for layer in self._layers)]
        return Watch(self.model, copied + [weight for norm in norms for weight in norm.module.parameters()])

    def _take_weights(self) -> None:
        self._final.take_weights()
        for layer in self._layers:
            layer.take_weights()
        self._watch = self._watched()
        if self._graph is not None:  # its addresses may be another model's by now
            self._capture()

    def _advance(self) -> None:
        inner, config = self.model.model, self.model.config
        place = self._position % self._chunk
        x = inner.embed_tokens(self._tokens)[:, None] * inner.embedding_scale
        turns = ops.rotations(place[:, None], config.head_dim, config.rope_base)
        for layer in self._layers:
            x = self._step_layer(layer, x, turns, self._position, place)
        x = self._final.step(x, self._position)
        self._logits.copy_(self.model.lm_head(x)[:, 0])
        self._position += 1

    def _capture(self) -> None:
        """Warm up on a side stream, which compiles and caches; capture.

        Keys and values need not be put back: every step writes to the same free place of each row until the position
        moves on, and the first real step writes there too.
        """
        norms = [self._final, *(layer.norm for layer in self._layers)]
        tensors = [self._position, *(layer.h for layer in self._layers), *(t for n in norms for t in (n.mean, n.var))]
        kept = [tensor.clone() for tensor in tensors]

        def put_back() -> None:
            for tensor, old in zip(tensors, kept, strict=True):
                tensor.copy_(old)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._advance()
                put_back()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._advance()
        put_back()
