"""A recurrence run span by span: only the states between spans are kept, and backward computes each span again.

What a chunked form makes inside a chunk (decays, scores, products) is many times the size of its input. Here it lives
for one span of tokens at a time, in both passes, whatever the length of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SpanFunction = Callable[[Sequence[Tensor | None], Tensor], tuple[Tensor, Tensor]]
"""(the span of each sequence [B, l, ...], the state before it) -> (output [B, l, ...], the state after it)."""


def _cut(sequences: Sequence[Tensor | None], start: int, size: int) -> list[Tensor | None]:
    return [None if s is None else s[:, start : start + size] for s in sequences]


class _Spans(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: SpanFunction, size: int, state: Tensor, *sequences: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        length = next(s for s in sequences if s is not None).shape[1]
        outputs, entering = [], []
        for start in range(0, length, size):
            entering.append(state)
            output, state = run(_cut(sequences, start, size), state)
            outputs.append(output)
        ctx.run, ctx.size, ctx.spans = run, size, len(entering)
        ctx.save_for_backward(*entering, *sequences)
        ctx.set_materialize_grads(False)
        return torch.cat(outputs, dim=1), state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor | None, d_state: Tensor | None):
        entering, sequences = ctx.saved_tensors[: ctx.spans], ctx.saved_tensors[ctx.spans :]
        wanted = ctx.needs_input_grad[3:]
        totals = [torch.zeros_like(s) if need else None for s, need in zip(sequences, wanted, strict=True)]
        for i in reversed(range(ctx.spans)):
            start = i * ctx.size
            with torch.enable_grad():
                state = entering[i].detach().requires_grad_()
                span = _cut(sequences, start, ctx.size)
                span = [
                    s if s is None or not need else s.detach().requires_grad_()
                    for s, need in zip(span, wanted, strict=True)
                ]
                results = ctx.run(span, state)
            d_span = None if d_output is None else d_output[:, start : start + ctx.size]
            pairs = [(r, d) for r, d in zip(results, (d_span, d_state), strict=True) if d is not None]
            inputs = [s for s, need in zip(span, wanted, strict=True) if need] + [state]
            found = list(
                torch.autograd.grad([r for r, _ in pairs], inputs, [d for _, d in pairs], allow_unused=True)
                if pairs
                else [None] * len(inputs)
            )
            d_state = found.pop()
            for total in totals:
                if total is not None and (gradient := found.pop(0)) is not None:
                    total[:, start : start + ctx.size] = gradient
        return None, None, d_state if ctx.needs_input_grad[2] else None, *totals


def over_spans(
    run: SpanFunction, size: int, state: Tensor, sequences: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """The recurrence over whole sequences, in spans of `size` tokens.

    Args:
        run: one span. All tensors that want gradients must come through its arguments.
        size: tokens in a span.
        state: the state before the first token.
        sequences: each [B, L, ...] with one L, or None, which is passed on.

    Returns:
        (output [B, L, ...], the state after the last token).
    """
    return _Spans.apply(run, size, state, *sequences)
