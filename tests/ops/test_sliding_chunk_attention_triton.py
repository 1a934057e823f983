"""The window's kernels against the definition in float64: places, carried chunks, packings, segments, dropout."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import DEVICES, OPCHECKS, largest_error, narrow, poisoned_and_fresh, widen  # noqa: F401
from operator_cases import segments, window_places
from torch import Tensor

from megalodon.ops import Segments, layout_of, sliding_chunk_attention


def inputs_of(
    device: str, dtype: torch.dtype, batch: int, length: int, key: int, value: int, chunk: int, carried: int = 0,
    heads: int = 1, turned: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    """Tokens, and cached keys and values of the chunk before and of `carried` - chunk tokens of the open one."""
    sizes = {"q": key, "k": key, "v": value} | ({"q_before": key} if turned else {})
    values = {name: torch.randn(batch, length, heads, size) for name, size in sizes.items()}
    if carried >= chunk:
        values |= {f"before_{name}": torch.randn(batch, chunk, heads, sizes[name]) for name in ("k", "v")}
    if carried % chunk:
        values |= {f"open_{name}": torch.randn(batch, carried % chunk, heads, sizes[name]) for name in ("k", "v")}
    return narrow(values, device, dtype, tuple(values))


def compared(inputs: dict[str, Tensor], **others) -> dict[str, float]:
    wide = widen(inputs)
    device = inputs["q"].device
    expected = sliding_chunk_attention(**wide, **others, backend="reference")
    on_device = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in others.items()}
    return largest_error((sliding_chunk_attention(**inputs, **on_device, backend="triton"),), (expected,), inputs, wide)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("batch", "length", "key", "value", "chunk", "carried", "turned"),
    [
        (2, 20, 4, 6, 8, 0, True),
        (1, 37, 8, 12, 17, 0, False),
        (1, 19, 4, 6, 9, 9, True),
        (2, 17, 4, 6, 7, 3, True),
        (1, 15, 4, 6, 6, 8, True),
        (1, 7, 12, 150, 64, 0, True),
        (1, 6, 4, 4, 1, 1, True),
        (1, 3, 4, 4, 20, 29, False),
    ],
)
def test_float32(device, batch, length, key, value, chunk, carried, turned) -> None:
    inputs = inputs_of(device, torch.float32, batch, length, key, value, chunk, carried, turned=turned)
    errors = compared(inputs, chunk_size=chunk)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("longest", [0, 9])
def test_rows_anywhere_documents_padding_and_segments(device: str, bos: bool, longest: int) -> None:
    batch, length, chunk = 3, 17, 6
    positions, lengths = torch.tensor([15, 3, 6]), torch.tensor([17, 11, 0])
    inputs = inputs_of(device, torch.float32, batch, length, 4, 6, chunk, 9)
    cut = segments(batch, length, longest) if longest else None
    flags = torch.rand(batch, length) < (0.15 if bos else 0)
    places = window_places(positions, chunk)
    wide = widen(inputs)
    results = []
    for values, backend in ((inputs, "triton"), (wide, "reference")):
        where = values["q"].device
        layout = layout_of(
            batch, length, where, chunk_size=chunk, positions=positions, lengths=lengths, segment_ids=cut
        )
        found = Segments(flags.to(where), layout, tuple(p.to(where) for p in places)) if bos else None
        results.append(
            sliding_chunk_attention(**values, chunk_size=chunk, layout=layout, segments=found, backend=backend)
        )
    errors = largest_error((results[0],), (results[1],), inputs, wide)
    assert max(errors.values()) < 1e-5, errors
    assert not results[0][1, 11:].any() and not results[0][2].any()


@pytest.mark.parametrize("device", DEVICES)
def test_segments_of_full_rows(device: str) -> None:
    """A BOS token hides the whole chunk before from the queries after it."""
    inputs = inputs_of(device, torch.float32, 2, 20, 4, 6, 5)
    flags = torch.zeros(2, 20, dtype=torch.bool)
    flags[0, 5] = flags[0, 12] = flags[1, 0] = flags[1, 19] = True
    errors = compared(inputs, chunk_size=5, bos_mask=flags)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16(device: str) -> None:
    inputs = inputs_of(device, torch.bfloat16, 1, 40, 16, 70, 18)
    errors = compared(inputs, chunk_size=18)
    assert errors.pop("output 0") < 2**-6
    assert max(errors.values()) < 0.05, errors


@pytest.mark.parametrize("device", DEVICES)
def test_large_scores_do_not_overflow(device: str) -> None:
    inputs = inputs_of(device, torch.float32, 1, 40, 8, 8, 16)
    with torch.no_grad():
        inputs["q"] *= 100
        inputs["q_before"] *= 100
    assert compared(inputs, chunk_size=16)["output 0"] < 1e-4


def weights_of(q: Tensor, k: Tensor, chunk: int, dropout: float, dropkey: bool) -> Tensor:
    """The matrix of weights [L, L] after dropout: attention over values that are the identity."""
    length = q.shape[1]
    identity = torch.eye(length, device=q.device).view(1, length, 1, length).contiguous()
    return sliding_chunk_attention(q, k, identity, chunk, dropout=dropout, dropkey=dropkey, backend="triton")[0, :, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dropkey", [False, True])
def test_dropout_is_the_same_in_both_passes(device: str, dropkey: bool) -> None:
    inputs = inputs_of(device, torch.float32, 1, 32, 8, 8, 16, turned=False)
    seed = int(torch.randint(2**31, ()))

    def drawn(run):
        torch.manual_seed(seed)
        return run()

    dropped = drawn(lambda: weights_of(inputs["q"].detach(), inputs["k"].detach(), 16, 0.4, dropkey)).cpu() == 0
    hidden = torch.ones(32, 32).triu(1).bool()
    assert dropped[hidden].all()
    for part in (dropped[16:, :16], dropped[16:, 16:][~hidden[16:, 16:]]):
        assert 0.2 < part.float().mean() < 0.6
    assert not torch.equal(dropped[16:, :16].tril(), dropped[16:, 16:].tril()), "both chunks draw the same"
    assert not (dropkey and dropped.diagonal().any()), "a token always sees itself"
    wide = widen(inputs)
    scores = torch.einsum("bqhd,bkhd->bhqk", wide["q"], wide["k"]).masked_fill(hidden, -torch.inf)
    if dropkey:
        weights = scores.masked_fill(dropped, -torch.inf).softmax(-1)
    else:
        weights = scores.softmax(-1).masked_fill(dropped, 0) / 0.6
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, wide["v"])
    options = {"chunk_size": 16, "dropout": 0.4, "dropkey": dropkey, "backend": "triton"}
    out = drawn(lambda: sliding_chunk_attention(**inputs, **options))
    errors = largest_error((out,), (expected,), inputs, wide)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("device", DEVICES)
def test_one_token_without_gradients(device: str) -> None:
    """Reading goes on one token at a time through the blocked form's shorter way."""
    inputs = {name: x.detach() for name, x in inputs_of(device, torch.float32, 2, 1, 8, 16, 8, 13).items()}
    wide = {name: x.cpu().double() for name, x in inputs.items()}
    out = sliding_chunk_attention(**inputs, chunk_size=8, backend="triton")
    expected = sliding_chunk_attention(**wide, chunk_size=8, backend="reference")
    assert (out.cpu() - expected).abs().max() < 1e-5


