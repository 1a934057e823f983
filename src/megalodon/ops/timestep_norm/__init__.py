"""Group normalisation with statistics that accumulate along time (SPEC: TimestepNorm; arXiv 2404.08801, section
3.2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megalodon.ops.backend import Implementations, check_devices, choose, full_precision
from megalodon.ops.compiling import one_break_at_most
from megalodon.ops.layout import Layout, layout_of
from megalodon.ops.timestep_norm import blocked, reference
from megalodon.ops.timestep_norm.statistics import Prior, Statistics

__all__ = ["IMPLEMENTATIONS", "Prior", "Statistics", "timestep_norm"]


def _by_document_starts(run: Callable[..., Any]) -> Callable[..., Any]:
    """Takes a layout in place of the index of each document's first token."""

    def timestep_norm(*arguments: Any, layout: Layout, eps: float) -> tuple[Tensor, Statistics]:
        return run(*arguments, layout.restart, eps)

    return timestep_norm


_reference, _blocked = _by_document_starts(reference.timestep_norm), _by_document_starts(blocked.timestep_norm)


def _triton(x: Tensor, *arguments: Any, layout: Layout, eps: float) -> tuple[Tensor, Statistics]:
    """The kernels, imported when they are first asked for: Triton need not be installed."""
    from megalodon.ops.timestep_norm import triton

    run = triton.timestep_norm if x.numel() and triton.fits(x, arguments[2]) else _blocked
    return run(x, *arguments, layout=layout, eps=eps)


def _numba(x: Tensor, *arguments: Any, layout: Layout, eps: float) -> tuple[Tensor, Statistics]:
    """The compiled loops, imported when they are first asked for."""
    from megalodon.ops.timestep_norm import numba

    run = _by_document_starts(numba.timestep_norm) if numba.fits(x) else _blocked
    return run(x, *arguments, layout=layout, eps=eps)


IMPLEMENTATIONS: Implementations = {
    "reference": _reference,
    "blocked": _blocked,
    "numba": _numba,
    "triton": _triton,
}


@one_break_at_most
def timestep_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    count: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    padding_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
    *,
    prior: Prior | None = None,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise each token by the statistics of all tokens so far, itself included.

    Args:
        x: [B, L, D], any floating dtype.
        weight: [D] or None; the stored offset: the effective scale is `weight + 1`.
        bias: [D] or None.
        num_groups: G; a divisor of D.
        count: int64 [B]; tokens seen before. None: a fresh sequence (`mean` and `var` must then be None too).
        mean, var: [B, G]; the statistics of the tokens seen before. The returned statistics have their dtype: pass
            float64 for streams of millions of tokens fed in small pieces. float32 by default (float64 for float64 x).
        padding_mask: bool [B, L]; True where a token is padding: it gives zero and leaves the statistics alone.
        segment_ids: int [B, L]; a change along L starts a document with fresh statistics. The row's first document
            continues count, mean and var.
        eps: added to the variance.
        backend: "reference", "blocked", "numba" or "triton"; None chooses (see `megalodon.ops.backend`).
        prior: what a fresh document starts from. None: count 0, mean 0, variance 1.
        layout: the batch's layout, in place of `segment_ids` and `padding_mask`, where it is already known.

    Returns:
        (y [B, L, D] in the dtype of x, count, mean, var after each row's last token).

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}: it must be a floating-point [B, L, D]")
    check_devices(x.device, weight=weight, bias=bias, count=count, mean=mean, var=var, padding_mask=padding_mask)
    batch, length, dim = x.shape
    if num_groups < 1 or dim % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide D={dim}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape != (dim,):
            raise ValueError(f"{name} has shape {tuple(value.shape)}: it must be {(dim,)}")
    if padding_mask is not None and (padding_mask.shape != (batch, length) or padding_mask.dtype != torch.bool):
        raise ValueError(
            f"padding_mask is {padding_mask.dtype} of shape {tuple(padding_mask.shape)}: "
            f"it must be bool {(batch, length)}"
        )
    run = choose(IMPLEMENTATIONS, backend, x.device, x.dtype)
    if layout is None:
        layout = layout_of(batch, length, x.device, segment_ids=segment_ids)
    elif padding_mask is None:
        padding_mask = layout.padding
    if prior is None and (count is None or layout.restart is not None):
        prior = Prior.default(num_groups, full_precision(x.dtype), x.device)
    initial = _initial(x, num_groups, count, mean, var, prior)
    with torch.autocast(x.device.type, enabled=False):
        y, last = run(x, weight, bias, initial, prior, padding_mask, layout=layout, eps=eps)
    return y, last.count, last.mean, last.var


def _initial(
    x: Tensor, groups: int, count: Tensor | None, mean: Tensor | None, var: Tensor | None, prior: Prior | None
) -> Statistics:
    given = {"count": count, "mean": mean, "var": var}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise ValueError(f"{', '.join(missing)} missing: count, mean and var are given together or not at all")
    batch = x.shape[0]
    if count is None or mean is None or var is None:
        assert prior is not None
        fresh = torch.full((batch,), prior.count, dtype=torch.int64, device=x.device)
        return Statistics(fresh, prior.mean.expand(batch, groups), prior.var.expand(batch, groups))
    for name, value, shape in (
        ("count", count, (batch,)),
        ("mean", mean, (batch, groups)),
        ("var", var, (batch, groups)),
    ):
        if value.shape != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: it must be {shape}")
    real = torch.promote_types(mean.dtype, full_precision(x.dtype))
    return Statistics(count, mean.to(real), var.to(real))
