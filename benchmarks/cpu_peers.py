"""Ours beside Transformers' Llama and Mamba of the same width and size, on one CPU, in one process, order-alternated.

Where CTranslate2 is installed, decoding is measured beside it too, in float32 and in int8, and beside our own int8.

Four sections: `train` (a whole step), `flatness` (our cost per token from 2K to 64K), `prefill` and `decode`. What
exactly is timed stands in `_workloads.py`; README.md beside this file says how to run it and what it writes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol

import _ctranslate2
import torch
import typer
from _machine import describe_machine
from _measure import MEMORY_MARGIN, Meter, Timed, Workload, free_memory, gigabytes
from _report import RESULTS, document, new_run, save
from _tables import Group, Row, as_json, derive, section_parts, target_parts, targets
from _workloads import (
    DECODED_TOKENS,
    OURS,
    Contestant,
    Precision,
    adamw,
    build_also,
    build_llama,
    build_mamba,
    build_megalodon,
    prepare_decoding,
    prepare_prefill,
    prepare_training,
)


class Section(StrEnum):
    train = "train"
    flatness = "flatness"
    prefill = "prefill"
    decode = "decode"


@dataclass(frozen=True)
class Lengths:
    """Where all contestants meet, and where only ours goes on."""

    together: tuple[int, ...]
    alone: tuple[int, ...] = ()


LENGTHS = {
    Section.train: Lengths((512, 2048, 8192)),
    Section.flatness: Lengths((), (2048, 4096, 8192, 16384, 32768, 65536)),
    Section.prefill: Lengths((512, 4096, 16384), (65536,)),
    Section.decode: Lengths((128, 512, 4096, 16384), (65536, 1048576)),
}
QUICK_LENGTHS = {
    Section.train: Lengths((128,)),
    Section.flatness: Lengths((), (256, 1024)),
    Section.prefill: Lengths((128, 256)),
    Section.decode: Lengths((128,), (1024,)),
}
# People train in bf16 through autocast, and run a model in bf16 by converting its weights.
BF16: dict[Section, Precision] = {
    Section.train: "bf16-autocast",
    Section.flatness: "bf16-autocast",
    Section.prefill: "bf16-weights",
    Section.decode: "bf16-weights",
}
SLOW_BF16 = 0.5  # below this share of float32's rate of matrix products, bf16 is emulated and nobody would use it


@dataclass(frozen=True)
class Plan:
    """One group to measure: (contestant, length) pairs that alternate with one another."""

    section: Section
    precision: Precision
    members: tuple[tuple[str, int], ...]


def plan_groups(
    sections: Sequence[Section],
    names: Sequence[str],
    lengths: dict[Section, Lengths],
    bf16: bool,
    engines: Sequence[str] = (),
) -> list[Plan]:
    """The groups of a run: one per length, all contestants in it, and `engines` where float32 decodes; for flatness one
    with all lengths of ours in it."""
    plans = []
    for section in sections:
        at = lengths[section]
        precisions: list[Precision] = ["float32", BF16[section]] if bf16 else ["float32"]
        for precision in precisions:
            if section == Section.flatness:
                plans.append(Plan(section, precision, tuple((OURS, length) for length in at.alone)))
                continue
            decoding = section == Section.decode and precision == "float32"
            there = [*names, *engines] if decoding else names
            together = [Plan(section, precision, tuple((name, length) for name in there)) for length in at.together]
            plans += together + [Plan(section, precision, ((OURS, length),)) for length in at.alone]
    return plans


class Comparison:
    """One run: its contestants, its meter, and the groups measured so far."""

    def __init__(self, contestants: list[Contestant], meter: Meter, engines: Sequence[Engine] = ()) -> None:
        self.contestants = {contestant.name: contestant for contestant in contestants}
        self.engines = {engine.name: engine for engine in engines}
        self.optimizers = {name: adamw(contestant) for name, contestant in self.contestants.items()}
        self.meter = meter

    def measure(self, plan: Plan) -> Group:
        """Measures one group, in the mode that its longest member allows."""
        mode = self._flatness_mode(plan) if plan.section == Section.flatness else ""
        workloads = {
            f"{name} {length}": self._workload(plan, name, length, checkpointed=bool(mode))
            for name, length in plan.members
        }
        cells = self.meter.measure(workloads)
        return Group(plan.section.value, plan.precision, mode, list(cells.values()))

    def _workload(self, plan: Plan, name: str, length: int, checkpointed: bool) -> Workload:
        section = Section.train if plan.section == Section.flatness else plan.section
        kind = f"{section.value} {plan.precision}{' checkpointed' if checkpointed else ''}"
        return Workload(name, kind, length, self._preparer(section, plan.precision, name, checkpointed))

    def _preparer(
        self, section: Section, precision: Precision, name: str, checkpointed: bool
    ) -> Callable[[int], Timed]:
        if name in self.engines:
            return self.engines[name].prepare
        contestant = self.contestants[name]
        if section == Section.train:
            optimizer = self.optimizers[name]
            return partial(prepare_training, contestant, optimizer, precision, checkpointed=checkpointed)
        return partial(prepare_prefill if section == Section.prefill else prepare_decoding, contestant, precision)

    def _flatness_mode(self, plan: Plan) -> str:
        """Activation checkpointing at every length if the longest needs it, so that all lengths do the same work."""
        name, length = plan.members[-1]
        _, _, needed = self.meter.predict(self._workload(plan, name, length, checkpointed=False))
        free = free_memory()
        if needed is None or free is None or needed <= MEMORY_MARGIN * free:
            return ""
        return (
            f"with activation checkpointing at every length ({length} tokens without would need about "
            f"{gigabytes(needed)}, {gigabytes(free)} are free)"
        )


def build_contestants(also: Sequence[str], without: Sequence[str]) -> list[Contestant]:
    """Ours, then the peers, sized after ours.

    Raises:
        ValueError: two contestants have one name, or `without` names none of the peers.
    """
    ours = build_megalodon()
    peers: dict[str, Callable[[int], Contestant]] = {"llama": build_llama, "mamba": build_mamba}
    if unknown := set(without) - {*peers, "ctranslate2"}:
        known = ", ".join([*peers, "ctranslate2"])
        raise ValueError(f"--without {sorted(unknown)[0]}: there is no such peer; peers are {known}")
    contestants = [ours, *(build(ours.parameters) for name, build in peers.items() if name not in without)]
    contestants += [build_also(source, ours.parameters) for source in also]
    names = [contestant.name for contestant in contestants]
    if len(set(names)) < len(names):
        raise ValueError(f"contestants need different names, got {', '.join(names)}; set NAME in the --also module")
    return contestants


def build_engines(contestants: Sequence[Contestant], without: Sequence[str]) -> list[Engine]:
    """What only decodes: ours in int8, and CTranslate2 where it is installed and there is a Llama to convert."""
    engines: list[Engine] = [Int8Decoder(contestants[0])]
    llama = next((contestant.model for contestant in contestants if contestant.name == "llama"), None)
    if _ctranslate2.INSTALLED and llama is not None and "ctranslate2" not in without:
        for name, quantization in (("ctranslate2", None), ("ctranslate2-int8", "int8")):
            engines.append(_ctranslate2.Engine(name, llama, quantization))
    return engines


class Engine(Protocol):
    """What decodes, and does nothing else here."""

    name: str
    parameters: int
    description: str

    def prepare(self, length: int) -> Timed:
        """As `_workloads.prepare_decoding`."""
        ...


class Int8Decoder:
    """A contestant with its weights in int8."""

    def __init__(self, contestant: Contestant) -> None:
        from megalodon.models.layers.int8 import quantize

        model = copy.deepcopy(contestant.model)
        quantize(model)
        self.name, self.parameters = f"{contestant.name}-int8", contestant.parameters
        self.description = "the same with weights in int8"
        self._contestant = Contestant(self.name, model, self.description)

    def prepare(self, length: int) -> Timed:
        """As `_workloads.prepare_decoding`."""
        return prepare_decoding(self._contestant, "float32", length)


def fast_bf16(machine: dict[str, Any]) -> bool:
    """Whether this machine's matrix products in bf16 keep up with float32."""
    return machine["gemm_gflops_bf16"] >= SLOW_BF16 * machine["gemm_gflops_float32"]