@pytest.mark.parametrize("utilities", OPCHECKS)
@pytest.mark.parametrize("device", DEVICES)
def test_operators_pass_opcheck(device: str, utilities: tuple[str, ...]) -> None:
    from megalodon.ops.sliding_chunk_attention import triton

    values = inputs_of(device, torch.float32, 1, 6, 4, 4, 4)
    tensors = (*(values[name] for name in ("q", "q_before", "k", "v")), None, None, None, None)
    rest = (4, [4, 0, 0], [], 0.0, False)
    torch.library.opcheck(triton.window_op, (*tensors, *rest), test_utils=utilities)
    with torch.no_grad():
        plain = [None if x is None else x.detach() for x in tensors]
        out, lse = triton.window_op(*plain, *rest)
    torch.library.opcheck(
        triton.window_backward_op, (torch.randn_like(out), out, lse, *plain, *rest), test_utils=utilities
    )


def test_compiles_without_graph_breaks() -> None:
    q, k, v = (torch.randn(1, 9, 1, 4, requires_grad=True) for _ in range(3))

    def run(q: Tensor) -> Tensor:
        return sliding_chunk_attention(q, k, v, 4, backend="triton").sin()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(q)
    assert torch.equal(compiled, run(q))
    (actual,), (expected,) = (torch.autograd.grad(y.sum(), q) for y in (compiled, run(q)))
    assert torch.equal(actual, expected)
