"""The operators as torch.export sees them: one opaque operation each, whatever the length of the text.

Their eager forms cut a text into blocks, which an exported program of any length cannot hold. An exported program holds
`megalodon::exported_...` instead, which runs the eager form; to run it, import this package.
"""

# No `from __future__ import annotations` here: torch reads an operator's schema from annotations that are types.
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megalodon.ops.backend import accumulator_dtype, complex_of, full_precision
from megalodon.ops.layout import PlainLayout

WHOLE_TEXTS = (
    "torch.export takes whole texts: use_cache=False, and no padding, documents, segments or state before them"
)
"""Why something else is refused."""


@torch.library.custom_op("megalodon::exported_cema", mutates_args=())
def exported_cema(x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor | None) -> tuple[Tensor, Tensor]:
    from megalodon import ops

    return ops.cema(x, p, q, gamma, omega)


@exported_cema.register_fake
def _(x, p, q, gamma, omega):
    return torch.empty_like(x), x.new_empty(x.shape[0], *p.shape, dtype=complex_of(full_precision(x.dtype)))


@torch.library.custom_op("megalodon::exported_timestep_norm", mutates_args=())
def exported_timestep_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    count: int,
    mean: Tensor,
    var: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from megalodon import ops

    return ops.timestep_norm(x, weight, bias, groups, eps=eps, prior=ops.Prior(count, mean, var))


@exported_timestep_norm.register_fake
def _(x, weight, bias, groups, eps, count, mean, var):
    statistics = x.new_empty(x.shape[0], groups, dtype=mean.dtype)
    counted = x.new_empty(x.shape[0], dtype=torch.int64)
    return torch.empty_like(x), counted, statistics, torch.empty_like(statistics)


@torch.library.custom_op("megalodon::exported_chunk_attention", mutates_args=())
def exported_chunk_attention(q: Tensor, k: Tensor, v: Tensor, chunk_size: int) -> Tensor:
    from megalodon import ops

    return ops.chunk_attention(q, k, v, chunk_size).contiguous()


@exported_chunk_attention.register_fake
def _(q, k, v, chunk_size):
    return v.new_empty(v.shape)


@torch.library.custom_op("megalodon::exported_timestep_decay_norm", mutates_args=())
def exported_timestep_decay_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, beta1: float, beta2: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from megalodon import ops

    return ops.timestep_decay_norm(x, weight, bias, groups, beta1, beta2, eps=eps)


@exported_timestep_decay_norm.register_fake
def _(x, weight, bias, groups, beta1, beta2, eps):
    statistics = x.new_empty(x.shape[0], groups, dtype=accumulator_dtype(x.device))
    counted = x.new_empty(x.shape[0], dtype=torch.int64)
    return torch.empty_like(x), counted, statistics, torch.empty_like(statistics)


@torch.library.custom_op("megalodon::exported_sliding_chunk_attention", mutates_args=())
def exported_sliding_chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, chunk_size: int, q_before: Tensor | None
) -> Tensor:
    from megalodon import ops

    return ops.sliding_chunk_attention(q, k, v, chunk_size, q_before=q_before).contiguous()


@exported_sliding_chunk_attention.register_fake
def _(q, k, v, chunk_size, q_before):
    return v.new_empty(v.shape)


@torch.library.custom_op("megalodon::exported_working_memory", mutates_args=())
def exported_working_memory(q: Tensor, k: Tensor, v: Tensor, chunk_size: int) -> Tensor:
    from megalodon import ops

    return ops.working_memory(q, k, v, chunk_size)[0].contiguous()


@exported_working_memory.register_fake
def _(q, k, v, chunk_size):
    return v.new_empty(v.shape)


def _cema(x: Tensor, p: Tensor, q: Tensor, gamma: Tensor, omega: Tensor | None = None, *others: Any, **named: Any):
    _refuse(named.pop("layout", None), *others, named.pop("initial_state", None))
    return exported_cema(x, p, q.resolve_conj(), gamma.resolve_conj(), omega)


def _timestep_norm(x: Tensor, weight: Any, bias: Any, num_groups: int, *others: Any, eps: float = 1e-5, **named: Any):
    _refuse(named.pop("layout", None), *others)
    prior = named["prior"]
    wide = accumulator_dtype(x.device)
    return exported_timestep_norm(
        x, weight, bias, num_groups, eps, prior.count, prior.mean.to(wide, copy=True), prior.var.to(wide, copy=True)
    )


def _chunk_attention(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, **named: Any) -> Tensor:
    _refuse(named.pop("layout", None), named.pop("prefix_k", None))
    return exported_chunk_attention(q, k, v, chunk_size)


def _timestep_decay_norm(
    x: Tensor,
    weight: Any,
    bias: Any,
    num_groups: int,
    beta1: float,
    beta2: float,
    count: Any,
    mean: Any,
    var: Any,
    *,
    bos_mask: Any = None,
    eps: float = 1e-5,
    layout: Any = None,
):
    _refuse(layout, bos_mask)  # count, mean and var are those of nothing: carried ones come with a carried CEMA
    return exported_timestep_decay_norm(x, weight, bias, num_groups, beta1, beta2, eps)


def _sliding_chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, *, chunk_size: int, q_before: Tensor | None = None, **named: Any
) -> Tensor:
    _refuse(named.pop("layout", None), named.pop("segments", None), named.pop("open_k", None))
    return exported_sliding_chunk_attention(q, k, v, chunk_size, q_before)


def _working_memory(q: Tensor, k: Tensor, v: Tensor, *, chunk_size: int, **named: Any) -> tuple[Tensor, None, None]:
    _refuse(named.pop("layout", None), named.pop("segments", None), named.pop("open_k", None))
    return exported_working_memory(q, k, v, chunk_size), None, None


def _refuse(layout: Any, *others: Any) -> None:
    if not isinstance(layout, PlainLayout) or any(value is not None for value in others):
        raise NotImplementedError(WHOLE_TEXTS)


EXPORTED: dict[str, Callable[..., Any]] = {
    "cema": _cema,
    "timestep_norm": _timestep_norm,
    "chunk_attention": _chunk_attention,
    "timestep_decay_norm": _timestep_decay_norm,
    "sliding_chunk_attention": _sliding_chunk_attention,
    "working_memory": _working_memory,
}
"""By the operator's name."""
