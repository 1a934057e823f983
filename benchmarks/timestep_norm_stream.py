"""How exact TimestepNorm's statistics stay over a stream of ten million tokens, against float64 over all of it.

The stream is float32 and drifts; it goes through `megalodon.ops.timestep_norm` in pieces, then token by token at its
end, where one token weighs 1e-7 of the statistics and rounding could swallow it. The exact statistics merge each
piece's float64 moments, independently of the operator. The state is carried in float64, as the model carries it on a
CPU, and in float32, the operator's default.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _machine import describe_machine
from _report import RESULTS, document, markdown_table, new_run, save
from torch import Tensor

from megalodon.ops import timestep_norm

TARGET = 1e-4
DIM, GROUPS = 64, 8
# What each group of features does over the stream; the features of a group share its mean and scale.
PROFILES = (
    "mean 0, scale 1",
    "mean drifts 0 to 5",
    "mean 100, scale 0.1",
    "mean 10, waves of 3",
    "scale grows 0.1 to 10",
    "scale falls 10 to 0.1",
    "mean jumps 0 to 20 half-way",
    "mean -3, scale 1e-3",
)
STATE_DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass
class Moments:
    """Exact statistics of a stream, float64: tokens seen, and per group [G] mean and sum of squared deviations.

    Merged piece by piece (Chan, Golub and LeVeque 1983), so that nothing cancels.
    """

    tokens: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(GROUPS, dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros(GROUPS, dtype=torch.float64))

    def add(self, x: Tensor) -> None:
        """Takes in the tokens x [L, D]."""
        groups = x.double().view(len(x), GROUPS, -1)
        mean = groups.mean((0, 2))
        squares = (groups - mean[:, None]).square().sum((0, 2))
        total = self.tokens + len(x)
        shift = mean - self.mean
        features = DIM // GROUPS
        self.squares = self.squares + squares + shift.square() * (features * self.tokens * len(x) / total)
        self.mean = self.mean + shift * (len(x) / total)
        self.tokens = total

    @property
    def var(self) -> Tensor:
        return self.squares / (self.tokens * (DIM // GROUPS))


@dataclass
class Carried:
    """The operator's state under test and the largest errors seen, per group."""

    dtype: torch.dtype
    largest_mean_error: Tensor = field(default_factory=lambda: torch.zeros(GROUPS, dtype=torch.float64))
    largest_var_error: Tensor = field(default_factory=lambda: torch.zeros(GROUPS, dtype=torch.float64))

    def __post_init__(self) -> None:
        self.count = torch.zeros(1, dtype=torch.int64)
        self.mean = torch.zeros(1, GROUPS, dtype=self.dtype)
        self.var = torch.ones(1, GROUPS, dtype=self.dtype)

    def add(self, x: Tensor) -> None:
        """Feeds the tokens x [L, D], float32, through the operator, which keeps the dtype of the statistics."""
        _, self.count, self.mean, self.var = timestep_norm(
            x[None], None, None, GROUPS, count=self.count, mean=self.mean, var=self.var
        )
        if self.mean.dtype != self.dtype:
            raise TypeError(f"the operator returned statistics in {self.mean.dtype} for {self.dtype}")

    def compare(self, exact: Moments) -> tuple[float, float]:
        """Errors against the exact statistics, largest over groups; remembers the largest along the way."""
        if int(self.count) != exact.tokens:
            raise ValueError(f"the operator counts {int(self.count)} tokens where {exact.tokens} were fed")
        mean_error, var_error = relative_errors(self.mean[0], self.var[0], exact.mean, exact.var)
        self.largest_mean_error = torch.maximum(self.largest_mean_error, mean_error)
        self.largest_var_error = torch.maximum(self.largest_var_error, var_error)
        return mean_error.max().item(), var_error.max().item()


def relative_errors(mean: Tensor, var: Tensor, exact_mean: Tensor, exact_var: Tensor) -> tuple[Tensor, Tensor]:
    """|mean - exact| over the larger of |exact mean| and the standard deviation, and |var - exact| over the exact var.

    The standard deviation stands in where the mean is near 0: the normalised output is off by the error over it.
    """
    scale = torch.maximum(exact_mean.abs(), exact_var.sqrt())
    return (mean.double() - exact_mean).abs() / scale, (var.double() - exact_var).abs() / exact_var


