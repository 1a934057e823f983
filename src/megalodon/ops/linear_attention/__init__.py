"""Linear attention with every option that the kin need: features, decays, a normaliser, a window, the delta rule.

Per head, with features phi and the log decay g (a = exp(g)):

    S_t = a_t S_{t-1} + phi(k_t) v_t^T,  z_t = a_t z_{t-1} + phi(k_t)         the state
    o_t = phi(q_t)^T S_t                 or, normalised, phi(q_t)^T S_t / (phi(q_t)^T z_t + eps)

The write comes before the read: a token sees itself, undecayed. With the delta rule, what is written is what the state
does not already say of the key: `beta_t (v_t - (a_t S_{t-1})^T k_t)` in place of v_t.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from megalodon.ops.backend import Implementations, check_devices, choose, full_precision
from megalodon.ops.compiling import one_break_at_most
from megalodon.ops.layout import Layout, layout_of
from megalodon.ops.linear_attention import blocked, reference, two_way
from megalodon.ops.linear_attention.feature_maps import FEATURE_MAPS, FeatureMap
from megalodon.ops.recent import delayed, recent_after, with_recent
from megalodon.ops.window_attention import RecentKeys, window_sums

__all__ = [
    "FEATURE_MAPS",
    "IMPLEMENTATIONS",
    "LinearState",
    "Window",
    "cross_linear_attention",
    "linear_attention",
    "two_way_linear_attention",
]

IMPLEMENTATIONS: Implementations = {"reference": reference.linear_attention, "blocked": blocked.linear_attention}

_TWO_WAY: Implementations = {"reference": reference.both_sides, "blocked": two_way.both_sides}


class LinearState(NamedTuple):
    """What linear attention remembers.

    Attributes:
        sums: [B, G, f, e], float32 or float64; S.
        weights: [B, G, f], likewise; z. None without a normaliser.
        recent: the keys and values of the last tokens, before the feature map; None without a window.
    """

    sums: Tensor
    weights: Tensor | None = None
    recent: RecentKeys | None = None


class Window(NamedTuple):
    """Softmax attention over the last `size` tokens, added to what the state gives.

    Attributes:
        size: W; the token itself included.
        scale: of the scores.
        weight: [H] or a number; of the window's part.
        linear_weight: [H] or a number; of the state's part.
        shared: one normaliser divides the sum of both parts, and a key enters the state when it leaves the window
            (2410.10254). Otherwise each part is divided by its own, and the state holds every key (2507.09025).
        sinks: [H, m]; scores of keys without values. Not with `shared`.
    """

    size: int
    scale: float
    weight: Tensor | float = 1.0
    linear_weight: Tensor | float = 1.0
    shared: bool = True
    sinks: Tensor | None = None

    @property
    def kept(self) -> int:
        """Tokens of `LinearState.recent`."""
        return self.size if self.shared else self.size - 1


FeatureMaps = str | FeatureMap | tuple[FeatureMap, FeatureMap] | None


@one_break_at_most
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMaps = None,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    normalise: bool = False,
    eps: float = 0.0,
    window: Window | None = None,
    initial_state: LinearState | None = None,
    segment_ids: Tensor | None = None,
    layout: Layout | None = None,
    backend: str | None = None,
) -> tuple[Tensor, LinearState]:
    """Linear attention along time; see the module's head.

    Computed in float32 (float64 for float64 input) whatever the dtype of the input, under autocast too. Scores are not
    scaled.

    Args:
        q: [B, L, H, d]; k: [B, L, G, d]; v: [B, L, G, e]. Query head h uses head h // (H / G).
        feature_map: of the last dimension of q and k: a name of `FEATURE_MAPS`, a function, or one each for q and k.
            None: q and k are the features. The map of k may turn its G heads into H, one for each query head.
        log_decay: at most 0. [G]: constant; [B, L, G]: one number a token; [B, L, G, f]: one a feature. None: no decay.
        beta: [B, L, G]; the delta rule's strength of writing. Not with a normaliser or a window.
        normalise: divide by the sum of weights, `eps` added. Features should be positive.
        window: a softmax part, with `normalise` only.
        initial_state: what was read before. None: nothing.
        segment_ids: int [B, L]; a change along L starts a document with an empty state. The row's first document
            continues `initial_state`.
        layout: the batch's layout, in place of `segment_ids`, where it is already known. Tokens beyond its `lengths`
            leave the state alone.
        backend: "reference" or "blocked"; None chooses (see `megalodon.ops.backend`).

    Returns:
        (o [B, L, H, e] in the dtype of v, the state after each row's last token).

    Raises:
        ValueError: a shape, device or option does not fit; the message names the argument.
    """
    _check(q, k, v, beta, normalise, window, initial_state, log_decay)
    if layout is None:
        positions = None
        if initial_state is not None and initial_state.recent is not None:
            positions = [initial_state.recent.keys.shape[1]] * q.shape[0]
        layout = layout_of(q.shape[0], q.shape[1], q.device, segment_ids=segment_ids, positions=positions)
    run = choose(IMPLEMENTATIONS, backend, q.device, q.dtype)
    map_q, map_k = _maps(feature_map)
    wide = full_precision(q.dtype)
    recent = None if initial_state is None else initial_state.recent
    keys, values, left = k, v, None
    if window is not None:
        old_keys, old_values = (None, None) if recent is None else recent
        joined = RecentKeys(with_recent(old_keys, k, window.kept), with_recent(old_values, v, window.kept))
        left = RecentKeys(*(recent_after(x, window.kept, layout) for x in joined))
        if window.shared:
            keys, values = (delayed(x, window.kept, window.size, layout) for x in joined)
    phi_q, phi_k = map_q(q.to(wide)), map_k(keys.to(wide))
    if phi_k.shape[2] != values.shape[2]:  # a map of its own for each query head
        values = values.repeat_interleave(phi_k.shape[2] // values.shape[2], 2)
    if window is not None and window.shared:
        phi_k = phi_k * _has_left(window.size, layout, phi_k)
    if log_decay is not None:
        _check_decay(log_decay, phi_k)
        log_decay = log_decay.to(wide)
    start = None if initial_state is None else (initial_state.sums.to(wide), _wide(initial_state.weights, wide))
    numerator, denominator, sums, weights = run(
        phi_q, phi_k, values.to(wide), log_decay, None if beta is None else beta.to(wide), normalise, start, layout
    )
    if window is None:
        out = numerator if denominator is None else numerator / (denominator + eps)[..., None]
    else:
        assert denominator is not None
        parts = window_sums(q * window.scale, k, v, window.size, recent, layout=layout, backend=backend)
        out = _with_window(numerator, denominator, parts, window, eps)
    return out.to(v.dtype), LinearState(sums, weights, left)


@one_break_at_most
def two_way_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMaps = None,
    log_decay: Tensor | None = None,
    normalise: bool = False,
    eps: float = 0.0,
    segment_ids: Tensor | None = None,
    layout: Layout | None = None,
    backend: str | None = None,
) -> Tensor:
    """Linear attention in which every token sees the whole of its document.

    With decays, a token on the other side counts less by the decays of all tokens from the reader on up to it, its own
    not among them: `exp(g_t + .. + g_{j-1})` for j > t, as it is `exp(g_{j+1} + .. + g_t)` for j < t.

    Arguments and errors are those of `linear_attention`. Returns [B, L, H, e] in the dtype of v; what stands at padding
    means nothing.
    """
    _check(q, k, v, None, normalise, None, None, log_decay)
    if layout is None:
        layout = layout_of(q.shape[0], q.shape[1], q.device, segment_ids=segment_ids)
    run = choose(_TWO_WAY, backend, q.device, q.dtype)
    map_q, map_k = _maps(feature_map)
    wide = full_precision(q.dtype)
    phi_q, phi_k, values = map_q(q.to(wide)), map_k(k.to(wide)), v.to(wide)
    if phi_k.shape[2] != values.shape[2]:
        values = values.repeat_interleave(phi_k.shape[2] // values.shape[2], 2)
    if log_decay is not None:
        _check_decay(log_decay, phi_k)
        log_decay = log_decay.to(wide)
    return run(phi_q, phi_k, values, log_decay, normalise, eps, layout).to(v.dtype)


def cross_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: FeatureMaps = None,
    normalise: bool = False,
    eps: float = 0.0,
    padding: Tensor | None = None,
) -> Tensor:
    """Linear attention of one sequence over the whole of another.

    Args:
        q: [B, L, H, d]; k: [B, M, G, d]; v: [B, M, G, e]. Query head h uses head h // (H / G).
        padding: bool [B, M]; True where a key is padding.

    The other arguments are those of `linear_attention`. Returns [B, L, H, e] in the dtype of v.

    Raises:
        ValueError: a shape or device does not fit; the message names the argument.
    """
    _check(q[:, :0], k[:, :0], v[:, :0], None, normalise, None, None, None)
    if padding is not None and padding.shape != k.shape[:2]:
        raise ValueError(f"padding has shape {tuple(padding.shape)}: it must be [B, M] = {tuple(k.shape[:2])}")
    map_q, map_k = _maps(feature_map)
    wide = full_precision(q.dtype)
    phi_q, phi_k, values = map_q(q.to(wide)), map_k(k.to(wide)), v.to(wide)
    if phi_k.shape[2] != values.shape[2]:
        values = values.repeat_interleave(phi_k.shape[2] // values.shape[2], 2)
    return two_way.across(phi_q, phi_k, values, padding, normalise, eps).to(v.dtype)


def _with_window(numerator: Tensor, denominator: Tensor, parts, window: Window, eps: float) -> Tensor:
    """The two parts under one normaliser or two; the highest score is the window's alone, as published."""
    values, total = parts.values, parts.weights
    weight, linear_weight = window.weight, window.linear_weight
    if window.shared:
        below = weight * total + linear_weight * denominator + eps
        above = _each(weight) * values + _each(linear_weight) * numerator
        return above / below[..., None]
    if window.sinks is not None:
        highest = parts.highest.maximum(window.sinks.detach().amax(-1))
        shrink = (parts.highest - highest).exp()
        values = values * shrink[..., None]
        total = total * shrink + (window.sinks - highest[..., None]).exp().sum(-1)
    linear = numerator / (denominator + eps)[..., None]
    return _each(linear_weight) * linear + _each(weight) * values / total[..., None]


def _each(weight: Tensor | float) -> Tensor | float:
    return weight[..., None] if isinstance(weight, Tensor) else weight


def _wide(x: Tensor | None, dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _has_left(window: int, layout: Layout, like: Tensor) -> Tensor:
    """1 where some token of the document has left the window, else 0: [1 or B, L, 1, 1]."""
    places = layout.token_positions
    places = places if places.ndim == 2 else places[None]
    return (places >= window).to(like.dtype)[..., None, None]


def _maps(feature_map: FeatureMaps) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    if isinstance(feature_map, tuple):
        return feature_map
    if isinstance(feature_map, str):
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map={feature_map!r}: choose from {', '.join(FEATURE_MAPS)}")
        feature_map = FEATURE_MAPS[feature_map]
    return (feature_map, feature_map) if feature_map is not None else (_same, _same)


def _same(x: Tensor) -> Tensor:
    return x


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    normalise: bool,
    window: Window | None,
    state: LinearState | None,
    log_decay: Tensor | None,
) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q and k have shapes {tuple(q.shape)} and {tuple(k.shape)}: [B, L, H, d] and [B, L, G, d]")
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v has shape {tuple(v.shape)}: it must be [B, L, G, e] with B, L, G = {tuple(k.shape[:3])}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads: they must be a multiple of the {k.shape[2]} of k and v")
    check_devices(q.device, k=k, v=v, beta=beta, log_decay=log_decay)
    if beta is not None and (normalise or window is not None):
        raise ValueError("beta is given: the delta rule has no normaliser and no window")
    if beta is not None and beta.shape != k.shape[:3]:
        raise ValueError(f"beta has shape {tuple(beta.shape)}: it must be [B, L, G] = {tuple(k.shape[:3])}")
    if window is not None and not normalise:
        raise ValueError("window is given: it needs normalise=True")
    if window is not None and window.shared and window.sinks is not None:
        raise ValueError("window.sinks are given: they need shared=False")
    if state is not None and (state.weights is None) == normalise:
        raise ValueError(f"initial_state.weights are given or not: normalise={normalise} asks for the other")
    kept = 0 if window is None else window.kept
    if state is not None and window is not None and (state.recent is None or state.recent.keys.shape[1] != kept):
        raise ValueError(f"initial_state.recent must hold {kept} tokens for this window")


def _check_decay(log_decay: Tensor, phi_k: Tensor) -> None:
    groups, features = phi_k.shape[2:]
    if log_decay.shape not in (phi_k.shape, phi_k.shape[:3], (groups,)):
        raise ValueError(
            f"log_decay has shape {tuple(log_decay.shape)}: it must be [G] = [{groups}], [B, L, G] or "
            f"[B, L, G, f] = {tuple(phi_k.shape)}, f = {features} features"
        )
