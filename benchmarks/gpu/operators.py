"""Checks and times the operators on a GPU, beside their floors and beside other ways to compute them.

Before anything is timed, the kernels are compared with the blocked form in float64 on the CPU at small sizes: bfloat16
and float32, new sequences, carried states, packed documents, outputs, states and all gradients. Then: `times` (forward
and backward), `flatness` (the cost of a token from 4K to 1M tokens in a row), `attention` (every way to attend inside
chunks) and `decode` (one token, replayed from a CUDA graph).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated, Any

import torch
import typer
from _gpu import (
    COMPILER,
    DEVICE,
    REHEARSAL,
    LeftOut,
    Output,
    Rehearse,
    Report,
    attempt,
    captured,
    ceilings,
    error,
    milliseconds,
    rotating,
)
from torch import Tensor
from torch.nn import functional as F

from megalodon import ops
from megalodon.ops.chunk_attention import causal

COMPONENTS = 4 if REHEARSAL else 16
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
"""Relative errors, by norm, that pass: bfloat16 outputs are rounded to 8 bits, float32 products to 22 at least."""


@dataclass(frozen=True)
class Sizes:
    """What is timed: D, groups, heads and their widths, and shapes (rows, tokens)."""

    dim: int = 4096
    groups: int = 64
    heads: int = 4
    key: int = 256
    value: int = 2048
    shapes: tuple[tuple[int, int], ...] = ((8, 4096), (1, 32768))
    lengths: tuple[int, ...] = tuple(2**n for n in range(12, 21, 2))
    chunks: tuple[int, ...] = (512, 2048, 4096)
    tokens: int = 32768  # of attention, whatever the chunk
    decode_rows: tuple[int, ...] = (1, 32)
    decode_chunk: int = 4096
    check_length: int = 777
    check_dim: int = 256
    check_heads: tuple[int, int, int] = (2, 256, 2048)  # as timed, so that nothing is compiled for the checks alone
    check_heads_float32: tuple[int, int, int] = (2, 128, 512)  # its kernels take no wider keys
    check_rows: int = 2


TINY = Sizes(16, 4, 2, 16, 32, ((2, 8),), (16,), (128,), 128, (1, 2), 16, 21, 16, (1, 16, 32), (1, 16, 32), 1)

Inputs = dict[str, Tensor]


# Inputs --------------------------------------------------------------------------------------------------------------


def cema_inputs(batch: int, length: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    phase = torch.rand(dim, COMPONENTS, device=DEVICE) * 6
    values = {
        "x": torch.randn(batch, length, dim, device=DEVICE, dtype=dtype),
        "p": torch.rand(dim, COMPONENTS, device=DEVICE),
        "q": torch.polar(torch.rand(dim, COMPONENTS, device=DEVICE) * 0.5 + 0.49, phase),
        "gamma": torch.randn(dim, COMPONENTS, device=DEVICE, dtype=torch.complex64),
        "omega": torch.randn(dim, device=DEVICE),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def norm_inputs(batch: int, length: int, dim: int, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    values = {
        "x": torch.randn(batch, length, dim, device=DEVICE, dtype=dtype),
        "weight": torch.randn(dim, device=DEVICE),
        "bias": torch.randn(dim, device=DEVICE),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def attention_inputs(
    batch: int, length: int, heads: int, key: int, value: int, dtype: torch.dtype = torch.bfloat16
) -> Inputs:
    sizes = {"q": key, "k": key, "v": value}
    return {
        name: torch.randn(batch, length, heads, size, device=DEVICE, dtype=dtype)
        .mul_(size**-0.25 if name != "v" else 1)
        .requires_grad_()
        for name, size in sizes.items()
    }


# Checks --------------------------------------------------------------------------------------------------------------


def check_cases(sizes: Sizes, dtype: torch.dtype) -> Iterator[tuple[str, Inputs, Inputs, Callable[..., Any]]]:
    """(operator, inputs of a new sequence, the state that another continues, the operator)."""
    rows, length, dim, chunk = sizes.check_rows, sizes.check_length, sizes.check_dim, sizes.check_length // 3
    heads = sizes.check_heads if dtype == torch.bfloat16 else sizes.check_heads_float32
    state = torch.randn(rows, dim, COMPONENTS, device=DEVICE, dtype=torch.complex64)
    yield "cema", cema_inputs(rows, length, dim, dtype), {"initial_state": state}, ops.cema
    moments = {
        "count": torch.randint(1, 5000, (rows,), device=DEVICE),
        "mean": torch.randn(rows, 4, device=DEVICE),
        "var": torch.rand(rows, 4, device=DEVICE) + 0.5,
    }
    yield "timestep_norm", norm_inputs(rows, length, dim, dtype), moments, partial(ops.timestep_norm, num_groups=4)
    decayed = {name: value.clone() for name, value in moments.items()}
    decay_norm = partial(ops.timestep_decay_norm, num_groups=4)
    yield "timestep_decay_norm", norm_inputs(rows, length, dim, dtype), decayed, decay_norm
    prefix = attention_inputs(rows, chunk // 2, *heads, dtype)
    carried = {"prefix_k": prefix["k"].detach(), "prefix_v": prefix["v"].detach()}
    run = partial(ops.chunk_attention, chunk_size=chunk)
    yield "chunk_attention", attention_inputs(rows, length, *heads, dtype), carried, run
    before = attention_inputs(rows, chunk, *heads, dtype)
    window = {f"before_{x}": before[x].detach() for x in "kv"} | {f"open_{x}": prefix[x].detach() for x in "kv"}
    run = partial(ops.sliding_chunk_attention, chunk_size=chunk)
    yield "sliding_chunk_attention", attention_inputs(rows, length, *heads, dtype), window, run


def check(report: Report, sizes: Sizes) -> None:
    """Errors of the kernels against float64 on fresh random inputs."""
    for dtype in (torch.bfloat16, torch.float32):
        for operator, inputs, state, run in check_cases(sizes, dtype):
            state = {k: v.requires_grad_(v.is_floating_point() or v.is_complex()) for k, v in state.items()}
            length = inputs["x" if "x" in inputs else "q"].shape[1]
            documents = {"segment_ids": torch.randint(0, 3, (sizes.check_rows, length), device=DEVICE).sort(1).values}
            variants = {"new": inputs, "carried state": inputs | state, "documents": inputs | state | documents}
            for case, values in variants.items():
                names = {"operator": operator, "dtype": str(dtype).removeprefix("torch."), "case": case}
                row = attempt(partial(compared, run, values, TOLERANCE[dtype]), **names)
                report.add("checks", row)


def compared(run: Callable[..., Any], inputs: Inputs, tolerance: float) -> dict[str, Any]:
    """The largest errors of outputs and of gradients, for one random weighting of all outputs."""
    wide = {name: widened(value) for name, value in inputs.items()}
    actual, expected = differentiable(run(**inputs, backend="triton")), differentiable(run(**wide, backend="blocked"))
    upstream = [torch.randn_like(output) for output in actual]
    same = [u.cpu().to(e.dtype) for u, e in zip(upstream, expected, strict=True)]
    gradients = torch.autograd.grad(actual, leaves(inputs), upstream)
    right = torch.autograd.grad(expected, leaves(wide), same)
    outputs, of_gradients = largest_error(actual, expected), largest_error(gradients, right)
    return {
        "error": outputs,
        "error_of_gradients": of_gradients,
        "right": outputs < tolerance and of_gradients < tolerance,
    }


def largest_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """NaN where any is, which Python's `max` would pass over: it is under no tolerance."""
    return float(torch.tensor([error(a, e) for a, e in zip(actual, expected, strict=True)]).max())


