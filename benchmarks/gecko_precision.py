"""Whether Gecko's statistics and rotations stay exact: three things that go wrong in float32 or bfloat16, measured.

1. The corrections `1 - beta**count` cancel for small counts: outputs and gradients of TimestepDecayNorm in float32,
   beside the same with corrections computed in float32, both against float64.
2. Averages carried in bfloat16 stop moving: the variance after 16,384 single tokens of bfloat16 activations, as the
   operator carries it and in bfloat16.
3. A stream of millions of tokens: the statistics against float64 over all of it, fed in pieces, the last ones one by
   one; and attention, whose keys and queries are rotated by their place in the chunk, against float64 rotations by the
   position in the stream, at the stream's start and far in it. Beside it, float32 angles from the stream's start.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _machine import describe_machine
from _report import RESULTS, document, markdown_table, new_run, save
from torch import Tensor

from megalodon.ops import rotate, rotations, sliding_chunk_attention, timestep_decay_norm

DIM, GROUPS = 64, 8
BETAS = (0.999, 0.9999)
TARGET = 1e-6
STREAM_TARGET = 1e-5
CHUNK, HEAD, BASE = 256, 64, 500_000.0


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude."""
    return float((actual.double() - expected).abs().max() / expected.abs().max())


def plain_norm(x: Tensor) -> Tensor:
    """TimestepDecayNorm of [B, L, D], all in the dtype of x, corrections as `1 - beta**count`."""
    groups = x.view(*x.shape[:2], GROUPS, -1)
    m, s = groups.mean(-1), groups.var(-1, correction=0)
    count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)
    powers = count[:, None] - count
    averages = []
    for beta, values in zip(BETAS, (m, s), strict=True):
        weights = (1 - beta) * torch.tensor(beta, dtype=x.dtype).pow(powers.clamp(min=0)).tril()
        correction = 1 - torch.tensor(beta, dtype=x.dtype).pow(count)
        averages.append(torch.einsum("ts,bsg->btg", weights, values) / correction[:, None])
    mean, var = averages
    return ((groups - mean[..., None]) / torch.sqrt(var + 1e-5)[..., None]).view(x.shape)


def corrections(length: int) -> dict[str, tuple[float, float]]:
    """Errors of outputs and gradients of a fresh sequence, by how the corrections are computed."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, length, DIM, generator=generator) * 2 + 1
    upstream = torch.randn(2, length, DIM, generator=generator)

    def run(function: Any, values: Tensor) -> tuple[Tensor, Tensor]:
        leaf = values.clone().requires_grad_()
        y = function(leaf)
        (gradient,) = torch.autograd.grad(y, leaf, upstream.to(y.dtype))
        return y.detach(), gradient

    def ours(values: Tensor) -> Tensor:
        return timestep_decay_norm(values, None, None, GROUPS, *BETAS)[0]

    exact = run(ours, x.double())
    found = {"the operator, float32": run(ours, x), "corrections in float32": run(plain_norm, x)}
    return {name: (relative(y, exact[0]), relative(d, exact[1])) for name, (y, d) in found.items()}


@torch.no_grad()
def decoding(tokens: int) -> dict[str, float]:
    """The variance after single tokens of bfloat16 activations, over its exact value."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(1, tokens, DIM, generator=generator) * 2).bfloat16()
    exact = timestep_decay_norm(x.double(), None, None, GROUPS, *BETAS)[3]
    state: list[Tensor] = [torch.zeros(1, dtype=torch.int64), *torch.zeros(2, 1, GROUPS)]
    frozen = torch.zeros(GROUPS, dtype=torch.bfloat16)
    for token in x.split(1, dim=1):
        _, *state = timestep_decay_norm(token, None, None, GROUPS, *BETAS, *state)
        s = token.float().view(GROUPS, -1).var(-1, correction=0)
        frozen = (BETAS[1] * frozen.float() + (1 - BETAS[1]) * s).bfloat16()
    return {
        "carried in float32": float((state[2][0] / exact[0]).mean()),
        "carried in bfloat16": float((frozen / exact[0]).mean()),
    }


