"""Chunk attention's kernels against the definition in float64: lopsided heads, caches, packings, dropout, decoding."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICES, OPCHECKS, largest_error, narrow, poisoned_and_fresh, widen  # noqa: F401
from operator_cases import relative, segments
from torch import Tensor

from megalodon.ops import Layout, causal_attention, chunk_attention

FORMS = ("triton-fused", "triton-strips")


@pytest.fixture(autouse=True)
def small_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of a few rows, so that small inputs have several."""
    from megalodon.ops.chunk_attention import strips

    monkeypatch.setattr(strips, "STRIP", (8, 16))
    monkeypatch.setattr(strips, "ROWS_AT_ONCE", 32)


def inputs_of(
    device: str, dtype: torch.dtype, batch: int, length: int, heads: int, key: int, value: int, cache: int = 0
):
    sizes = {"q": key, "k": key, "v": value}
    values = {name: torch.randn(batch, length, heads, size) for name, size in sizes.items()}
    if cache:
        values |= {f"prefix_{name}": torch.randn(batch, cache, heads, sizes[name]) for name in ("k", "v")}
    return narrow(values, device, dtype, tuple(values))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("batch", "length", "heads", "key", "value", "chunk", "longest", "cache"),
    [
        (2, 50, 2, 4, 6, 33, 0, 0),
        (1, 45, 1, 16, 32, 16, 20, 0),
        (2, 30, 2, 16, 20, 24, 0, 13),
        (3, 25, 1, 8, 16, 20, 15, 7),
        (1, 7, 1, 12, 150, 64, 0, 0),
        (1, 5, 2, 4, 4, 1, 0, 0),
        (3, 40, 1, 4, 6, 20, 0, 0),
    ],
)
def test_float32(device, form, batch, length, heads, key, value, chunk, longest, cache) -> None:
    inputs = inputs_of(device, torch.float32, batch, length, heads, key, value, cache)
    wide = widen(inputs)
    others: dict = {"chunk_size": chunk, "segment_ids": segments(batch, length, longest) if longest else None}
    if cache and longest:
        others["prefix_lengths"] = torch.randint(0, cache + 1, (batch,))
    errors = largest_error(
        (chunk_attention(**inputs, **others, backend=form),),
        (chunk_attention(**wide, **others, backend="reference"),),
        inputs,
        wide,
    )
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(device: str, form: str) -> None:
    inputs = inputs_of(device, torch.bfloat16, 1, 80, 1, 16, 300)
    wide = widen(inputs)
    out = chunk_attention(**inputs, chunk_size=70, backend=form)
    assert out.dtype == torch.bfloat16
    errors = largest_error((out,), (chunk_attention(**wide, chunk_size=70, backend="reference"),), inputs, wide)
    assert errors.pop("output 0") < 2**-6
    assert max(errors.values()) < 0.05, (
        errors
    )  # as of plain PyTorch in bfloat16: 0.01 as a rule, 0.026 in one of 60 draws


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
def test_padding_gives_zeros(device: str, form: str) -> None:
    inputs = inputs_of(device, torch.float32, 3, 20, 1, 4, 4)
    wide = widen(inputs)
    lengths = [20, 9, 0]
    out = chunk_attention(
        **inputs, chunk_size=8, layout=Layout(3, 20, device, lengths=lengths, chunk_size=8), backend=form
    )
    expected = chunk_attention(
        **wide, chunk_size=8, layout=Layout(3, 20, lengths=lengths, chunk_size=8), backend="reference"
    )
    errors = largest_error((out,), (expected,), inputs, wide)
    assert max(errors.values()) < 1e-5, errors
    assert not out[1, 9:].any() and not out[2].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
def test_large_scores_do_not_overflow(device: str, form: str) -> None:
    inputs = inputs_of(device, torch.float32, 1, 40, 1, 8, 8)
    with torch.no_grad():
        inputs["q"] *= 100
    wide = widen(inputs)
    out = chunk_attention(**inputs, chunk_size=40, backend=form)
    assert relative(out.to("cpu", torch.float64), chunk_attention(**wide, chunk_size=40, backend="reference")) < 1e-4


