"""The selective scan of Mamba (arXiv 2312.00752) and Mamba-2 (arXiv 2405.21060): a recurrence whose decay, input and
output weights depend on the token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalodon.ops.backend import Implementations, check_devices, choose, full_precision
from megalodon.ops.compiling import one_break_at_most
from megalodon.ops.layout import Layout, layout_of
from megalodon.ops.selective_scan import blocked, numba, reference

IMPLEMENTATIONS: Implementations = {
    "reference": reference.selective_scan,
    "blocked": blocked.selective_scan,
    "numba": numba.selective_scan,
}


@one_break_at_most
def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor | None,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    backend: str | None = None,
    *,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor]:
    """A scan with input-dependent steps: `h_t = exp(dt_t a) h_{t-1} + (dt_t x_t) b_t`, `y_t = c_t . h_t + skip x_t`.

    Two forms, told apart by `x`. Computed in float32 (float64 for float64 input), under autocast too.

    Args:
        x: [B, L, E] (Mamba: one decay per channel and component) or [B, L, H, P] (Mamba-2: one decay per head).
        dt: [B, L, E] or [B, L, H]; the steps, positive (softplus applied). With `a` None: the logs of the decays, at
            most 0, and `x` is written unweighted.
        a: [E, N] or [H], negative; None in the second form only.
        b, c: [B, L, N], or [B, L, G, N] with H a multiple of G: head h uses group h // (H / G).
        skip: [E] or [H]; None: no skip.
        initial_state: [B, E, N] or [B, H, P, N]; the state before the first token. None: zero.
        segment_ids: int [B, L]; a change along L starts a document with a zero state. The row's first document
            continues `initial_state`.
        backend: "reference", "blocked" or "numba"; None chooses (see `megalodon.ops.backend`).
        layout: the batch's layout, in place of `segment_ids`. Tokens beyond its `lengths` give zero and leave the
            state alone.

    Returns:
        (y like x, the state after each row's last token, float32 or float64).

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    if x.ndim not in (3, 4) or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}: it must be a float [B, L, E] or [B, L, H, P]")
    check_devices(x.device, dt=dt, a=a, b=b, c=c, skip=skip, initial_state=initial_state)
    state_shape = _check_shapes(x, dt, a, b, c)
    if skip is not None and skip.shape != (x.shape[2],):
        raise ValueError(f"skip has shape {tuple(skip.shape)}: it must have {x.shape[2]} values")
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(f"initial_state has shape {tuple(initial_state.shape)}: it must have {state_shape}")
    run = choose(IMPLEMENTATIONS, backend, x.device, x.dtype)
    if layout is None:
        layout = layout_of(x.shape[0], x.shape[1], x.device, segment_ids=segment_ids)
    real = full_precision(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        if initial_state is None:
            initial_state = torch.zeros(state_shape, dtype=real, device=x.device)
        a, skip = (None if value is None else value.to(real) for value in (a, skip))
        arguments = (x.to(real), dt.to(real), a, b.to(real), c.to(real), skip, initial_state.to(real), layout)
        y, state = run(*arguments)
        return y.to(x.dtype), state


def _check_shapes(x: Tensor, dt: Tensor, a: Tensor | None, b: Tensor, c: Tensor) -> tuple[int, ...]:
    """The shape of the state, once everything fits."""
    batch, length, first = x.shape[:3]
    if dt.shape != (batch, length, first):
        raise ValueError(f"dt has shape {tuple(dt.shape)}: it must have {(batch, length, first)}")
    if c.shape != b.shape:
        raise ValueError(f"c has shape {tuple(c.shape)}: it must have that of b, {tuple(b.shape)}")
    if x.ndim == 3:
        if a is None or a.ndim != 2 or a.shape[0] != first:
            found = "None" if a is None else f"of shape {tuple(a.shape)}"
            raise ValueError(f"a is {found}: it must be [E, N] with E = {first} for x [B, L, E]")
        if b.shape != (batch, length, a.shape[1]):
            raise ValueError(f"b has shape {tuple(b.shape)}: it must have {(batch, length, a.shape[1])}")
        return (batch, first, a.shape[1])
    if a is not None and a.shape != (first,):
        raise ValueError(f"a has shape {tuple(a.shape)}: it must be [H] with H = {first} for x [B, L, H, P]")
    if b.ndim != 4 or b.shape[:2] != (batch, length) or b.shape[2] == 0 or first % b.shape[2]:
        raise ValueError(
            f"b has shape {tuple(b.shape)}: it must be [{batch}, {length}, G, N] with G a divisor of {first} heads"
        )
    return (batch, first, x.shape[3], b.shape[3])
