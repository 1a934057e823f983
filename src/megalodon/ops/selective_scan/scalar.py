"""Mamba-2's scan, one decay per head, in chunks: masked matrix products inside a chunk, a state between chunks.

Inside a chunk of T tokens, token s reaches token t with weight (c_t . b_s) exp(l_{s+1} + .. + l_t), l the logs of the
decays. The sums are differences of one running sum, which is taken in float64: a strong decay early in a chunk costs
the later ones nothing. Where s > t, or another document begins between them, the weight is masked before it is
exponentiated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megalodon.ops.backend import accumulator_dtype

CHUNK = 64
"""Tokens in a chunk: the products inside grow with it, the steps between chunks shrink with it."""

SPAN = 16 * CHUNK
"""Tokens of a row whose tables live at once."""


class _Span(NamedTuple):
    """A span of n chunks of T tokens, and what decays in it. R is the rows of a group's heads, H / G times P.

    Attributes:
        x: [B, n, T, H, P]; b, c: [B, n, G, T, N].
        between: [B, n, H, T, T]; how much of what token s wrote is left at token t, 0 where it is not seen.
        entering, leaving: [B, n, T, H, 1]; how much is left of the chunk's first state at a token, and of a token's
            own at the chunk's end. decay: [B, n, H, 1, 1]; of the first state at the end.
    """

    x: Tensor
    b: Tensor
    c: Tensor
    between: Tensor
    entering: Tensor
    leaving: Tensor
    decay: Tensor

    @staticmethod
    def of(sequences: Sequence[Tensor | None]) -> _Span:
        """x [B, l, H, P], log decays [B, l, H], b, c [B, l, G, N], starts bool [B, l] or None."""
        x, log_decay, b, c, starts = sequences
        assert x is not None and log_decay is not None and b is not None and c is not None
        size = min(CHUNK, x.shape[1])
        fill = -x.shape[1] % size  # tokens that write nothing and decay nothing
        if fill:
            x, log_decay, b, c = (F.pad(v, (0, 0) * (v.ndim - 2) + (0, fill)) for v in (x, log_decay, b, c))
            starts = None if starts is None else F.pad(starts, (0, fill))
        x, log_decay, b, c = (v.unflatten(1, (-1, size)) for v in (x, log_decay, b, c))
        sums = log_decay.to(accumulator_dtype(x.device)).cumsum(2)
        by_head = sums.transpose(2, 3)
        visible = torch.ones(size, size, dtype=torch.bool, device=x.device).tril()
        number = None
        if starts is not None:
            number = starts.unflatten(1, (-1, size)).cumsum(-1)  # of the token's document inside its chunk
            visible = visible & (number[:, :, None, :, None] == number[:, :, None, None])
        between = (by_head[..., :, None] - by_head[..., None, :]).to(x.dtype).masked_fill_(~visible, -torch.inf).exp_()
        entering, leaving = sums.to(x.dtype).exp(), (sums[:, :, -1:] - sums).to(x.dtype).exp()
        decay = entering[:, :, -1]
        if number is not None:
            entering = entering * (number == 0)[..., None]
            leaving = leaving * (number == number[..., -1:])[..., None]
            decay = decay * (number[..., -1:] == 0)
        b, c = b.transpose(2, 3), c.transpose(2, 3)
        return _Span(x, b, c, between, entering[..., None], leaving[..., None], decay[..., None, None])

    def rows(self, value: Tensor) -> Tensor:
        """[B, n, T, H, P] -> [B, n, G, T, R]."""
        return value.flatten(-2).unflatten(-1, (self.b.shape[2], -1)).transpose(2, 3)

    def tokens(self, value: Tensor) -> Tensor:
        """The way back."""
        return value.transpose(2, 3).flatten(-2).unflatten(-1, self.x.shape[-2:])

    def grouped(self, states: Tensor) -> Tensor:
        """[B, n, H, P, N] -> [B, n, G, R, N]."""
        return states.flatten(2, 3).unflatten(2, (self.b.shape[2], -1))

    def by_group(self, table: Tensor) -> Tensor:
        """[B, n, H, T, T] -> [B, n, G, H / G, T, T]."""
        return table.unflatten(2, (self.b.shape[2], -1))

    def weights(self) -> Tensor:
        """[B, n, H, T, T]: how much of what token s wrote token t reads."""
        return ((self.c @ self.b.mT).unsqueeze(3) * self.by_group(self.between)).flatten(2, 3)

    def states(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """(the states before the chunks [B, n, H, P, N], that after the last)."""
        added = (self.rows(self.x * self.leaving).mT @ self.b).view(*self.decay.shape[:3], *state.shape[2:])
        before = torch.empty_like(added)
        for i in range(added.shape[1]):
            before[:, i] = state
            state = torch.addcmul(added[:, i], self.decay[:, i], state)
        return before, state

    def run(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """(y [B, n T, H, P], the state after it)."""
        before, state = self.states(state)
        y = self.tokens(self.c @ self.grouped(before).mT) * self.entering
        y += (self.weights() @ self.x.transpose(2, 3)).transpose(2, 3)
        return y.flatten(1, 2), state

    def backward(self, state: Tensor, dy: Tensor, d_state: Tensor) -> tuple[list[Tensor], Tensor]:
        """(gradients of x, log decays, b, c, of that of the state before) from those of y and of the state after."""
        before, _ = self.states(state)
        dy = dy.unflatten(1, self.x.shape[1:3])
        d_rows, kept = self.rows(dy * self.entering), self.rows(self.x * self.leaving)
        d_before = (d_rows.mT @ self.c).view_as(before)
        d_added = torch.empty_like(before)
        for i in reversed(range(before.shape[1])):
            d_added[:, i] = d_state
            d_state = torch.addcmul(d_before[:, i], self.decay[:, i], d_state)
        d_decay = (d_added * before).sum((-1, -2)) * self.decay[..., 0, 0]  # of the logarithm, as all below
        dc, db = d_rows @ self.grouped(before), kept @ self.grouped(d_added)

        dx = self.tokens(self.b @ self.grouped(d_added).mT) * self.leaving
        d_leaving = (dx * self.x).sum(-1)
        d_entering = (self.tokens(self.c @ self.grouped(before).mT) * self.entering * dy).sum(-1)
        weights, d_heads = self.weights(), dy.transpose(2, 3)
        d_weights = d_heads @ self.x.permute(0, 1, 3, 4, 2)
        dx += (weights.mT @ d_heads).transpose(2, 3)
        d_between = weights.mul_(d_weights)
        d_scores = self.by_group(d_weights.mul_(self.between)).sum(3)
        dc += d_scores @ self.b
        db += d_scores.mT @ self.c

        wide = accumulator_dtype(dy.device)  # what follows are differences of sums
        d_between = d_between.to(wide)
        d_entering, d_leaving, d_decay = (value.to(wide) for value in (d_entering, d_leaving, d_decay))
        d_sums = d_entering - d_leaving + (d_between.sum(-1) - d_between.sum(-2)).transpose(2, 3)
        d_sums[:, :, -1] += d_decay + d_leaving.sum(2)
        d_log = d_sums.flip(2).cumsum(2).flip(2).to(dy.dtype)
        return [v.flatten(1, 2) for v in (dx, d_log, db.transpose(2, 3), dc.transpose(2, 3))], d_state


class _Scan(torch.autograd.Function):
    """Span by span; only the states between spans are kept, and backward makes the tables of each again."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, *sequences: Tensor | None) -> tuple[Tensor, Tensor]:
        outputs, before = [], []
        for span in _spans(sequences):
            before.append(state)
            y, state = _Span.of(span).run(state)
            outputs.append(y[:, : _length(span)])
        ctx.save_for_backward(*sequences, *before)
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_state: Tensor):
        saved = ctx.saved_tensors  # once: under gradient checkpointing a second look is an error
        sequences, before = saved[:5], saved[5:]
        found: list[list[Tensor]] = []
        for i, span in reversed(list(enumerate(_spans(sequences)))):
            length, tables = _length(span), _Span.of(span)
            own = dy[:, i * SPAN : i * SPAN + length]
            own = F.pad(own, (0, 0, 0, 0, 0, tables.x.shape[1] * tables.x.shape[2] - length))
            gradients, d_state = tables.backward(before[i], own, d_state)
            found.append([gradient[:, :length] for gradient in gradients])
        whole = [torch.cat(parts[::-1], dim=1) for parts in zip(*found, strict=True)]
        return d_state, *whole, None