def weights_of(q: Tensor, k: Tensor, dropout: float, dropkey: bool, form: str) -> Tensor:
    """The matrix of weights [C, C] after dropout: attention over values that are the identity."""
    length = q.shape[1]
    identity = torch.eye(length, device=q.device).view(1, length, 1, length).contiguous()
    out = chunk_attention(q, k, identity, length, dropout=dropout, dropkey=dropkey, backend=form)
    return out[0, :, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dropkey", [False, True])
def test_dropout_is_the_same_in_both_passes(device: str, dropkey: bool, form: str) -> None:
    inputs = inputs_of(device, torch.float32, 1, 40, 1, 8, 8)
    seed = int(torch.randint(2**31, ()))

    def drawn(run):
        torch.manual_seed(seed)
        return run()

    dropped = drawn(lambda: weights_of(inputs["q"].detach(), inputs["k"].detach(), 0.4, dropkey, form)).cpu() == 0
    hidden = torch.ones(40, 40).triu(1).bool()
    assert dropped[hidden].all()
    assert 0.2 < dropped[~hidden].float().mean() < 0.6
    assert not (dropkey and dropped.diagonal().any()), "a token always sees itself"

    wide = widen(inputs)
    scores = torch.einsum("bqhd,bkhd->bhqk", wide["q"], wide["k"]).masked_fill(hidden, -torch.inf)
    if dropkey:
        weights = scores.masked_fill(dropped, -torch.inf).softmax(-1)
    else:
        weights = scores.softmax(-1).masked_fill(dropped, 0) / 0.6
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, wide["v"])
    out = drawn(lambda: chunk_attention(**inputs, chunk_size=40, dropout=0.4, dropkey=dropkey, backend=form))
    errors = largest_error((out,), (expected,), inputs, wide)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_differs_between_calls_and_heads(device: str) -> None:
    q = torch.zeros(1, 16, 2, 4, device=device)
    v = torch.eye(16, device=device).view(1, 16, 1, 16).expand(-1, -1, 2, -1)
    first, second = (chunk_attention(q, q, v, 16, dropout=0.5, backend="triton") for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first[:, :, 0], first[:, :, 1])


@pytest.mark.parametrize("device", DEVICES)
def test_decoding(device: str) -> None:
    inputs = {k: v.detach() for k, v in inputs_of(device, torch.float32, 3, 150, 2, 8, 20).items()}
    wide = {k: v.detach() for k, v in widen(inputs).items()}
    for offset in (0, 5, 149, torch.tensor([1, 149, 64])):
        out = causal_attention(
            inputs["q"][:, :1],
            inputs["k"],
            inputs["v"],
            offset.to(device) if isinstance(offset, Tensor) else offset,
            backend="triton",
        )
        expected = causal_attention(wide["q"][:, :1], wide["k"], wide["v"], offset, backend="blocked")
        assert relative(out.to("cpu", torch.float64), expected) < 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("in_strips", [False, True])
