"""Group normalisation with statistics that decay along time (GECKO: TimestepDecayNorm; arXiv 2601.06463)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalodon.ops.backend import Implementations, accumulator_dtype, check_devices, choose, full_precision
from megalodon.ops.compiling import one_break_at_most
from megalodon.ops.grouped import Groups, moments
from megalodon.ops.layout import Layout, layout_of
from megalodon.ops.timestep_decay_norm import blocked, reference
from megalodon.ops.timestep_decay_norm.statistics import Decay, DecayedStatistics, joined

__all__ = [
    "IMPLEMENTATIONS",
    "Decay",
    "DecayedStatistics",
    "decayed_statistics",
    "joined",
    "timestep_decay_norm",
]


def _numba(x: Tensor, *arguments: Any) -> tuple[Tensor, DecayedStatistics]:
    """The compiled loops, imported when they are first asked for."""
    from megalodon.ops.timestep_decay_norm import numba

    return (numba if numba.fits(x) else blocked).timestep_decay_norm(x, *arguments)


def _triton(x: Tensor, *arguments: Any) -> tuple[Tensor, DecayedStatistics]:
    """The kernels, imported when they are first asked for: Triton need not be installed."""
    from megalodon.ops.timestep_decay_norm import triton

    fits = x.numel() > 0 and triton.fits(x, arguments[2])
    return (triton if fits else blocked).timestep_decay_norm(x, *arguments)


IMPLEMENTATIONS: Implementations = {
    "reference": reference.timestep_decay_norm,
    "blocked": blocked.timestep_decay_norm,
    "numba": _numba,
    "triton": _triton,
}


@one_break_at_most
def timestep_decay_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    beta1: float = 0.999,
    beta2: float = 0.9999,
    count: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    padding_mask: Tensor | None = None,
    bos_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
    *,
    layout: Layout | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise each token by exponential averages of the tokens' own moments, itself included.

    With m and s the mean and population variance of a token's features in a group:
    `mean = beta1 mean + (1 - beta1) m`, `var = beta2 var + (1 - beta2) s`, and the token is normalised by
    `mean / (1 - beta1**count)` and `var / (1 - beta2**count)`. The corrections are computed without cancellation.

    Args:
        x: [B, L, D], any floating dtype.
        weight: [D] or None; the stored offset: the effective scale is `weight + 1`.
        bias: [D] or None.
        num_groups: G; a divisor of D, smaller than D.
        beta1, beta2: decay of mean and variance for each token; between 0 and 1.
        count: int64 [B]; tokens seen before. None: a fresh sequence (`mean` and `var` must then be None too).
        mean, var: [B, G]; the raw averages, that is before the correction of their bias. The returned ones have their
            dtype: pass float64 for streams of millions of tokens fed in small pieces. float32 by default (float64 for
            float64 x), never less.
        padding_mask: bool [B, L]; True where a token is padding: it gives zero and leaves the statistics alone.
        bos_mask: bool [B, L]; True where a token starts a segment: everything before it is forgotten, the row's carried
            statistics too. Ignored on padding.
        segment_ids: int [B, L]; a change along L starts a document with fresh statistics. The row's first document
            continues count, mean and var.
        eps: added to the variance.
        backend: "reference", "blocked", "numba" or "triton"; None chooses (see `megalodon.ops.backend`).
        layout: the batch's layout, in place of `segment_ids` and `padding_mask`, where it is already known.

    Returns:
        (y [B, L, D] in the dtype of x, count, raw mean, raw var after each row's last token).

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
    """
    decay = Decay(beta1, beta2)
    _check(x, num_groups, decay, padding_mask, bos_mask)
    check_devices(x.device, weight=weight, bias=bias, count=count, mean=mean, var=var)
    dim = x.shape[-1]
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape != (dim,):
            raise ValueError(f"{name} has shape {tuple(value.shape)}: it must be {(dim,)}")
    run = choose(IMPLEMENTATIONS, backend, x.device, x.dtype)
    initial = _initial(x, num_groups, count, mean, var)
    padding_mask, restart = _restarts(x, padding_mask, bos_mask, segment_ids, layout)
    with torch.autocast(x.device.type, enabled=False):
        y, last = run(x, weight, bias, initial, decay, padding_mask, restart, eps)
    return y, last.count, last.mean, last.var


