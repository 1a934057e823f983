"""Checks and times the three operators on a GPU, beside their floors and beside other ways to compute them.

Every back end is compared with the definition-equal blocked form in float64 on the CPU at a small size before anything
is timed. `--quick` uses small sizes and shows only that the script works.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
import typer
from _gpu import error, finish, markdown_table, milliseconds, rotating, start
from torch import Tensor
from torch.nn import functional as F

from megalodon import ops
from megalodon.ops.chunk_attention import causal

HEADER = ["case ", "back end ", "forward ms", "floor ms", "x floor", "backward ms", "floor ms", "x floor", "spread ms"]
COMPONENTS, GROUPS, HEADS, KEY, VALUE = 16, 64, 4, 256, 2048


def both_passes(run: Callable[..., tuple[Tensor, ...]], inputs: Callable[[], dict[str, Tensor]]) -> dict[str, float]:
    """Milliseconds of forward alone and of backward alone (forward and backward less forward)."""
    with torch.no_grad():
        forward, spread = milliseconds(lambda: run(**inputs()))
    output = run(**inputs())[0]
    upstream = torch.randn_like(output)

    def step() -> None:
        values = inputs()
        torch.autograd.grad(run(**values)[0], list(values.values()), upstream)

    both, both_spread = milliseconds(step)
    return {"forward": forward, "backward": both - forward, "spread": max(spread, both_spread)}


def line(
    case: str, backend: str, times: dict[str, float], forward_floor: float, backward_floor: float
) -> dict[str, Any]:
    return {
        "case": case, "backend": backend, **times, "forward_floor": forward_floor, "backward_floor": backward_floor,
        "forward_over_floor": times["forward"] / forward_floor,
        "backward_over_floor": times["backward"] / backward_floor,
    }  # fmt: skip


def row(r: dict[str, Any]) -> list[str]:
    if "failed" in r:
        return [r["case"], r["backend"], r["failed"][:40], *[""] * 6]
    numbers = (
        r["forward"], r["forward_floor"], r["forward_over_floor"], r["backward"], r["backward_floor"],
        r["backward_over_floor"], r["spread"],
    )  # fmt: skip
    return [r["case"], r["backend"], *(f"{number:.3f}" for number in numbers)]


def cema_inputs(batch: int, length: int, dim: int) -> dict[str, Tensor]:
    phase = torch.rand(dim, COMPONENTS, device="cuda") * 6
    values = {
        "x": torch.randn(batch, length, dim, device="cuda", dtype=torch.bfloat16),
        "p": torch.rand(dim, COMPONENTS, device="cuda"),
        "q": torch.polar(torch.rand(dim, COMPONENTS, device="cuda") * 0.5 + 0.49, phase),
        "gamma": torch.randn(dim, COMPONENTS, device="cuda", dtype=torch.complex64),
        "omega": torch.randn(dim, device="cuda"),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def norm_inputs(batch: int, length: int, dim: int) -> dict[str, Tensor]:
    values = {
        "x": torch.randn(batch, length, dim, device="cuda", dtype=torch.bfloat16),
        "weight": torch.randn(dim, device="cuda"),
        "bias": torch.randn(dim, device="cuda"),
    }
    return {name: value.requires_grad_() for name, value in values.items()}


def attention_inputs(
    batch: int, length: int, heads: int = HEADS, key: int = KEY, value: int = VALUE
) -> dict[str, Tensor]:
    sizes = {"q": key, "k": key, "v": value}
    return {
        name: torch.randn(batch, length, heads, size, device="cuda", dtype=torch.bfloat16)
        .mul_(size**-0.25 if name != "v" else 1)
        .requires_grad_()
        for name, size in sizes.items()
    }


def check() -> list[dict[str, Any]]:
    """Errors of the kernels against float64, forward and gradients, on fresh random inputs at small sizes."""
    found = []
    cases: dict[str, tuple[dict[str, Tensor], Callable[..., Any]]] = {
        "cema": (cema_inputs(2, 777, 64), ops.cema),
        "timestep_norm": (norm_inputs(2, 777, 256), partial(ops.timestep_norm, num_groups=4)),
        "chunk_attention": (attention_inputs(2, 333, 2, 64, 512), partial(ops.chunk_attention, chunk_size=200)),
    }
    for name, (inputs, run) in cases.items():
        wide = {
            k: v.detach().cpu().to(torch.complex128 if v.is_complex() else torch.float64).requires_grad_()
            for k, v in inputs.items()
        }
        actual, expected = run(**inputs, backend="triton"), run(**wide, backend="blocked")
        actual, expected = (o if isinstance(o, Tensor) else o[0] for o in (actual, expected))
        upstream = torch.randn_like(actual)
        gradients = torch.autograd.grad(actual, list(inputs.values()), upstream)
        right = torch.autograd.grad(expected, list(wide.values()), upstream.cpu().double())
        errors = {"output": error(actual, expected)}
        errors |= {k: error(a, e) for k, a, e in zip(inputs, gradients, right, strict=True)}
        found.append({"operator": name, "errors": errors, "passed": all(e < 2e-2 for e in errors.values())})
    return found


def time_cema(ceilings: Any, shapes: list[tuple[int, int]], dim: int) -> list[dict[str, Any]]:
    results = []
    for batch, length in shapes:
        inputs = rotating(lambda b=batch, n=length: cema_inputs(b, n, dim), 2)
        nbytes = 2 * batch * length * dim
        for backend in ("triton", "blocked"):
            run = partial(ops.cema, backend=backend)
            results.append(timed(f"cema {batch} x {length}", backend, run, inputs, ceilings, 2 * nbytes, 3 * nbytes))
    return results


def time_norm(ceilings: Any, shapes: list[tuple[int, int]], dim: int) -> list[dict[str, Any]]:
    results = []
    for batch, length in shapes:
        inputs = rotating(lambda b=batch, n=length: norm_inputs(b, n, dim), 2)
        nbytes = 2 * batch * length * dim
        for backend in ("triton", "blocked"):
            run = partial(ops.timestep_norm, num_groups=GROUPS, backend=backend)
            case = f"timestep_norm {batch} x {length}"
            results.append(timed(case, backend, run, inputs, ceilings, 2 * nbytes, 3 * nbytes))
    return results


def timed(
    case: str,
    backend: str,
    run: Callable[..., Any],
    inputs: Callable[[], dict[str, Tensor]],
    ceilings: Any,
    *nbytes: int,
) -> dict[str, Any]:
    floors = [ceilings.memory_floor(n) for n in nbytes]
    try:
        return line(case, backend, both_passes(run, inputs), *floors)
    except torch.OutOfMemoryError:
        return {"case": case, "backend": backend, "failed": "out of memory"}


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


def flex(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    size = q.shape[1]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, size, size, device="cuda")
    compiled = torch.compile(flex_attention)
    return (compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask, scale=1.0).transpose(1, 2),)


def time_attention(ceilings: Any, chunk: int, rows: int) -> list[dict[str, Any]]:
    """Every way to attend inside chunks of one size; the floors count the causal half of the products."""
    pairs = rows * HEADS * chunk * (chunk + 1) / 2
    floors = ceilings.matrix_floor(2 * pairs * (KEY + VALUE)), ceilings.matrix_floor(2 * pairs * (3 * KEY + 2 * VALUE))
    inputs = rotating(lambda: attention_inputs(rows, chunk), 2)
    ways: dict[str, Callable[..., tuple[Tensor]]] = {
        "triton": lambda q, k, v: (ops.chunk_attention(q, k, v, chunk, backend="triton"),),
        **{f"strips of {n}": partial(strips, n) for n in (128, 512, 1024) if n <= chunk},
        "sdpa": sdpa,
        "sdpa, values in slices": sdpa_slices,
        "flex attention": flex,
    }
    results = []
    for name, run in ways.items():
        case = f"attention C={chunk}"
        try:
            found = line(case, name, both_passes(run, inputs), *floors)
            found |= {f"{p}_of_matrix_rate": found[f"{p}_floor"] / found[p] for p in ("forward", "backward")}
            results.append(found)
        except Exception as reason:  # a back end that refuses these heads is a finding, not an end
            results.append({"case": case, "backend": name, "failed": f"{type(reason).__name__}: {reason}"})
    return results


def time_decode(ceilings: Any, rows: int, chunk: int) -> dict[str, Any]:
    """One step of attention and CEMA, replayed from a CUDA graph, at the end of a chunk."""
    q = torch.randn(rows, 1, HEADS, KEY, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(rows, chunk, HEADS, KEY, device="cuda", dtype=torch.bfloat16)
    v = torch.randn(rows, chunk, HEADS, VALUE, device="cuda", dtype=torch.bfloat16)
    places = torch.full((rows,), chunk - 1, device="cuda")
    run = partial(ops.causal_attention, q, k, v, places, backend="triton")
    with torch.no_grad():
        eager = run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        captured.zero_()
        graph.replay()
        same = bool(torch.equal(captured, eager))
        time, spread = milliseconds(graph.replay)
    floor = ceilings.memory_floor(k.nbytes + v.nbytes)
    return {
        "rows": rows,
        "ms": time,
        "spread": spread,
        "floor": floor,
        "over_floor": time / floor,
        "graph_equals_eager": same,
    }


def main(
    tokens: Annotated[int, typer.Option(help="B x L of the main rows.")] = 32768,
    dim: Annotated[int, typer.Option(help="D.")] = 4096,
    longest: Annotated[int, typer.Option(help="Longest sequence of the flatness rows.")] = 1 << 20,
    quick: Annotated[bool, typer.Option(help="Small sizes: shows that the script works.")] = False,
) -> None:
    """Checks, times, writes JSON and a table; exit status 1 if a check fails."""
    if quick:
        tokens, dim, longest = 4096, 512, 8192
    result, ceilings = start("operators", {"tokens": tokens, "dim": dim, "longest": longest})
    result["checks"] = check()
    shapes = [(tokens // 4096, 4096), (1, tokens)] if tokens > 4096 else [(1, tokens)]
    lengths = [n for n in (1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20) if n <= longest]
    result["times"] = [
        *time_cema(ceilings, shapes, dim),
        *time_norm(ceilings, shapes, dim),
        *(r for c in ((512, 2048, 4096) if not quick else (512,)) for r in time_attention(ceilings, c, tokens // c)),
    ]
    flat = [r for n in lengths for r in time_cema(ceilings, [(1, n)], dim) if r["backend"] == "triton"]
    result["flatness"] = [
        {**r, "ns_per_token": 1e6 * (r["forward"] + r["backward"]) / n}
        for n, r in zip(lengths, flat, strict=True)
        if "failed" not in r
    ]
    result["decode"] = [time_decode(ceilings, rows, 512 if quick else 4096) for rows in (1, 32)]
    checks = [
        [c["operator"], "yes" if c["passed"] else "NO", f"{max(c['errors'].values()):.1e}"] for c in result["checks"]
    ]
    tables = [
        markdown_table(["operator ", "right ", "largest error"], checks),
        "",
        markdown_table(HEADER, [row(r) for r in result["times"]]),
        "",
        markdown_table(
            ["CEMA ", "ns per token, forward + backward"],
            [[r["case"], f"{r['ns_per_token']:.2f}"] for r in result["flatness"]],
        ),
        "",
        markdown_table(
            ["decode attention, rows ", "ms", "floor ms", "x floor", "graph equals eager "],
            [
                [
                    str(r["rows"]),
                    f"{r['ms']:.4f}",
                    f"{r['floor']:.4f}",
                    f"{r['over_floor']:.2f}",
                    str(r["graph_equals_eager"]),
                ]
                for r in result["decode"]
            ],
        ),
    ]
    finish(result, "operators-quick" if quick else "operators", "The operators on a GPU", tables)
    if not all(c["passed"] for c in result["checks"]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
