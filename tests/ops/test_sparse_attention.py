"""Sparse attention: the strips against the definition, over masks, lists of keys, groups of heads and query blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import gradcheck, gradients, relative
from torch import Tensor

from megalodon.ops import sparse_attention
from megalodon.ops.sparse_attention import blocked


def attention_inputs(
    batch: int, length: int, size: int, groups: int, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """q of 4 heads of 3, k, v of `groups` heads, with gradients."""
    values = {
        "q": torch.randn(batch, length, 4, 3, dtype=dtype),
        "k": torch.randn(batch, size, groups, 3, dtype=dtype),
        "v": torch.randn(batch, size, groups, 5, dtype=dtype),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def key_lists(batch: int, heads: int, blocks: int, count: int, size: int) -> Tensor:
    """Random lists without repetition, a quarter of them left empty."""
    lists = torch.rand(batch, heads, blocks, size).argsort(-1)[..., :count]
    return lists.masked_fill(torch.rand(lists.shape) < 0.25, -1)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 40),
    size=st.integers(2, 50),
    groups=st.sampled_from([1, 2, 4]),
    per_head=st.booleans(),
    form=st.sampled_from(["mask", "keys", "both"]),
    query_block=st.sampled_from([1, 3, 8]),
    strip=st.sampled_from([50, 2**21]),
    advantage=st.sampled_from([0, 1000]),
)
def test_blocked_equals_definition(
    batch: int,
    length: int,
    size: int,
    groups: int,
    per_head: bool,
    form: str,
    query_block: int,
    strip: int,
    advantage: int,
) -> None:
    inputs = attention_inputs(batch, length, size, groups)
    count = min(size, 4)
    keys = None if form == "mask" else key_lists(batch, groups, -(-length // query_block), count, size)
    mask = None
    if form != "keys":
        mask = torch.rand(1, 4 if per_head else 1, length, size if keys is None else count) < 0.4
    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "STRIP_NUMBERS", strip)
        patch.setattr(blocked, "GATHER_ADVANTAGE", advantage)
        for backend in ("reference", "blocked"):
            options = {"mask": mask, "keys": keys, "query_block": query_block, "backend": backend, "scale": 0.7}
            y = sparse_attention(**inputs, **options)
            results[backend] = (y, *gradients((y,), inputs).values())
    for actual, expected in zip(results["blocked"], results["reference"], strict=True):
        assert (actual - expected).detach().abs().max() < 1e-11 * max(1.0, float(expected.detach().abs().max()))


def test_gradcheck() -> None:
    inputs = attention_inputs(2, 5, 6, 2)
    mask = torch.rand(2, 4, 5, 6) < 0.4
    lists = key_lists(2, 1, 3, 4, 6)
    for options in ({"mask": mask}, {"keys": lists, "query_block": 2}):

        def call(*values: Tensor, options: dict = options) -> Tensor:
            return sparse_attention(*values, **options)

        assert gradcheck(call, tuple(inputs.values()))


def test_a_query_that_sees_nothing_gives_zero_and_no_gradient() -> None:
    inputs = attention_inputs(1, 3, 4, 4)
    mask = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)[None, None]
    y = sparse_attention(**inputs, mask=mask)
    assert not y[:, 1].any()
    found = gradients((y,), inputs)
    assert not found["q"][:, 1].any() and not found["v"][:, 3].any()
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


def test_bfloat16_is_summed_in_float32() -> None:
    inputs = {name: x.detach().bfloat16() for name, x in attention_inputs(1, 50, 60, 2, torch.float32).items()}
    mask = torch.rand(1, 1, 50, 60) < 0.5
    y = sparse_attention(**inputs, mask=mask)
    expected = sparse_attention(**{name: x.float() for name, x in inputs.items()}, mask=mask)
    assert y.dtype == torch.bfloat16 and relative(y.float(), expected) < 2**-8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 3)}, "q is"),
        ({"k": torch.zeros(2, 6, 3, 3)}, "divisor of 4 heads"),
        ({"v": torch.zeros(2, 6, 1, 5)}, "v has shape"),
        ({"mask": None}, "mask and keys are None"),
        ({"mask": torch.zeros(2, 1, 5, 6)}, "mask is torch.float32"),
        ({"mask": torch.zeros(2, 1, 5, 4, dtype=torch.bool)}, "mask is"),
        ({"mask": None, "keys": torch.zeros(2, 1, 5, 3)}, "keys is torch.float32"),
        ({"mask": None, "keys": torch.zeros(2, 3, 5, 3, dtype=torch.int64)}, "keys has 3 heads"),
        ({"query_block": 0}, "query_block=0"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_bad_input_names_the_argument(change: dict, message: str) -> None:
    inputs = {name: x.detach() for name, x in attention_inputs(2, 5, 6, 2).items()}
    with pytest.raises(ValueError, match=message):
        sparse_attention(**{**inputs, "mask": torch.ones(1, 1, 5, 6, dtype=torch.bool), **change})


def test_golden_hip(shared) -> None:
    from safetensors.torch import load_file

    golden = load_file(shared / "golden/kin/hip.safetensors")
    for case in ("a", "b"):
        q, k, v, mask, y = (golden[f"{case}.{name}"] for name in ("q", "k", "v", "mask", "y"))
        found = sparse_attention(q[:, :, None], k[:, :, None], v[:, :, None], mask[:, None])
        assert relative(found[:, :, 0], y) < 1e-6