def test_several_queries_in_an_open_chunk(device: str, in_strips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from megalodon.ops.chunk_attention import triton

    monkeypatch.setattr(triton, "in_strips", lambda *_: in_strips)
    inputs = inputs_of(device, torch.float32, 2, 12, 1, 8, 12)
    wide = widen(inputs)
    out = causal_attention(inputs["q"][:, :5], inputs["k"], inputs["v"], 4, backend="triton")
    expected = causal_attention(wide["q"][:, :5], wide["k"], wide["v"], 4, backend="blocked")
    errors = largest_error((out,), (expected,), inputs, wide)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("device", DEVICES)
def test_heads_that_do_not_fit_go_through_the_blocked_form(device: str) -> None:
    inputs = {k: v.detach() for k, v in inputs_of(device, torch.float32, 1, 9, 1, 130, 4).items()}
    blocked, kernels = (chunk_attention(**inputs, chunk_size=4, backend=name) for name in ("blocked", "triton"))
    assert torch.equal(blocked, kernels)


@pytest.mark.parametrize("device", DEVICES)
def test_heads_of_several_dtypes_go_through_the_blocked_form(device: str) -> None:
    q, k, v = (torch.randn(1, 9, 1, 8, device=device) for _ in range(3))
    for arguments in ((q.bfloat16(), k, v), (q, k.bfloat16(), v), (q, k, v.bfloat16())):
        blocked, kernels = (chunk_attention(*arguments, chunk_size=4, backend=name) for name in ("blocked", "triton"))
        assert torch.equal(blocked, kernels)


@pytest.mark.parametrize("utilities", OPCHECKS)
@pytest.mark.parametrize("device", DEVICES)
def test_operators_pass_opcheck(device: str, utilities: tuple[str, ...]) -> None:
    from megalodon.ops.chunk_attention import strips, triton

    values = inputs_of(device, torch.float32, 2, 10, 1, 4, 4, cache=3)
    for cached in (False, True):
        cache = (values["prefix_k"], values["prefix_v"]) if cached else (None, None)
        shape = [6, 3, 3] if cached else [6, 0, 0]
        tail = (None, shape, None, None, None, 0.0, False)
        arguments = (values["q"], values["k"], values["v"], *cache, *tail)
        torch.library.opcheck(triton.attention_op, arguments, test_utils=utilities)
        detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in arguments)
        out, lse = triton.attention_op(*detached)
        torch.library.opcheck(
            triton.attention_backward_op, (torch.randn_like(out), out, lse, *detached), test_utils=utilities
        )
    q, k, v = (values[name].detach() for name in ("q", "k", "v"))
    for tail in ((None, [6], [], 0.0, False), (None, [], [0, 10, 10, 0, 10, 10, 2], 0.0, False)):
        torch.library.opcheck(
            strips.strip_attention_op, (values["q"], values["k"], values["v"], *tail), test_utils=utilities
        )
        out, lse = strips.strip_attention_op(q, k, v, *tail)
        torch.library.opcheck(
            strips.strip_attention_backward_op, (torch.randn_like(out), out, lse, q, k, v, *tail), test_utils=utilities
        )
    torch.library.opcheck(
        triton.decode_op, (q[:, :1].contiguous(), k, v, torch.tensor([1, 9], device=device), 0), test_utils=utilities
    )


@pytest.mark.parametrize("form", FORMS)
def test_compiles_without_graph_breaks(form: str) -> None:
    q = torch.randn(1, 20, 2, 4, requires_grad=True)

    def run(q: Tensor) -> Tensor:
        return chunk_attention(q, q, q, 8, backend=form).sin()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(q)
    assert torch.equal(compiled, run(q))
    (actual,), (expected,) = (torch.autograd.grad(y.sum(), q) for y in (compiled, run(q)))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_wide_values_of_long_chunks_go_in_strips(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megalodon.ops.chunk_attention import strips

    monkeypatch.setattr(strips, "STRIP", (128, 512))
    monkeypatch.setattr(strips, "ROWS_AT_ONCE", 2048)
    inputs = inputs_of(device, torch.bfloat16, 1, 530, 1, 16, 784)
    wide = widen(inputs)
    outs = [chunk_attention(**inputs, chunk_size=600, backend=name) for name in ("triton", FORMS[1])]
    assert torch.equal(*outs)
    assert not torch.equal(outs[0], chunk_attention(**inputs, chunk_size=600, backend=FORMS[0]))
    errors = largest_error((outs[0],), (chunk_attention(**wide, chunk_size=600, backend="blocked"),), inputs, wide)
    assert errors.pop("output 0") < 2**-6
    assert max(errors.values()) < 0.05, errors