def report(
    result: dict[str, Any], measured: list[tuple[Group, list[Row]]], folder: Path, name: str, quick: bool
) -> Path:
    """Writes the JSON and the table of what has been measured so far."""
    judged = [] if quick else targets(measured, OURS)
    result["groups"], result["targets"] = [as_json(group, rows) for group, rows in measured], judged
    models = [f"- {n}: {c['parameters']:,} parameters; {c['description']}" for n, c in result["contestants"].items()]
    notes = [
        "",
        "Medians over rounds in alternating order. *ours / this*: our speed over the row's, the median of the ratios "
        "within each round of this run; above 1, ours is faster. *of GEMM*: 6 operations per parameter and token over "
        "this machine's plain matrix products of the same precision. *memory added*: the rise of resident memory while "
        f"preparing and calling once. Decoding: mean of the {DECODED_TOKENS} tokens that end at the length, after "
        "feeding all before them.",
        "",
    ]
    if not result["settings"]["bf16"]:
        rates = (f"{result['machine'][key]:.0f}" for key in ("gemm_gflops_bf16", "gemm_gflops_float32"))
        notes += [f"bf16 was left out: matrix products run at {' GFLOP/s in it against '.join(rates)} in float32.", ""]
    parts = [*models, *notes, *target_parts(judged), *section_parts(measured)]
    page = document("Ours beside Llama and Mamba on one CPU", result, parts, quick)
    return save(result, page, folder, name)[1]


