"""Mamba-2's scan, one decay per head, in chunks: masked matrix products inside a chunk, a state between chunks.

Inside a chunk of T tokens, token s reaches token t with weight (c_t . b_s) exp(l_{s+1} + .. + l_t), l the logs of the
decays. The sums are differences of one running sum, which is taken in float64: a strong decay early in a chunk costs
the later ones nothing. Where s > t, or another document begins between them, the weight is masked before it is
exponentiated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megalodon.ops.backend import accumulator_dtype

CHUNK = 64
"""Tokens in a chunk: the products inside grow with it, the steps between chunks shrink with it."""

CACHEFUL = 1 << 19
"""Numbers of x in a span on a CPU, where there are many rows: its tables, of which each is about as large, are made and
used in the cache."""

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
            starts = None if self.starts is None else self.starts[:, here]
            x, dt, b, c = (value[:, here] for value in self[:4])
            yield self._replace(x=x, dt=dt, b=b, c=c, starts=starts)


class Span(NamedTuple):
    """A span of n chunks of T tokens, and what decays in it. R is the rows of a group's heads, H / G times P.

    Attributes:
        x: [B, n, T, H, P]; b, c: [B, n, G, T, N].
        weight: [B, n, T, H] or None; times x is what is written.
        sums: of the logarithms of the decays, float64 [B, n, H, T].
        document: of the token inside its chunk, int64 [B, n, T]. None: all are of one.
        entering, leaving: [B, n, T, H]; how much is left of the chunk's first state at a token, and of a token's own
            at the chunk's end. decay: [B, n, H]; of the first state at the end.
        skip: [H] or None.
    """

    x: Tensor
    weight: Tensor | None
    b: Tensor
    c: Tensor
    sums: Tensor
    document: Tensor | None
    entering: Tensor
    leaving: Tensor
    decay: Tensor
    skip: Tensor | None

    @classmethod
    def of(cls, given: _Inputs) -> Self:
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
        entering, leaving = sums.to(x.dtype).exp(), (sums[:, :, -1:] - sums).to(x.dtype).exp()
        decay, document = entering[:, :, -1], None
        if starts is not None:
            document = starts.unflatten(1, (-1, size)).cumsum(-1)
            entering = entering * (document == 0)[..., None]
            leaving = leaving * (document == document[..., -1:])[..., None]
            decay = decay * (document[..., -1:] == 0)
        b, c = b.transpose(2, 3), c.transpose(2, 3)
        by_head = sums.transpose(2, 3).contiguous()
        weight = None if given.a is None else dt
        return cls(x, weight, b, c, by_head, document, entering, leaving, decay, given.skip)

    # what is read and written, as the products need it

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

    def scores(self) -> Tensor:
        """[B, n, G, T, T]."""
        return self.c @ self.b.mT

    def added(self, kept: Tensor, state: Tensor) -> Tensor:
        """What a chunk adds to the state, [B, n, H, P, N], of what is kept of its tokens."""
        return (self.rows(kept).mT @ self.b).view(*self.decay.shape, *state.shape[2:])

    # all else: in PyTorch's operations here, in single passes over memory where `compiled` replaces them

    def between(self) -> Tensor:
        """[B, n, H, T, T]: how much of what token s wrote is left at token t, 0 where it is not seen."""
        size = self.sums.shape[-1]
        seen = torch.ones(size, size, dtype=torch.bool, device=self.x.device).tril()
        if self.document is not None:
            seen = seen & (self.document[:, :, None, :, None] == self.document[:, :, None, None])
        logs = (self.sums[..., :, None] - self.sums[..., None, :]).to(self.x.dtype)
        return logs.masked_fill_(~seen, -torch.inf).exp_()

    def weights(self) -> Tensor:
        """[B, n, H, T, T]: how much of what token s wrote token t reads."""
        return (self.scores().unsqueeze(3) * self.by_group(self.between())).flatten(2, 3)

    def opened(self) -> tuple[Tensor, Tensor]:
        """(what tokens write [B, n, H, T, P], what is left of it at the chunk's end [B, n, T, H, P])."""
        weight, left = self.weight, self.leaving if self.weight is None else self.leaving * self.weight
        written = self.x.transpose(2, 3)
        written = written if weight is None else written * weight.transpose(2, 3)[..., None]
        return written.contiguous(), self.x * left[..., None]

    def carried(self, added: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(the states before the chunks [B, n, H, P, N], that after the last)."""
        before, decay = torch.empty_like(added), self.decay[..., None, None]
        for i in range(added.shape[1]):
            before[:, i] = state
            state = torch.addcmul(added[:, i], decay[:, i], state)
        return before, state

    def closed(self, inter: Tensor, intra: Tensor) -> Tensor:
        """y [B, n, T, H, P], of what is read from states [B, n, T, H, P] and inside chunks [B, n, H, T, P]."""
        y = inter.mul_(self.entering[..., None])
        y += intra.transpose(2, 3)
        return y if self.skip is None else y.addcmul_(self.skip[:, None], self.x)

    def opened_back(self, dy: Tensor) -> tuple[Tensor, Tensor]:
        """(dy times what enters [B, n, T, H, P], dy by heads [B, n, H, T, P])."""
        return dy * self.entering[..., None], dy.transpose(2, 3).contiguous()

    def weights_back(self, known: Tensor, d_weights: Tensor) -> tuple[Tensor, Tensor]:
        """(gradients of the scores, of the sums of logarithms) from those of the weights, which are `known`."""
        d_between = (known * d_weights).to(self.sums.dtype)  # of these, differences of sums are taken
        d_scores = self.by_group(d_weights.mul_(self.between())).sum(3)
        return d_scores, d_between.sum(-1) - d_between.sum(-2)

    def carried_back(self, before: Tensor, d_before: Tensor, d_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(gradients of what is added, of the logarithms of chunks' decays [B, n, H], of the state before) from those
        of the states before the chunks and after the last."""
        d_added, decay = torch.empty_like(before), self.decay[..., None, None]
        for i in reversed(range(before.shape[1])):
            d_added[:, i] = d_state
            d_state = torch.addcmul(d_before[:, i], decay[:, i], d_state)
        return d_added, (before * d_added).sum((-1, -2)) * self.decay, d_state

    def closed_back(
        self, dy: Tensor, scaled: Tensor, inter: Tensor, through: Tensor, intra: Tensor
    ) -> tuple[Tensor, ...]:
        """The gradient of x [B, n, T, H, P], from what comes `through` the state and `intra`, inside chunks; and
        [B, n, T, H] each, those of weight, entering and leaving (the logarithms of these two) and of skip."""
        past = through * self.leaving[..., None]
        d_written = past + intra.transpose(2, 3)
        d_leaving, d_entering = (past * self.x).sum(-1), (inter * scaled).sum(-1)
        d_weight, d_skip = (d_written * self.x).sum(-1), (dy * self.x).sum(-1)
        if self.weight is not None:
            d_leaving, d_written = d_leaving * self.weight, d_written * self.weight[..., None]
        dx = d_written if self.skip is None else torch.addcmul(d_written, self.skip[:, None], dy)
        return dx, d_weight, d_entering, d_leaving, d_skip

    # forward and backward

    def run(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """(y [B, n T, H, P], the state after it)."""
        written, kept = self.opened()
        before, state = self.carried(self.added(kept, state), state)
        inter = self.tokens(self.c @ self.grouped(before).mT)
        return self.closed(inter, self.weights() @ written).flatten(1, 2), state

    def backward(self, state: Tensor, dy: Tensor, d_state: Tensor) -> tuple[list[Tensor], Tensor]:
        """(gradients of x, the weights of what is written, log decays, b, c, and the skip's of each token; of the state
        before) from those of y and of the state after."""
        dy = dy.unflatten(1, self.x.shape[1:3])
        written, kept = self.opened()
        before, _ = self.carried(self.added(kept, state), state)
        scaled, by_head = self.opened_back(dy)
        d_rows = self.rows(scaled)
        d_before = (d_rows.mT @ self.c).view_as(before)
        d_added, d_decay, d_state = self.carried_back(before, d_before, d_state)
        dc, db = d_rows @ self.grouped(before), self.rows(kept) @ self.grouped(d_added)
        inter = self.tokens(self.c @ self.grouped(before).mT)
        through = self.tokens(self.b @ self.grouped(d_added).mT)
        known = self.weights()
        intra = known.mT @ by_head
        d_scores, d_sums = self.weights_back(known, by_head @ written.mT)
        dx, d_weight, d_entering, d_leaving, d_skip = self.closed_back(dy, scaled, inter, through, intra)
        dc += d_scores @ self.b
        db += d_scores.mT @ self.c

        wide = d_sums.dtype
        d_leaving = d_leaving.to(wide)
        d_sums = d_sums.transpose(2, 3) + d_entering - d_leaving
        d_sums[:, :, -1] += d_decay.to(wide) + d_leaving.sum(2)
        d_log = d_sums.flip(2).cumsum(2).flip(2).to(dy.dtype)
        found = (dx, d_weight, d_log, db.transpose(2, 3), dc.transpose(2, 3), d_skip)
        return [v.flatten(1, 2) for v in found], d_state


class _Scan(torch.autograd.Function):
    """Span by span; only the states between spans are kept, and backward makes the tables of each again."""

    @staticmethod
    def forward(ctx: Any, kind: type[Span], state: Tensor, *inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        given = _Inputs(*inputs)  # type: ignore[arg-type]  # `apply` hands on a tuple of what may be None
        outputs, before = [], []
        for span in given.spans():
            before.append(state)
            y, state = kind.of(span).run(state)
            outputs.append(y[:, : span.x.shape[1]])
        ctx.save_for_backward(*inputs, *before)
        ctx.kind = kind
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_state: Tensor):
        saved = ctx.saved_tensors  # once: under gradient checkpointing a second look is an error
        given, before = _Inputs(*saved[:7]), saved[7:]
        dx, d_dt, db, dc = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in given[:4])
        wide = accumulator_dtype(dy.device)
        da, d_skip = (None if v is None else torch.zeros_like(v, dtype=wide) for v in (given.a, given.skip))
        size = span_length(given.x)
        for i, span in reversed(list(enumerate(given.spans()))):
            length, tables = span.x.shape[1], ctx.kind.of(span)
            here = slice(i * size, i * size + length)
            filled = F.pad(dy[:, here], (0, 0, 0, 0, 0, tables.x.shape[1] * tables.x.shape[2] - length))
            found, d_state = tables.backward(before[i], filled, d_state)
            dx[:, here], d_weight, d_log, db[:, here], dc[:, here], skipped = (value[:, :length] for value in found)
            if given.a is None or da is None:
                d_dt[:, here] = d_log
            else:
                d_dt[:, here] = torch.addcmul(d_weight, d_log, given.a)
                da += (d_log * span.dt).sum((0, 1))
            if d_skip is not None:
                d_skip += skipped.sum((0, 1))
        da, d_skip = (None if v is None else v.to(dy.dtype) for v in (da, d_skip))
        return None, d_state, dx, d_dt, db, dc, None, da, d_skip


def scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor | None,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    state: Tensor,
    starts: Tensor | None,
    kind: type[Span] = Span,
) -> tuple[Tensor, Tensor]:
    """All tokens of all rows.

    Args:
        x: [B, L, H, P]; 0 at padding.
        dt: [B, L, H]; 0 at padding. Without `a` the logarithms of the decays.
        a, skip: [H] or None.
        b, c: [B, L, G, N].
        state: [B, H, P, N].
        starts: bool [B, L]; the token starts a document. None: none does.
        kind: how spans are computed.
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
    result: tuple[Tensor, Tensor] = _Scan.apply(kind, state, x, dt, b, c, starts, a, skip)
    return result
