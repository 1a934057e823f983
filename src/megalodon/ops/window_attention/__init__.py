"""Causal softmax attention over the last W tokens of each document, with its sums at hand for those who add to them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megalodon.ops.backend import Implementations, check_devices, choose
from megalodon.ops.compiling import one_break_at_most
from megalodon.ops.layout import Layout, document_numbers, layout_of
from megalodon.ops.window_attention import blocked, reference
from megalodon.ops.window_attention.sums import WindowSums

__all__ = ["IMPLEMENTATIONS", "RecentKeys", "WindowSums", "two_way_window_attention", "window_attention", "window_sums"]

IMPLEMENTATIONS: Implementations = {"reference": reference.window_sums, "blocked": blocked.window_sums}

_ATTENTION: Implementations = {"reference": reference.window_attention, "blocked": blocked.window_attention}


class RecentKeys(NamedTuple):
    """Keys [B, n, G, d] and values [B, n, G, e] of the last n >= W - 1 tokens, right-aligned; zeros where there are
    fewer."""

    keys: Tensor
    values: Tensor


@one_break_at_most
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    recent: RecentKeys | None = None,
    *,
    segment_ids: Tensor | None = None,
    layout: Layout | None = None,
    backend: str | None = None,
) -> Tensor:
    """Each token attends to itself and to the W - 1 tokens before it in its document; scores are not scaled.

    Args:
        q: [B, L, H, d]; k: [B, L, G, d]; v: [B, L, G, e]. Query head h uses head h // (H / G).
        window: W, at least 1, the token itself included.
        recent: what was read before. None: nothing.
        segment_ids: int [B, L]; a change along L starts a document.
        layout: the batch's layout, in place of `segment_ids`; it knows how much of `recent` is filled.
        backend: "reference" or "blocked"; None chooses (see `megalodon.ops.backend`).

    Returns:
        [B, L, H, e] in the dtype of v.

    Raises:
        ValueError: a shape or device does not fit; the message names the argument.
    """
    layout = _checked(q, k, v, window, recent, segment_ids, layout)
    return choose(_ATTENTION, backend, q.device, q.dtype)(q, k, v, window, recent, layout)


@one_break_at_most
def window_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    recent: RecentKeys | None = None,
    *,
    segment_ids: Tensor | None = None,
    layout: Layout | None = None,
    backend: str | None = None,
) -> WindowSums:
    """`window_attention` before its division: arguments are the same, sums are in float32 or better."""
    layout = _checked(q, k, v, window, recent, segment_ids, layout)
    return choose(IMPLEMENTATIONS, backend, q.device, q.dtype)(q, k, v, window, recent, layout)


def two_way_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    segment_ids: Tensor | None = None,
    layout: Layout | None = None,
    backend: str | None = None,
) -> Tensor:
    """Each token attends to itself and to the W - 1 tokens on either side of it in its document.

    Arguments and errors are those of `window_attention`. Returns [B, L, H, e] in the dtype of v; what stands at padding
    means nothing.
    """
    layout = _checked(q, k, v, window, None, segment_ids, layout)
    documents = document_numbers(layout)
    before = window_sums(q, k, v, window, segment_ids=documents, backend=backend)
    turned = window_sums(q.flip(1), k.flip(1), v.flip(1), window, segment_ids=documents.flip(1), backend=backend)
    after = WindowSums(*(part.flip(1) for part in turned))
    highest = torch.maximum(before.highest, after.highest)
    first, second = ((side.highest - highest).exp() for side in (before, after))
    groups = q.shape[2] // k.shape[2]
    own = ((q.unflatten(2, (-1, groups)) * k[:, :, :, None]).sum(-1).flatten(2, 3).to(highest.dtype) - highest).exp()
    values = before.values * first[..., None] + after.values * second[..., None]
    values = values - own[..., None] * v.repeat_interleave(groups, 2).to(values.dtype)
    return (values / (before.weights * first + after.weights * second - own)[..., None]).to(v.dtype)


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    recent: RecentKeys | None,
    segment_ids: Tensor | None,
    layout: Layout | None,
) -> Layout:
    if window < 1:
        raise ValueError(f"window={window}: it must be at least 1, the token itself included")
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k have shapes {tuple(q.shape)} and {tuple(k.shape)}: [B, L, H, d] and [B, L, G, d]")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {tuple(v.shape)}: it must be [B, L, G, e] with B, L, G = {tuple(k.shape[:3])}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads: they must be a multiple of the {k.shape[2]} of k and v")
    check_devices(q.device, k=k, v=v)
    if recent is not None:
        for name, value, like in (("recent.keys", recent.keys, k), ("recent.values", recent.values, v)):
            if (value.shape[0], *value.shape[2:]) != (like.shape[0], *like.shape[2:]) or value.shape[1] < window - 1:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}: it must be like {tuple(like.shape)}, with at least "
                    f"window - 1 = {window - 1} tokens"
                )
    if layout is None:
        positions = None if recent is None else [recent.keys.shape[1]] * q.shape[0]
        layout = layout_of(q.shape[0], q.shape[1], q.device, segment_ids=segment_ids, positions=positions)
    return layout
