"""The complex exponential moving average with constant coefficients (SPEC: CEMA; arXiv 2404.08801, section 3.1)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megalodon.ops.backend import Implementations, check_devices, choose, complex_of, full_precision
from megalodon.ops.cema import blocked, reference
from megalodon.ops.cema.blocked import KeptTables
from megalodon.ops.compiling import one_break_at_most
from megalodon.ops.complex import resolved
from megalodon.ops.layout import Layout, layout_of
from megalodon.ops.segments import Segments


def _triton(
    x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor | None, state: Tensor | None, layout: Layout
) -> tuple[Tensor, Tensor]:
    """The kernels, imported when they are first asked for: Triton need not be installed."""
    if x.numel() == 0:
        return blocked.cema(x, p, q, gamma, omega, state, layout)
    from megalodon.ops.cema import triton

    return triton.cema(x, p, q, gamma, omega, state, layout)


def _numba(x: Tensor, *arguments: Any, **kept: Any) -> tuple[Tensor, Tensor]:
    """The compiled loops, imported when they are first asked for; they keep no tables."""
    from megalodon.ops.cema import numba

    return numba.cema(x, *arguments) if numba.fits(x) else blocked.cema(x, *arguments, **kept)


IMPLEMENTATIONS: Implementations = {
    "reference": reference.cema,
    "blocked": blocked.cema,
    "numba": _numba,
    "triton": _triton,
}


@one_break_at_most
def cema(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    gamma: Tensor,
    omega: Tensor | None = None,
    initial_state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    backend: str | None = None,
    *,
    bos_mask: Tensor | None = None,
    layout: Layout | None = None,
    kept: KeptTables | None = None,
) -> tuple[Tensor, Tensor]:
    """Complex exponential moving average along time. (Gecko's is this one with omega = 1.)

    For each channel d and component j, `h_t = q h_{t-1} + p x_t` and `y_t = Re(sum_j gamma_j h_{t,j}) + omega x_t`.
    Computed in float32 (float64 for float64 input) whatever the dtype of `x`, under autocast too.

    Args:
        x: [B, L, D], any floating dtype.
        p: real [D, N]; input weights.
        q: complex [D, N]; decay and phase, |q| < 1.
        gamma: complex [D, N]; output weights: with 1/sqrt(N) in Megalodon, as stored in Gecko.
        omega: real [D]; weight of the residual `omega x`. [D, 1] is accepted.
        initial_state: complex [B, D, N]; the state before the first token. None: zero.
        segment_ids: int [B, L]; a change along L starts a document with a zero state. The row's first document
            continues `initial_state`.
        backend: "reference", "blocked", "numba" or "triton"; None chooses (see `megalodon.ops.backend`).
        bos_mask: bool [B, L]; True where a token starts a segment, with a zero state: the row's `initial_state` is
            forgotten too.
        layout: the batch's layout, in place of `segment_ids`, where it is already known. Tokens beyond its `lengths`
            give zero and leave the state alone.
        kept: where "blocked" finds its tables again, without gradients; the others do without.

    Returns:
        (y [B, L, D] in the dtype of x, the state after each row's last token: complex [B, D, N]).

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}: it must be a floating-point [B, L, D]")
    check_devices(x.device, p=p, q=q, gamma=gamma, omega=omega, initial_state=initial_state, bos_mask=bos_mask)
    batch, length, dim = x.shape
    real = full_precision(x.dtype)
    omega = None if omega is None else omega.reshape(-1).to(real)
    if p.ndim != 2 or p.shape[0] != dim or p.is_complex():
        raise ValueError(f"p is {p.dtype} of shape {tuple(p.shape)}: it must be real [D, N] with D = {dim}")
    for name, value in (("q", q), ("gamma", gamma)):
        if value.shape != p.shape or not value.is_complex():
            raise ValueError(
                f"{name} is {value.dtype} of shape {tuple(value.shape)}: it must be complex {tuple(p.shape)}"
            )
    if omega is not None and omega.shape != (dim,):
        raise ValueError(f"omega has {omega.numel()} values: it must have D = {dim}")
    if initial_state is not None and (initial_state.shape != (batch, *p.shape) or not initial_state.is_complex()):
        raise ValueError(
            f"initial_state is {initial_state.dtype} of shape {tuple(initial_state.shape)}: "
            f"it must be complex {(batch, *p.shape)}"
        )
    run = choose(IMPLEMENTATIONS, backend, x.device, x.dtype)
    if layout is None:
        layout = layout_of(batch, length, x.device, segment_ids=segment_ids)
    wide = complex_of(real)
    q, gamma = resolved(q.to(wide)), resolved(gamma.to(wide))
    state = None if initial_state is None else resolved(initial_state.to(wide))
    if bos_mask is not None:
        segments = Segments(bos_mask, layout)
        layout, state = segments.by_segment, segments.forgotten(state)
    keeping = {"kept": kept} if run in (blocked.cema, _numba) else {}
    return run(x, p.to(real), q, gamma, omega, state, layout, **keeping)