def widened(value: Tensor) -> Tensor:
    """The same numbers on the CPU, floating ones in float64."""
    value = value.detach().cpu()
    if value.is_complex():
        return value.to(torch.complex128).requires_grad_()
    return value.double().requires_grad_() if value.is_floating_point() else value


def leaves(values: Inputs) -> list[Tensor]:
    return [value for value in values.values() if value.requires_grad]


def differentiable(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return [output for output in outputs if output.requires_grad]


# Times ---------------------------------------------------------------------------------------------------------------


def both_passes(
    run: Callable[..., tuple[Tensor, ...]], inputs: Callable[[], Inputs], forward_floor: float, backward_floor: float
) -> dict[str, float]:
    """Milliseconds of forward alone and of backward alone (forward and backward less forward), beside their floors."""
    with torch.no_grad():
        forward, spread = milliseconds(lambda: run(**inputs()))
    upstream = torch.randn_like(run(**inputs())[0])

    def step() -> None:
        values = inputs()
        torch.autograd.grad(run(**values)[0], list(values.values()), upstream)

    both, both_spread = milliseconds(step)
    backward = both - forward
    return {
        "forward_ms": forward, "forward_floor": forward_floor, "forward_over_floor": forward / forward_floor,
        "backward_ms": backward, "backward_floor": backward_floor, "backward_over_floor": backward / backward_floor,
        "spread": max(spread, both_spread),
    }  # fmt: skip


STREAMING = ("cema", "timestep_norm", "timestep_decay_norm")
"""Operators whose floor is one reading and one writing of the activations."""


def time_streaming(operator: str, backend: str, batch: int, length: int, sizes: Sizes) -> dict[str, Any]:
    """CEMA or a norm over time. Floors: activations read and written once; backward reads x and dy and writes dx."""
    run: Callable[..., tuple[Tensor, ...]] = partial(ops.cema, backend=backend)
    make = cema_inputs
    if operator != "cema":
        make, run = norm_inputs, partial(getattr(ops, operator), num_groups=sizes.groups, backend=backend)
    inputs = rotating(lambda: make(batch, length, sizes.dim), 2)
    nbytes = 2 * batch * length * sizes.dim
    floors = [ceilings().memory_floor(n * nbytes) for n in (2, 3)]
    found = both_passes(run, inputs, *floors)
    total = found["forward_ms"] + found["backward_ms"]
    return {**found, "ns_per_token": 1e6 * total / (batch * length)}


def ours(chunk: int, form: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    return (ops.chunk_attention(q, k, v, chunk, backend=form),)


def strips(rows: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    """cuBLAS products and a softmax over strips of queries: scores of one strip exist at a time."""
    kept, causal.STRIP = causal.STRIP, rows
    try:
        return (causal.causal_attention(q, k, v),)
    finally:
        causal.STRIP = kept


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return (F.scaled_dot_product_attention(*heads_first, is_causal=True, scale=1.0).transpose(1, 2),)


def sdpa_slices(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    """The fused back ends of SDPA want heads of at most 256: the values in slices, the scores anew for each."""
    return (torch.cat([sdpa(q, k, part)[0] for part in v.split(q.shape[-1], dim=-1)], dim=-1),)


@cache
def _flex(size: int) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, size, size, device=DEVICE)
    return partial(torch.compile(flex_attention, **COMPILER), block_mask=mask, scale=1.0)


def flex(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    return (_flex(q.shape[1])(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2),)


OF_OTHERS = ("sdpa", "sdpa, values in slices", "flex attention")
"""Ways that may refuse these heads: a finding, not an error of this project's."""


def time_attention(report: Report, sizes: Sizes, chunk: int) -> None:
    """Every way to attend inside chunks of one size; the floors count the causal half of the products."""
    rows, key, value = sizes.tokens // chunk, sizes.key, sizes.value
    pairs = rows * sizes.heads * chunk * (chunk + 1) / 2
    floors = [ceilings().matrix_floor(2 * pairs * n) for n in (key + value, 3 * key + 2 * value)]
    inputs = rotating(lambda: attention_inputs(rows, chunk, sizes.heads, key, value), 2)
    ways: dict[str, Callable[..., tuple[Tensor]]] = {
        **{form: partial(ours, chunk, form) for form in ("triton-fused", "triton-strips")},
        **{f"plain softmax, strips of {n}": partial(strips, n) for n in (128, 512, 1024) if n <= chunk},
        "sdpa": sdpa,
        "sdpa, values in slices": sdpa_slices,
        "flex attention": flex,
    }
    for name, run in ways.items():
        run = partial(refusable, run) if name in OF_OTHERS else run
        report.add("attention", attempt(partial(both_passes, run, inputs, *floors), chunk=chunk, way=name))


def time_window(report: Report, sizes: Sizes, chunk: int) -> None:
    """Two chunks of keys in rows of eight chunks, by the kernels and by the blocked form."""
    length, key, value = 8 * chunk, sizes.key, sizes.value
    rows = max(sizes.tokens // length, 1)
    pairs = rows * sizes.heads * (8 * chunk * (chunk + 1) / 2 + 7 * chunk * chunk)
    floors = [ceilings().matrix_floor(2 * pairs * n) for n in (key + value, 3 * key + 2 * value)]
    inputs = rotating(lambda: attention_inputs(rows, length, sizes.heads, key, value), 2)
    for backend in ("triton", "blocked"):

        def run(q: Tensor, k: Tensor, v: Tensor, backend: str = backend) -> tuple[Tensor]:
            return (ops.sliding_chunk_attention(q, k, v, chunk, backend=backend),)

        report.add("window", attempt(partial(both_passes, run, inputs, *floors), chunk=chunk, backend=backend))


def refusable(run: Callable[..., tuple[Tensor]], **inputs: Tensor) -> tuple[Tensor]:
    try:
        return run(**inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as reason:
        raise LeftOut(f"refused: {type(reason).__name__}: {reason}".splitlines()[0][:160]) from None


def decode_calls(rows: int, sizes: Sizes) -> Iterator[tuple[str, Callable[[], Any], float]]:
    """(operator, one token of each row at the end of a chunk, bytes that it reads and writes)."""
    q, _, _ = attention_inputs(rows, 1, sizes.heads, sizes.key, sizes.value).values()
    _, k, v = attention_inputs(rows, sizes.decode_chunk, sizes.heads, sizes.key, sizes.value).values()
    places = torch.full((rows,), sizes.decode_chunk - 1, device=DEVICE)
    yield "attention", partial(ops.causal_attention, q, k, v, places, backend="triton"), k.nbytes + v.nbytes
    inputs = cema_inputs(rows, 1, sizes.dim)
    h = torch.randn(rows, sizes.dim, COMPONENTS, device=DEVICE, dtype=torch.complex64)
    nbytes = 2 * h.nbytes + sum(value.nbytes for value in inputs.values())
    yield "cema", partial(ops.cema, **inputs, initial_state=h, backend="triton"), nbytes
    inputs = norm_inputs(rows, 1, sizes.dim)
    state = {
        "count": torch.full((rows,), 1000, device=DEVICE),
        "mean": torch.randn(rows, sizes.groups, device=DEVICE, dtype=torch.float64),
        "var": torch.rand(rows, sizes.groups, device=DEVICE, dtype=torch.float64),
    }
    nbytes = sum(value.nbytes for value in inputs.values()) + 2 * state["mean"].nbytes + 2 * state["var"].nbytes
    yield (
        "timestep_norm",
        partial(ops.timestep_norm, **inputs, **state, num_groups=sizes.groups, backend="triton"),
        nbytes,
    )


@torch.no_grad()
def time_decode(call: Callable[[], Any], nbytes: float) -> dict[str, Any]:
    """One step, replayed from a CUDA graph. What is small stays in the cache, and may beat its floor there."""
    eager = newest = call()

    def step() -> None:
        nonlocal newest
        newest = call()

    replay = captured(step)
    replay()
    first, last = (x if isinstance(x, Tensor) else x[0] for x in (eager, newest))
    time, spread = milliseconds(replay)
    floor = ceilings().memory_floor(nbytes)
    same = error(last, first) < TOLERANCE[torch.bfloat16]
    return {"ms": time, "spread": spread, "floor": floor, "over_floor": time / floor, "right": same}


def main(
    rehearse: Rehearse = False,
    output: Output = None,
    longest: Annotated[int, typer.Option(help="Longest row of the flatness section, in tokens.")] = 1 << 20,
) -> None:
    """Checks, times, writes JSON and tables; exit status 1 if a check failed."""
    sizes = TINY if rehearse else Sizes()
    report = Report("operators", "The operators on a GPU", vars(sizes), output)
    check(report, sizes)
    for operator in STREAMING:
        for batch, length in sizes.shapes:
            for backend in ("triton", "blocked"):
                names = {"operator": operator, "backend": backend, "batch": batch, "length": length}
                run = partial(time_streaming, operator, backend, batch, length, sizes)
                report.add("times", attempt(run, **names))
    for rows in sizes.decode_rows:
        for operator, call, nbytes in decode_calls(rows, sizes):
            report.add("decode", attempt(partial(time_decode, call, nbytes), operator=operator, rows=rows))
    for length in (n for n in sizes.lengths if n <= longest):
        for operator in STREAMING:
            run = partial(time_streaming, operator, "triton", 1, length, sizes)
            report.add("flatness", attempt(run, operator=operator, length=length))
    for chunk in reversed(sizes.chunks):
        time_attention(report, sizes, chunk)
        time_window(report, sizes, chunk)
    if not report.finish():
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
