"""Decoding with every tensor at a fixed address: one step is one CUDA graph, whatever the position of each sequence.

`Session` is for one sequence that reads and writes; this is the inner loop of many tokens for a fixed batch. Where each
row stands in its chunk is a tensor on the device, so the captured step is right at every position and never captured
again. On a CPU the same step runs without a graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon.models import CausalLM, State


class StaticDecoder:
    """A fixed batch of sequences, one token at a time.

    Memory: for Megalodon keys and values of a whole chunk for each row, [B, C, H, d] and [B, C, H, e] a layer, or of as
    much of it as `tokens` will fill.
    """

    def __init__(self, model: CausalLM, state: State, tokens: int | None = None, compiled: bool = False) -> None:
        """
        Args:
            model: in evaluation mode. Weights that change later count from the next step on (see
                `models.layers.watch`; on a GPU, a write through `.data` to a moving average's coefficients leaves no
                trace that a step would see).
            state: where the sequences stand; it is copied. Rows may stand at different positions.
            tokens: how many will be read at most. None: any number.
            compiled: torch.compile the step of a layer, which fuses what stands between products and kernels.

        Raises:
            ValueError: the model's architecture has no such step, it is in training mode, the state belongs to another
                model or device, `tokens` is less than one, or a module is not as written, so that a step would not
                do what it does.
        """
        if model.static_step_class is None:
            raise ValueError(
                f"model: a {model.config.model_type} model has no step at fixed addresses; call it instead"
            )
        if model.training:
            raise ValueError("model is in training mode: call model.eval() first")
        state.dimensions.check(model.model.dimensions)
        if state.device != model.device:
            raise ValueError(f"state is on {state.device}: the model is on {model.device} (use .to)")
        if tokens is not None and tokens < 1:
            raise ValueError(f"tokens={tokens}: it must be at least 1")
        self._left = tokens
        self._graph: torch.cuda.CUDAGraph | None = None
        with torch.inference_mode():
            self._step = model.static_step_class(model, state, tokens, compiled)
            if model.device.type == "cuda":
                self._capture()

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """Read one token a row, int64 [B]; logits float32 [B, V] for the next, overwritten by the next step.

        Raises:
            ValueError: `tokens` has another shape, or as many as were announced have been read.
        """
        if tokens.shape != self._step.tokens.shape:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}: it must be {tuple(self._step.tokens.shape)}")
        if self._left is not None:
            if self._left == 0:
                raise ValueError("all tokens that the decoder was made for (its argument tokens) have been read")
            self._left -= 1
        self._step.tokens.copy_(tokens)
        if not self._step.is_current():
            self._step.take_weights()
            if self._graph is not None:  # its addresses may be another model's by now
                self._capture()
        if self._graph is None:
            self._step.advance()
        else:
            self._graph.replay()
        logits: Tensor = self._step.logits
        return logits

    @property
    def state(self) -> State:
        """Where the sequences stand now: a copy."""
        with torch.inference_mode():
            state: State = self._step.state
        return state

    def _capture(self) -> None:
        """Warm up on a side stream, which compiles and caches; capture."""
        tensors = self._step.changed
        kept = [tensor.clone() for tensor in tensors]

        def put_back() -> None:
            for tensor, old in zip(tensors, kept, strict=True):
                tensor.copy_(old)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._step.advance()
                put_back()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step.advance()
        put_back()