def decayed_statistics(
    x: Tensor,
    num_groups: int,
    beta1: float = 0.999,
    beta2: float = 0.9999,
    padding_mask: Tensor | None = None,
    bos_mask: Tensor | None = None,
    segment_ids: Tensor | None = None,
    *,
    layout: Layout | None = None,
) -> DecayedStatistics:
    """What a span of tokens by itself leaves in fresh statistics, without normalising: `joined` puts spans together.

    Arguments are those of `timestep_decay_norm`. mean and var are in the accumulator's dtype (float64 where the device
    has it).
    """
    decay = Decay(beta1, beta2)
    _check(x, num_groups, decay, padding_mask, bos_mask)
    fresh = DecayedStatistics.fresh(x.shape[0], num_groups, accumulator_dtype(x.device), x.device)
    if x.shape[1] == 0:
        return fresh
    padding_mask, restart = _restarts(x, padding_mask, bos_mask, segment_ids, layout)
    with torch.autocast(x.device.type, enabled=False):
        u = x.to(full_precision(x.dtype))
        groups = Groups(u, num_groups)
        m, s = (value.view(*x.shape[:2], -1) for value in moments(u.flatten(0, 1), groups))
        count, mean, var = blocked.running_statistics(m, s, fresh, decay, padding_mask, restart)
    return DecayedStatistics(count[:, -1], mean[:, -1], var[:, -1])


def _check(x: Tensor, num_groups: int, decay: Decay, padding_mask: Tensor | None, bos_mask: Tensor | None) -> None:
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} of shape {tuple(x.shape)}: it must be a floating-point [B, L, D]")
    check_devices(x.device, padding_mask=padding_mask, bos_mask=bos_mask)
    batch, length, dim = x.shape
    if num_groups < 1 or dim % num_groups or num_groups == dim:
        raise ValueError(f"num_groups={num_groups} is not a divisor of D={dim} smaller than D")
    for name, beta in (("beta1", decay.mean), ("beta2", decay.var)):
        if not 0 < beta < 1:
            raise ValueError(f"{name}={beta}: it must lie between 0 and 1")
    for name, mask in (("padding_mask", padding_mask), ("bos_mask", bos_mask)):
        if mask is not None and (mask.shape != (batch, length) or mask.dtype != torch.bool):
            raise ValueError(f"{name} is {mask.dtype} of shape {tuple(mask.shape)}: it must be bool {(batch, length)}")


def _restarts(
    x: Tensor,
    padding_mask: Tensor | None,
    bos_mask: Tensor | None,
    segment_ids: Tensor | None,
    layout: Layout | None,
) -> tuple[Tensor | None, Tensor | None]:
    """(padding, where statistics are forgotten before a token), bool [B, L] each or None."""
    if layout is None:
        layout = layout_of(x.shape[0], x.shape[1], x.device, segment_ids=segment_ids)
    elif padding_mask is None:
        padding_mask = layout.padding
    restart = None if layout.starts is None else torch.from_numpy(layout.starts).to(x.device)
    if bos_mask is not None:
        begins = bos_mask if padding_mask is None else bos_mask & ~padding_mask
        restart = begins if restart is None else restart | begins
    return padding_mask, restart


def _initial(
    x: Tensor, groups: int, count: Tensor | None, mean: Tensor | None, var: Tensor | None
) -> DecayedStatistics:
    given = {"count": count, "mean": mean, "var": var}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < 3:
        raise ValueError(f"{', '.join(missing)} missing: count, mean and var are given together or not at all")
    batch = x.shape[0]
    if count is None or mean is None or var is None:
        return DecayedStatistics.fresh(batch, groups, full_precision(x.dtype), x.device)
    for name, value, shape in (
        ("count", count, (batch,)),
        ("mean", mean, (batch, groups)),
        ("var", var, (batch, groups)),
    ):
        if value.shape != shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: it must be {shape}")
    real = torch.promote_types(mean.dtype, full_precision(x.dtype))
    return DecayedStatistics(count, mean.to(real), var.to(real))