@torch.no_grad()
def stream(total: int, piece: int, single: int) -> dict[str, float]:
    """The largest relative error of the raw statistics anywhere in a drifting stream, by the state's dtype."""
    generator = torch.Generator().manual_seed(0)
    dtypes = {"state in float64": torch.float64, "state in float32": torch.float32}
    states = {
        name: [torch.zeros(1, dtype=torch.int64), *torch.zeros(2, 1, GROUPS, dtype=dtype)]
        for name, dtype in dtypes.items()
    }
    exact = torch.zeros(2, GROUPS, dtype=torch.float64)
    worst = dict.fromkeys(states, 0.0)
    position = 0
    while position < total:
        length = min(piece, total - position)
        drift = torch.sin(torch.arange(position, position + length).double() * (20 * math.pi / total)).float()
        x = torch.randn(length, DIM, generator=generator) * (1 + 0.5 * drift)[:, None] + 3 * drift[:, None]
        groups = x.double().view(length, GROUPS, -1)
        steps = torch.arange(length - 1, -1, -1, dtype=torch.float64)
        for i, (beta, values) in enumerate(zip(BETAS, (groups.mean(-1), groups.var(-1, correction=0)), strict=True)):
            exact[i] = beta**length * exact[i] + (1 - beta) * (beta ** steps[:, None] * values).sum(0)
        at_once = length if position + length <= total - single else 1
        for name in states:
            for part in x.split(at_once):
                _, *states[name] = timestep_decay_norm(part[None], None, None, GROUPS, *BETAS, *states[name])
            scale = torch.maximum(exact[0].abs(), exact[1].sqrt())
            errors = ((states[name][1][0] - exact[0]).abs() / scale, (states[name][2][0] - exact[1]).abs() / exact[1])
            worst[name] = max(worst[name], *(float(error.max()) for error in errors))
        position += length
    for state in states.values():
        if int(state[0]) != total:
            raise ValueError(f"the operator counts {int(state[0])} tokens where {total} were fed")
    return worst


@torch.no_grad()
def rotated(positions: tuple[int, ...]) -> dict[int, tuple[float, float]]:
    """Errors of attention over two chunks that begin at a position: rotated by place, and by float32 angles."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2 * CHUNK, 1, HEAD, generator=generator) / math.sqrt(HEAD) ** 0.5
    v = torch.randn(1, 2 * CHUNK, 1, HEAD, generator=generator)
    place = torch.arange(2 * CHUNK) % CHUNK
    own, before = (rotations(at, HEAD, BASE) for at in (place, place + CHUNK))
    ours = sliding_chunk_attention(rotate(q, own), rotate(k, own), v, CHUNK, q_before=rotate(q, before))
    frequencies = BASE ** (-torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD)
    errors = {}
    for start in positions:
        at = torch.arange(start, start + 2 * CHUNK)
        angles = at[:, None].double() * frequencies
        low = at[:, None].float() * frequencies.float()
        exact, rounded = (torch.polar(torch.ones_like(a), a) for a in (angles, low.double()))
        wide = (q.double(), k.double(), v.double())
        expected, theirs = (
            sliding_chunk_attention(rotate(wide[0], turns), rotate(wide[1], turns), wide[2], CHUNK)
            for turns in (exact, rounded)
        )
        errors[start] = relative(ours, expected), relative(theirs, expected)
    return errors


def main(
    tokens: Annotated[int, typer.Option(min=1000, help="Length of the stream.")] = 10_000_000,
    quick: Annotated[bool, typer.Option(help="Short streams: shows that the script works.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measures all three, writes JSON and a table; exit status 1 where one misses its target."""
    decoded, piece, single = (16_384, 8192, 20_000) if not quick else (1024, 1024, 500)
    tokens = 50_000 if quick else tokens
    settings = {"tokens": tokens, "decoded": decoded, "piece": piece, "single": single, "betas": BETAS}
    result = new_run("gecko_precision", describe_machine(512), settings)
    first, second = corrections(1024), decoding(decoded)
    third, fourth = stream(tokens, piece, single), rotated((0, tokens - tokens % CHUNK))
    result |= {"corrections": first, "decoding": second, "stream": third, "rotated": fourth}
    parts = [
        f"Corrections of bias, betas {BETAS}, 1,024 tokens, relative to float64 (aim: {TARGET:g}):",
        "",
        markdown_table(["how ", "outputs", "gradients"], [[n, f"{y:.1e}", f"{d:.1e}"] for n, (y, d) in first.items()]),
        "",
        f"The variance after {decoded:,} single bfloat16 tokens, over its exact value:",
        "",
        markdown_table(["how ", "of the truth"], [[name, f"{ratio:.5f}"] for name, ratio in second.items()]),
        "",
        f"Raw statistics over {tokens:,} tokens in pieces of {piece}, the last {single:,} one by one: the largest "
        f"relative error anywhere (aim: {STREAM_TARGET:g} in the model's float64):",
        "",
        markdown_table(["how ", "error"], [[name, f"{error:.1e}"] for name, error in third.items()]),
        "",
        "Attention in float32 over two chunks that begin at a position, relative to float64 rotations by position:",
        "",
        markdown_table(
            ["from token", "rotated by place", "float32 angles from the start"],
            [[f"{start:,}", f"{ours:.1e}", f"{theirs:.1e}"] for start, (ours, theirs) in fourth.items()],
        ),
    ]
    page = document("Precision of Gecko's statistics and rotations", result, parts, quick)
    name = "gecko_precision-quick" if quick else "gecko_precision"
    typer.echo(save(result, page, output, name)[1].read_text())
    within = max(first["the operator, float32"]) <= TARGET and abs(second["carried in float32"] - 1) < 1e-4
    within = within and third["state in float64"] <= STREAM_TARGET
    if not within or max(error for error, _ in fourth.values()) > STREAM_TARGET:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