def main(
    section: Annotated[list[Section] | None, typer.Option(help="Measure only this (repeatable).")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds per group.")] = 5,
    budget: Annotated[float, typer.Option(min=1, help="Seconds that one model may take at one length, in all.")] = 600,
    min_seconds: Annotated[float, typer.Option(min=0, help="Calls are repeated in a round for at least this.")] = 1.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; PyTorch's choice unless given.")] = None,
    also: Annotated[
        list[str] | None, typer.Option(help="Another implementation: a .py file or module (README).")
    ] = None,
    without: Annotated[list[str] | None, typer.Option(help="Leave out a peer: llama, mamba or ctranslate2.")] = None,
    bf16: Annotated[
        bool | None, typer.Option(help="Measure bf16 too; unless given, where its matrix products are fast.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Short lengths, two rounds: shows that the harness works.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = RESULTS,
) -> None:
    """Measures ours beside Transformers' Llama and Mamba, and writes JSON and a table after every group."""
    torch.manual_seed(0)
    if threads:
        torch.set_num_threads(threads)
    if quick:
        rounds, budget, min_seconds = 2, 20.0, 0.0
    sections = section or list(Section)
    try:
        contestants = build_contestants(also or [], without or [])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    machine = describe_machine(512 if quick else 2048)
    with_bf16 = bf16 if bf16 is not None else fast_bf16(machine)
    settings = {"rounds": rounds, "budget_seconds": budget, "min_seconds": min_seconds, "batch": 1, "bf16": with_bf16}
    result = new_run("cpu_peers", machine, settings)
    engines = build_engines(contestants, without or []) if Section.decode in sections else []
    everyone: list[Contestant | Engine] = [*contestants, *engines]
    result["contestants"] = {c.name: {"parameters": c.parameters, "description": c.description} for c in everyone}
    meter = Meter(rounds, budget, min_seconds, partial(typer.echo, err=True))
    comparison, measured = Comparison(contestants, meter, engines), []
    name = "-".join(["cpu_peers", *(s.value for s in section or ()), *(["quick"] if quick else [])])
    lengths = QUICK_LENGTHS if quick else LENGTHS
    for plan in plan_groups(sections, list(comparison.contestants), lengths, with_bf16, list(comparison.engines)):
        typer.echo(
            f"{plan.section.value} {plan.precision}: {', '.join(f'{n} {at}' for n, at in plan.members)}", err=True
        )
        group = comparison.measure(plan)
        measured.append((group, derive(group, OURS, *_sizes(result, plan.precision))))
        path = report(result, measured, output, name, quick)
    typer.echo(path.read_text())
    if any(row.cell.status == "failed" for _, rows in measured for row in rows):
        raise typer.Exit(1)


def _sizes(result: dict[str, Any], precision: Precision) -> tuple[dict[str, int], float]:
    gemm = result["machine"]["gemm_gflops_float32" if precision == "float32" else "gemm_gflops_bf16"]
    return {name: facts["parameters"] for name, facts in result["contestants"].items()}, gemm


if __name__ == "__main__":
    typer.run(main)