def _spans(sequences: Sequence[Tensor | None]) -> Iterator[list[Tensor | None]]:
    for first in range(0, _length(sequences), SPAN):
        yield [None if s is None else s[:, first : first + SPAN] for s in sequences]


def _length(sequences: Sequence[Tensor | None]) -> int:
    assert sequences[0] is not None
    return sequences[0].shape[1]


def scan(
    x: Tensor, log_decay: Tensor, b: Tensor, c: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All tokens of all rows.

    Args:
        x: [B, L, H, P]; what is written, 0 at padding.
        log_decay: [B, L, H]; 0 at padding.
        b, c: [B, L, G, N].
        state: [B, H, P, N].
        starts: bool [B, L]; the token starts a document. None: none does.
    """
    if x.shape[1] == 1:
        heads = x.shape[2] // b.shape[2]
        b_t, c_t = (v[:, 0].repeat_interleave(heads, dim=1) for v in (b, c))
        decay = log_decay[:, 0].exp()
        if starts is not None:
            decay = decay * ~starts
        h = torch.addcmul(x[:, 0, :, :, None] * b_t[:, :, None], decay[..., None, None], state)
        return (h @ c_t[..., None])[:, None, ..., 0], h
    result: tuple[Tensor, Tensor] = _Scan.apply(state, x, log_decay, b, c, starts)
    return result
