"""Mamba-2's scan, one decay per head, in chunks: masked matrix products inside a chunk, a state between chunks.

Inside a chunk of T tokens, token s reaches token t with weight (c_t . b_s) exp(l_{s+1} + .. + l_t), l the logs of the
decays. The sums are differences of one running sum, which is taken in float64: a strong decay early in a chunk costs
the later ones nothing. Where s > t, or another document begins between them, the weight is masked before it is
exponentiated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megalodon.ops.backend import accumulator_dtype

CHUNK = 64
"""Tokens in a chunk: the products inside grow with it, the steps between chunks shrink with it."""

CACHEFUL = 1 << 17
"""Numbers of x in a span on a CPU: its tables, of which each is about as large, are made and used in the cache."""

SPAN = 16 * CHUNK
"""Tokens of a span elsewhere, and at most."""


def span_length(x: Tensor) -> int:
    """Tokens of a row of x [B, L, H, P] whose tables live at once."""
    if x.device.type != "cpu":
        return SPAN
    return min(max(CACHEFUL // max(x[:, 0].numel() * CHUNK, 1), 1) * CHUNK, SPAN)


class _Inputs(NamedTuple):
    """Of a scan, or of a span of one; see `scan`."""

    x: Tensor
    dt: Tensor
    b: Tensor
    c: Tensor
    starts: Tensor | None
    a: Tensor | None
    skip: Tensor | None

    def spans(self) -> Iterator[_Inputs]:
        """Span by span."""
        size = span_length(self.x)
        for first in range(0, self.x.shape[1], size):
            here = slice(first, first + size)
            parts = (None if value is None else value[:, here] for value in self[:5])
            yield _Inputs(*parts, self.a, self.skip)  # type: ignore[arg-type]


class _Span(NamedTuple):
    """A span of n chunks of T tokens, and what decays in it. R is the rows of a group's heads, H / G times P.

    Attributes:
        x: [B, n, T, H, P]; b, c: [B, n, G, T, N].
        weight: [B, n, T, H, 1] or None; times x is what is written.
        between: [B, n, H, T, T]; how much of what token s wrote is left at token t, 0 where it is not seen.
        entering, leaving: [B, n, T, H, 1]; how much is left of the chunk's first state at a token, and of a token's
            own at the chunk's end. decay: [B, n, H, 1, 1]; of the first state at the end.
    """

    x: Tensor
    weight: Tensor | None
    b: Tensor
    c: Tensor
    between: Tensor
    entering: Tensor
    leaving: Tensor
    decay: Tensor

    @staticmethod
    def of(given: _Inputs) -> _Span:
        """The tables of a span's inputs."""
        x, dt, b, c, starts = given[:5]
        size = min(CHUNK, x.shape[1])
        fill = -x.shape[1] % size  # tokens that write nothing and decay nothing
        if fill:
            x, dt, b, c = (F.pad(v, (0, 0) * (v.ndim - 2) + (0, fill)) for v in (x, dt, b, c))
            starts = None if starts is None else F.pad(starts, (0, fill))
        x, dt, b, c = (v.unflatten(1, (-1, size)) for v in (x, dt, b, c))
        log_decay = dt if given.a is None else dt * given.a
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
        weight = None if given.a is None else dt[..., None]
        return _Span(x, weight, b, c, between, entering[..., None], leaving[..., None], decay[..., None, None])

    def written(self) -> Tensor:
        """What tokens write, [B, n, H, T, P]."""
        heads = torch.empty_like(self.x.transpose(2, 3), memory_format=torch.contiguous_format)
        if self.weight is None:
            return heads.copy_(self.x.transpose(2, 3))
        return torch.mul(self.x.transpose(2, 3), self.weight.transpose(2, 3), out=heads)

    def kept(self) -> Tensor:
        """What is left of it at the chunk's end, [B, n, G, T, R]."""
        return self.rows(self.x * (self.leaving if self.weight is None else self.leaving * self.weight))

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

    def states(self, state: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """(the states before the chunks [B, n, H, P, N], that after the last)."""
        added = (kept.mT @ self.b).view(*self.decay.shape[:3], *state.shape[2:])
        before = torch.empty_like(added)
        for i in range(added.shape[1]):
            before[:, i] = state
            state = torch.addcmul(added[:, i], self.decay[:, i], state)
        return before, state

    def run(self, state: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor]:
        """(y [B, n T, H, P], the state after it)."""
        before, state = self.states(state, self.kept())
        y = self.tokens(self.c @ self.grouped(before).mT).mul_(self.entering)
        y += (self.weights() @ self.written()).transpose(2, 3)
        if skip is not None:
            y.addcmul_(skip[:, None], self.x)
        return y.flatten(1, 2), state

    def backward(self, state: Tensor, dy: Tensor, d_state: Tensor) -> tuple[list[Tensor], Tensor]:
        """(gradients of what is written, log decays, b, c, of that of the state before) from those of y, without the
        skip, and of the state after."""
        kept = self.kept()
        before, _ = self.states(state, kept)
        dy = dy.unflatten(1, self.x.shape[1:3])
        scaled = dy * self.entering
        d_rows = self.rows(scaled)
        d_before = (d_rows.mT @ self.c).view_as(before)
        d_added = torch.empty_like(before)
        for i in reversed(range(before.shape[1])):
            d_added[:, i] = d_state
            d_state = torch.addcmul(d_before[:, i], self.decay[:, i], d_state)
        d_entering = self.tokens(self.c @ self.grouped(before).mT).mul_(scaled).sum(-1)
        dc, db = d_rows @ self.grouped(before), kept @ self.grouped(d_added)
        d_decay = before.mul_(d_added).sum((-1, -2)) * self.decay[..., 0, 0]  # of the logarithm, as all below

        written, weights, d_heads = self.written(), self.weights(), dy.transpose(2, 3).contiguous()
        dx = self.tokens(self.b @ self.grouped(d_added).mT).mul_(self.leaving)
        d_leaving = (dx * written.transpose(2, 3)).sum(-1)
        dx += (weights.mT @ d_heads).transpose(2, 3)
        d_weights = d_heads @ written.mT
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
    def forward(ctx: Any, state: Tensor, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        given = _Inputs(*inputs)  # type: ignore[arg-type]
        y, before, first = torch.empty_like(given.x, memory_format=torch.contiguous_format), [], 0
        for span in given.spans():
            before.append(state)
            out, state = _Span.of(span).run(state, given.skip)
            length = span.x.shape[1]
            y[:, first : first + length] = out[:, :length]
            first += length
        ctx.save_for_backward(*inputs, *before)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_state: Tensor):
        given, before = _Inputs(*ctx.saved_tensors[:7]), ctx.saved_tensors[7:]
        dx, d_dt, db, dc = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in given[:4])
        wide = accumulator_dtype(dy.device)
        da, d_skip = (None if v is None else torch.zeros_like(v, dtype=wide) for v in (given.a, given.skip))
        size = span_length(given.x)
        for i, span in reversed(list(enumerate(given.spans()))):
            length, tables = span.x.shape[1], _Span.of(span)
            here = slice(i * size, i * size + length)
            own = dy[:, here]
            filled = F.pad(own, (0, 0, 0, 0, 0, tables.x.shape[1] * tables.x.shape[2] - length))
            found, d_state = tables.backward(before[i], filled, d_state)
            d_written, d_log, db[:, here], dc[:, here] = (value[:, :length] for value in found)
            if given.a is None or da is None:
                dx[:, here], d_dt[:, here] = d_written, d_log
            else:
                torch.mul(d_written, span.dt[..., None], out=dx[:, here])
                d_dt[:, here] = torch.addcmul((d_written * span.x).sum(-1), d_log, given.a)
                da += (d_log * span.dt).sum((0, 1))
            if given.skip is not None and d_skip is not None:
                dx[:, here].addcmul_(own, given.skip[:, None])
                d_skip += (own * span.x).sum((0, 1, 3))
        da, d_skip = (None if v is None else v.to(dy.dtype) for v in (da, d_skip))
        return d_state, dx, d_dt, db, dc, None, da, d_skip


def scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor | None,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    state: Tensor,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """All tokens of all rows.

    Args:
        x: [B, L, H, P]; 0 at padding.
        dt: [B, L, H]; 0 at padding. Without `a` the logarithms of the decays.
        a, skip: [H] or None.
        b, c: [B, L, G, N].
        state: [B, H, P, N].
        starts: bool [B, L]; the token starts a document. None: none does.
    """
    if x.shape[1] == 1:
        heads = x.shape[2] // b.shape[2]
        b_t, c_t = (v[:, 0].repeat_interleave(heads, dim=1) for v in (b, c))
        decay = (dt[:, 0] if a is None else dt[:, 0] * a).exp()
        written = x[:, 0] if a is None else x[:, 0] * dt[:, 0, :, None]
        if starts is not None:
            decay = decay * ~starts
        h = torch.addcmul(written[..., None] * b_t[:, :, None], decay[..., None, None], state)
        y = (h @ c_t[..., None])[:, None, ..., 0]
        return (y if skip is None else torch.addcmul(y, skip[:, None], x)), h
    result: tuple[Tensor, Tensor] = _Scan.apply(state, x, dt, b, c, starts, a, skip)
    return result