def drift(position: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Mean and scale [L, G] of each group at positions [L] of a stream of `total` tokens, in the order of PROFILES."""
    t = (position.double() / total).float()
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    mean = [zero, 5 * t, 100 * one, 10 + 3 * torch.sin(40 * math.pi * t), zero, zero, 20 * (t > 0.5), -3 * one]
    scale = [one, one, 0.1 * one, one, 0.1 * 100**t, 10 * 0.01**t, one, 1e-3 * one]
    return torch.stack(mean, -1), torch.stack(scale, -1)


def stream(total: int, piece: int, single: int) -> Iterator[Tensor]:
    """Pieces [L, D] of the stream: `piece` tokens each, the last `single` tokens one by one."""
    generator = torch.Generator().manual_seed(0)
    start = 0
    while start < total - single:
        length = min(piece, total - single - start)
        yield tokens_at(start, length, total, generator)
        start += length
    for first in range(start, total, piece):
        yield from tokens_at(first, min(piece, total - first), total, generator).split(1)


def tokens_at(start: int, length: int, total: int, generator: torch.Generator) -> Tensor:
    """The float32 tokens [length, D] from position `start` on."""
    mean, scale = drift(torch.arange(start, start + length), total)
    noise = torch.randn(length, GROUPS, DIM // GROUPS, generator=generator)
    return (noise * scale[..., None] + mean[..., None]).reshape(length, DIM)


@torch.no_grad()
def run(total: int, piece: int, single: int) -> tuple[dict[str, Carried], list[dict[str, Any]]]:
    """Streams everything once; the states under test and a trace of their errors at each doubling and at the end."""
    exact, carried, trace = Moments(), {name: Carried(dtype) for name, dtype in STATE_DTYPES.items()}, []
    report_at = piece
    for x in stream(total, piece, single):
        exact.add(x)
        for state in carried.values():
            state.add(x)
        errors = {name: state.compare(exact) for name, state in carried.items()}
        if exact.tokens >= report_at or exact.tokens in (total - single, total):
            trace.append({"tokens": exact.tokens, "errors": errors})
            typer.echo(f"{exact.tokens:>10,} tokens", err=True)
            report_at = max(report_at, exact.tokens) * 2
    return carried, trace


def tables(carried: dict[str, Carried], trace: list[dict[str, Any]], piece: int, single: int) -> list[str]:
    """The Markdown parts: verdicts, errors per group, errors along the stream."""
    verdicts, per_group = [], []
    for name, state in carried.items():
        worst = largest_error(state)
        verdict = "within" if worst <= TARGET else "NOT within"
        verdicts.append(f"- state in {name}: largest error {worst:.1e}, {verdict} {TARGET:g}")
    for group, profile in enumerate(PROFILES):
        errors = [f"{e[group]:.1e}" for s in carried.values() for e in (s.largest_mean_error, s.largest_var_error)]
        per_group.append([profile, *errors])
    along = [
        [f"{point['tokens']:,}", *(f"{e:.1e}" for pair in point["errors"].values() for e in pair)] for point in trace
    ]
    header = [f"{what}, state {name}" for name in carried for what in ("mean", "var")]
    return [
        f"{trace[-1]['tokens']:,} tokens of D={DIM} in {GROUPS} groups, float32, in pieces of {piece}, the last "
        f"{single:,} one by one. Errors are relative: the mean's to the larger of its size and the standard deviation.",
        "",
        *verdicts,
        "",
        "Largest error after any piece:",
        "",
        markdown_table(["group ", *header], per_group),
        "",
        "Largest error of any group along the stream:",
        "",
        markdown_table(["tokens", *header], along),
    ]


def largest_error(state: Carried) -> float:
    return max(state.largest_mean_error.max().item(), state.largest_var_error.max().item())


def main(
    tokens: Annotated[int, typer.Option(min=1, help="Length of the stream.")] = 10_000_000,
    piece: Annotated[int, typer.Option(min=1, help="Tokens per piece.")] = 8192,
    single: Annotated[int, typer.Option(min=0, help="Tokens at the end that are fed one by one.")] = 100_000,
    quick: Annotated[bool, typer.Option(help="200,000 tokens: shows that the script works.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Streams tokens through TimestepNorm, compares with float64, writes JSON and a table; exit status 1 on a miss."""
    if quick:
        tokens, single = 200_000, 1_000
    if single > tokens:
        raise typer.BadParameter(f"--single {single}: it must be at most --tokens, {tokens}")
    settings = {"tokens": tokens, "piece": piece, "single": single, "dim": DIM, "groups": GROUPS, "target": TARGET}
    result = new_run("timestep_norm_stream", describe_machine(512), settings)
    carried, trace = run(tokens, piece, single)
    result["states"] = {
        name: {
            "largest_error": largest_error(state),
            "within_target": largest_error(state) <= TARGET,
            "largest_mean_error": dict(zip(PROFILES, state.largest_mean_error.tolist(), strict=True)),
            "largest_var_error": dict(zip(PROFILES, state.largest_var_error.tolist(), strict=True)),
        }
        for name, state in carried.items()
    }
    result["trace"] = trace
    page = document("TimestepNorm over a long stream", result, tables(carried, trace, piece, single), quick)
    name = "timestep_norm_stream-quick" if quick else "timestep_norm_stream"
    typer.echo(save(result, page, output, name)[1].read_text())
    if not result["states"]["float64"]["within_target"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
