"""Window attention in blocks against its definition, wherever blocks, windows, documents and rows begin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megalodon.ops import RecentKeys, layout_of, window_attention, window_sums


def inputs(batch: int, length: int, groups: int, repeats: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(length)
    heads = groups * repeats
    shapes = ((batch, length, heads, 4), (batch, length, groups, 4), (batch, length, groups, 6))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def both(given: list[Tensor], window: int, recent: RecentKeys | None = None, **where: object) -> list[list[Tensor]]:
    """Output and gradients, by the definition and in blocks."""
    found = []
    for backend in ("reference", "blocked"):
        out = window_attention(*given, window, recent, backend=backend, **where)
        towards = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
        found.append([out, *torch.autograd.grad((out * towards).sum(), given)])
    return found


@pytest.mark.parametrize("window", [1, 3, 64, 200, 600])
@pytest.mark.parametrize("length", [1, 5, 64, 130, 201])
@pytest.mark.parametrize(("groups", "repeats"), [(2, 1), (1, 3)])
def test_blocks_equal_the_definition(window: int, length: int, groups: int, repeats: int) -> None:
    right, found = both(inputs(2, length, groups, repeats), window)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    window=st.sampled_from([1, 2, 7, 64, 100]),
    length=st.integers(1, 140),
    seen=st.lists(st.integers(0, 150), min_size=2, max_size=2),
    cuts=st.lists(st.integers(0, 140), max_size=3),
)
def test_rows_that_go_on_and_documents(window: int, length: int, seen: list[int], cuts: list[int]) -> None:
    given_, positions = inputs(2, length, 2, 2), torch.tensor(seen)
    torch.manual_seed(3)
    before = window - 1
    filled = torch.arange(before - 1, -1, -1)[None, :, None, None] < positions[:, None, None, None]
    recent = RecentKeys(*(torch.randn(2, before, 2, size, dtype=torch.float64) * filled for size in (4, 6)))
    ids = (torch.arange(length)[:, None] >= torch.tensor([*cuts, length])).sum(1)[None].expand(2, -1)
    layout = layout_of(2, length, torch.device("cpu"), segment_ids=ids, positions=positions)
    right, found = both(given_, window, recent, layout=layout)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [4, 100])
def test_sums_are_what_the_attention_divides(window: int) -> None:
    q, k, v = inputs(2, 90, 2, 2)
    sums = window_sums(q, k, v, window, backend="blocked")
    out = window_attention(q, k, v, window, backend="blocked")
    torch.testing.assert_close(sums.values / sums.weights[..., None], out, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [4, 100])
def test_autocast_and_bfloat16_keep_the_dtype_of_values(window: int) -> None:
    q, k, v = (x.detach() for x in inputs(1, 20, 1, 2, torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        out = window_attention(q, k, v, window, backend="blocked")
    right = window_attention(q.double(), k.double(), v.double(), window, backend="reference")
    assert out.dtype == torch.bfloat16 and (out - right).abs().max() < 0.02 * right.abs().max()


def test_no_tokens() -> None:
    assert window_attention(*inputs(2, 0, 2, 2), 8, backend="blocked").shape == (2, 0, 4, 6)
    assert window_attention(*inputs(0, 5, 2, 2), 8, backend="blocked").shape == (0, 5, 4, 6)
