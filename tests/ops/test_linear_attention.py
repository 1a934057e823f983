"""Linear attention and window attention: the blocked forms against the definitions in float64, over every option."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import gradcheck, relative, segments
from torch import Tensor

from megalodon.ops import Layout, LinearState, RecentKeys, Window, linear_attention, window_attention
from megalodon.ops.linear_attention import FEATURE_MAPS, blocked

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "constant": {"decay": "constant"},
    "scalar": {"decay": "scalar"},
    "vector": {"decay": "vector"},
    "normalised": {"normalise": True},
    "normalised scalar": {"normalise": True, "decay": "scalar"},
    "taylor": {"normalise": True, "feature_map": "taylor"},
    "delta": {"delta": True},
    "delta scalar": {"delta": True, "decay": "scalar"},
    "delta vector": {"delta": True, "decay": "vector"},
    "shared window": {"normalise": True, "window": 5},
    "wide shared window": {"normalise": True, "window": 90},
    "separate window": {"normalise": True, "window": 5, "shared": False, "decay": "scalar"},
}


def arguments(case: dict[str, Any], batch: int, length: int, state: bool, dtype=torch.float64) -> dict[str, Any]:
    """Inputs with gradients for a case: 4 heads of queries over 2 of keys."""
    heads, groups, size, values = 4, 2, 3, 4

    def leaf(x: Tensor) -> Tensor:
        return x.to(dtype).requires_grad_()

    normalise = case.get("normalise", False)
    given: dict[str, Any] = {
        "q": leaf(torch.randn(batch, length, heads, size)),
        "k": leaf(torch.randn(batch, length, groups, size) * 0.7),
        "v": leaf(torch.randn(batch, length, groups, values)),
        "normalise": normalise,
    }
    given["feature_map"] = case.get("feature_map", "softmax_both" if normalise else None)
    features = {"taylor": 1 + size + size * size, "softmax_both": 2 * size, None: size}[given["feature_map"]]
    shapes = {"constant": (groups,), "scalar": (batch, length, groups), "vector": (batch, length, groups, features)}
    if "decay" in case:
        given["log_decay"] = leaf(-(torch.rand(shapes[case["decay"]]) ** 4) * 5)
    if case.get("delta"):
        given["k"] = leaf(torch.nn.functional.normalize(given["k"].detach(), dim=-1))
        given["beta"] = leaf(torch.rand(batch, length, groups))
    if "window" in case:
        shared = case.get("shared", True)
        sinks = None if shared else leaf(torch.randn(heads, 2))
        given["window"] = Window(case["window"], 0.5, leaf(torch.rand(heads)), leaf(torch.rand(heads)), shared, sinks)
    if state:
        recent = None
        if "window" in case:
            kept = given["window"].kept
            recent = RecentKeys(
                leaf(torch.randn(batch, kept, groups, size)), leaf(torch.randn(batch, kept, groups, values))
            )
        weights = leaf(torch.rand(batch, groups, features) * 9) if normalise else None
        given["initial_state"] = LinearState(leaf(torch.randn(batch, groups, features, values)), weights, recent)
    return given


def leaves(given: Any) -> list[Tensor]:
    """All tensors with gradients among arguments or results."""
    if isinstance(given, Tensor):
        return [given] if given.requires_grad else []
    if isinstance(given, dict):
        given = tuple(given.values())
    return [leaf for value in given for leaf in leaves(value)] if isinstance(given, tuple | list) else []


def outcome(given: dict[str, Any], **others: Any) -> list[Tensor]:
    """Outputs, the state after, and the gradients of all inputs for a fixed weighting of both."""
    outputs = leaves(linear_attention(**given, **others))
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, dtype=torch.float64, generator=generator).to(o.dtype) for o in outputs]
    inputs = leaves(given)
    found = torch.autograd.grad(outputs, inputs, upstream, allow_unused=True)
    return [*outputs, *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True))]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """To rounding, of gradients that are zero too."""
    assert actual.numel() == expected.numel() or not expected.numel()
    if not actual.numel() or not expected.numel():
        return
    assert float((actual - expected).detach().abs().max()) < 1e-9 * max(float(expected.detach().abs().max()), 1.0)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=6)
@given(length=st.integers(1, 150), longest=st.sampled_from([0, 3, 50]), state=st.booleans(), batch=st.integers(1, 2))
def test_blocked_equals_definition(name: str, length: int, longest: int, state: bool, batch: int) -> None:
    given_arguments = arguments(CASES[name], batch, length, state)
    documents = segments(batch, length, longest) if longest else None
    expected = outcome(given_arguments, segment_ids=documents, backend="reference")
    actual = outcome(given_arguments, segment_ids=documents, backend="blocked")
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    given_arguments = arguments(CASES[name], 1, 7, True)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
    inputs = leaves(given_arguments)

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        left = iter(values)

        def rebuilt(x: Any) -> Any:
            if isinstance(x, Tensor):
                return next(left) if x.requires_grad else x
            if isinstance(x, tuple):
                return type(x)(*map(rebuilt, x))
            return x

        replaced = {key: rebuilt(x) for key, x in given_arguments.items()}
        return tuple(leaves(linear_attention(**replaced, segment_ids=documents, backend="blocked")))

    assert gradcheck(run, inputs)


@pytest.mark.parametrize("name", CASES)
def test_pieces_and_padding(name: str) -> None:
    given_arguments = arguments(CASES[name], 3, 140, False, torch.float64)
    lengths = [140, 70, 0]
    out, state = linear_attention(**given_arguments, layout=Layout(3, 140, lengths=lengths))
    for row, length in enumerate(lengths[:2]):
        alone = {
            key: x[row : row + 1, :length] if isinstance(x, Tensor) and x.ndim > 1 else x
            for key, x in given_arguments.items()
        }
        left, outs = None, []
        for first, last in ((0, 1), (1, 40), (40, 41), (41, length)):
            piece = {key: x[:, first:last] if isinstance(x, Tensor) and x.ndim > 1 else x for key, x in alone.items()}
            piece_out, left = linear_attention(
                **piece, initial_state=left, layout=Layout(1, last - first, positions=[first])
            )
            outs.append(piece_out)
        assert relative(torch.cat(outs, 1), out[row : row + 1, :length]) < 1e-10
        for one, other in zip(leaves(left), leaves(state), strict=True):
            assert relative(one[0], other[row]) < 1e-10
    assert not state.sums[2].any()


def test_long_spans_and_strong_decays_stay_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "SPAN", 128)
    for kind in ("scalar", "vector"):
        given_arguments = arguments({"decay": kind}, 1, 700, True, torch.float32)
        decay = torch.where(torch.rand_like(given_arguments["log_decay"]) < 0.05, -300.0, -1e-4)  # e^-300 is 0 here
        given_arguments["log_decay"] = decay.requires_grad_()
        wide = {key: _wide(x) for key, x in given_arguments.items()}
        for one, other in zip(outcome(given_arguments), outcome(wide, backend="reference"), strict=True):
            assert torch.isfinite(one).all()
            assert relative(one.double(), other) < 2e-5


def _wide(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach().double().requires_grad_()
    return type(x)(*map(_wide, x)) if isinstance(x, tuple) else x


def test_bfloat16_is_summed_in_float32() -> None:
    given_arguments = arguments({"normalise": True, "feature_map": "taylor"}, 1, 300, False, torch.bfloat16)
    out, state = linear_attention(**given_arguments)
    wide = {key: x.detach().float() if isinstance(x, Tensor) else x for key, x in given_arguments.items()}
    expected, expected_state = linear_attention(**wide)
    assert out.dtype == torch.bfloat16 and state.sums.dtype == torch.float32
    assert relative(out.float(), expected) < 2**-7
    assert relative(state.sums, expected_state.sums) < 1e-5


def test_taylor_features_multiply_to_the_series() -> None:
    x, y = torch.randn(2, 5, 6, dtype=torch.float64)
    s = (x * y).sum(-1) / 6**0.5
    for name, count in (("taylor", 43), ("taylor_packed", 28)):
        features = FEATURE_MAPS[name](x)
        assert features.shape[-1] == count
        assert relative((features * FEATURE_MAPS[name](y)).sum(-1), 1 + s + s * s / 2) < 1e-12


@settings(max_examples=15)
@given(
    length=st.integers(1, 200),
    window=st.sampled_from([1, 2, 7, 64, 100]),
    longest=st.sampled_from([0, 4, 60]),
    state=st.booleans(),
)
def test_window_attention_equals_definition(length: int, window: int, longest: int, state: bool) -> None:
    q, k, v = (torch.randn(2, length, h, 3, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    inputs, recent = [q, k, v], None
    if state:
        recent = RecentKeys(*(torch.randn(2, window - 1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in "kv"))
        inputs += recent
    documents = segments(2, length, longest) if longest else None
    results = []
    for backend in ("reference", "blocked"):
        out = window_attention(q, k, v, window, recent, segment_ids=documents, backend=backend)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        found = torch.autograd.grad((out * weights).sum(), inputs, allow_unused=True)
        results.append([out, *(torch.zeros(1) if g is None else g for g in found)])
    for one, other in zip(*results, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 4)}, "q and k have shapes"),
        ({"v": torch.zeros(2, 4, 2, 4)}, "v has shape"),
        ({"k": torch.zeros(2, 5, 3, 3), "v": torch.zeros(2, 5, 3, 3)}, "q has 4 heads"),
        ({"log_decay": torch.zeros(3)}, "log_decay has shape"),
        ({"beta": torch.zeros(2, 5)}, "beta has shape"),
        ({"beta": torch.zeros(2, 5, 2), "normalise": True}, "beta is given"),
        ({"window": Window(3, 1.0)}, "needs normalise=True"),
        ({"feature_map": "tailor"}, "feature_map='tailor'"),
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"initial_state": LinearState(torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3))}, "initial_state.weights"),
    ],
)
def test_bad_input_names_the_argument(change: dict[str, Any], message: str) -> None:
    given_arguments = arguments({}, 2, 5, False)
    with pytest.raises(ValueError, match=message):
        linear_attention(**{**given_arguments, **change})
