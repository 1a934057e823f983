"""Every mixer of the kin at one width and depth: tokens a second and memory, training, reading, decoding, encoding,
beside the peers' own plain paths.

A group is `attention` and a few others at one length. Its contestants alternate round by round, so that the ratios of a
group hold on a machine that others use too, and its row lands when it is done: a run that was ended goes on from there.
What would not fit the budget or the memory is left out, with the reason. Peers are Transformers' classes as they run on
this machine; beside its Mamba and Mamba2 stand ours with the same parameters, which have no feed-forward layer either.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from _machine import describe_machine, machine_slug
from _measure import Cell, Meter, Sample, Seconds, Spread, Timed, Workload, gigabytes, paired_ratios
from _report import RESULTS, document, markdown_table, new_run, save
from transformers import AutoConfig, AutoModelForCausalLM

from megalodon import KinConfig, KinForCausalLM, KinModel
from megalodon.convert import kin_from_transformers
from megalodon.models.kin.mixers import MIXERS, Mixer, mixer_class
from megalodon.models.kin.model import new_mixer

VOCABULARY = 512
DECODED = 8  # tokens decoded in one call
IN_A_GROUP = 4
WIDE = {"model_dim": 256, "num_layers": 4, "num_heads": 4, "ffn_hidden_dim": 688}
SMALL = {"model_dim": 32, "num_layers": 1, "num_heads": 4, "ffn_hidden_dim": 48}
YARDSTICK = "attention"
LLAMA, MAMBA, MAMBA2 = "llama (transformers)", "mamba (transformers)", "mamba2 (transformers)"
TWINS = {"mamba, its twin": MAMBA, "mamba2, its twin": MAMBA2}
"""Our models with the parameters of Transformers' -> those."""
PEERS = (LLAMA, MAMBA, MAMBA2)
REACHES = (("mamba, its twin", MAMBA, 20.0, 0), ("mamba2, its twin", MAMBA2, 5.0, 0), ("gla", LLAMA, 1.0, 2048))
"""(ours, the peer, how many times as fast it shall train, from which length on)."""
CACHES = ("past_key_values", "cache")
CLOCKS: dict[bool, Callable[[], float]] = {False: time.perf_counter, True: time.process_time}


class Section(StrEnum):
    train = "train"
    read = "read"
    decode = "decode"
    two_way = "two_way"
    cross = "cross"


TITLES = {
    Section.train: "Training: forward and backward, batch 1, tokens/s (times attention's; memory added)",
    Section.read: "Reading: a text and its state, batch 1, tokens/s (times attention's; memory added)",
    Section.decode: "Decoding: milliseconds a token after a context, batch 1 (bytes of the state)",
    Section.two_way: "Encoders: every token sees all, batch 1, tokens/s (times attention's; memory added)",
    Section.cross: "Across: one layer, each token sees all of another text as long, tokens/s (times attention's; "
    "memory added)",
}


class Group(NamedTuple):
    """What is measured together. `names` begin with the yardstick."""

    section: Section
    length: int
    names: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.section.value} {self.length}: {', '.join(self.names)}"


Measured = dict[str, dict[str, Cell]]  # key of a group -> contestant -> what became of it


def contestants(section: Section, mixers: list[str] | None, peers: bool) -> list[tuple[str, ...]]:
    """Who takes part in a section, in the groups that are measured together; the yardstick takes part in each."""
    chosen = [name for name in mixers or MIXERS if name != YARDSTICK]
    if section == Section.two_way:
        chosen = [name for name in chosen if mixer_class(name).two_way_mode]
    elif section == Section.cross:
        chosen = [name for name in chosen if mixer_class(name).cross is not Mixer.cross]
    else:
        chosen = [name for name in chosen if mixer_class(name).causal_mode]
        if peers:
            known = [(LLAMA, *(["gla"] if "gla" in chosen else [])), *TWINS.items()]
            rest = [name for name in chosen if name != "gla"]
            return [(YARDSTICK, *names) for names in known] + _few_at_a_time(rest)
    return _few_at_a_time(chosen) or [(YARDSTICK,)]


def _few_at_a_time(names: list[str]) -> list[tuple[str, ...]]:
    return [(YARDSTICK, *names[i : i + IN_A_GROUP]) for i in range(0, len(names), IN_A_GROUP)]


def groups_of(
    sections: Sequence[Section], lengths: Sequence[int], mixers: list[str] | None, peers: bool
) -> Iterator[Group]:
    """All groups, the shortest length first."""
    for length in sorted(lengths):
        for section in sections:
            for names in contestants(section, mixers, peers):
                yield Group(section, length, names)


def peer_config(name: str, sizes: dict[str, int]) -> Any:
    """The configuration of one of Transformers' classes. Mamba2's heads and state are those of its published models."""
    dim, layers, heads = sizes["model_dim"], sizes["num_layers"], sizes["num_heads"]
    common = {"vocab_size": VOCABULARY, "hidden_size": dim, "num_hidden_layers": layers}
    head = min(64, dim // 2)
    own: dict[str, dict[str, Any]] = {
        LLAMA: {
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "intermediate_size": sizes["ffn_hidden_dim"],
            "max_position_embeddings": 1 << 20,
        },
        MAMBA: {},
        MAMBA2: {"head_dim": head, "num_heads": 2 * dim // head, "state_size": 2 * head, "n_groups": 1},
    }
    return AutoConfig.for_model(name.split()[0], **common, **own[name], bos_token_id=1, eos_token_id=1, pad_token_id=0)


@cache
def build(name: str, quick: bool, section: Section) -> torch.nn.Module:
    """A mixer, its model or encoder, a peer's model or the twin of one; the same weights whoever asks."""
    sizes = SMALL if quick else WIDE
    torch.manual_seed(0)
    if name in PEERS:
        return AutoModelForCausalLM.from_config(peer_config(name, sizes))
    if name in TWINS:
        return kin_from_transformers(build(TWINS[name], quick, section))
    config = KinConfig(mixers=name, vocab_size=VOCABULARY, two_way=section == Section.two_way, **sizes)
    if section == Section.cross:
        return new_mixer(config, 0)
    return KinModel(config) if section == Section.two_way else KinForCausalLM(config)


class Work:
    """What is timed, by one clock. `remembered`: bytes of the states that decoding began with."""

    def __init__(self, quick: bool, clock: Callable[[], float]) -> None:
        self.quick, self.clock = quick, clock
        self.remembered: dict[tuple[str, int], int] = {}

    def prepare(self, section: Section, name: str, length: int) -> Timed:
        """The call whose seconds are taken."""
        family = section if section in (Section.two_way, Section.cross) else Section.train
        model = build(name, self.quick, family)
        if section == Section.cross:
            assert isinstance(model, Mixer)
            x, source = (torch.randn(1, length, (SMALL if self.quick else WIDE)["model_dim"]) for _ in range(2))
            return self._timed(section, torch.no_grad()(lambda: model.eval().cross(x, source)))
        x = torch.randint(0, VOCABULARY, (1, length))
        if section == Section.decode:
            return self._decoder(model, name, x)
        if section == Section.train:

            def train() -> None:
                model.train()(x, labels=x).loss.backward()

            return self._timed(section, train, model.zero_grad)
        options: dict[str, Any] = (
            {"use_cache": False} if section == Section.two_way else {"use_cache": True, "logits_to_keep": 1}
        )
        return self._timed(section, torch.no_grad()(lambda: model.eval()(x, **options)))

    def _timed(self, section: Section, run: Callable[[], Any], after: Callable[[], Any] = lambda: None) -> Timed:
        def call() -> Seconds:
            start = self.clock()
            run()
            seconds = self.clock() - start
            after()
            return {section.value: seconds}

        return call

    def _decoder(self, model: torch.nn.Module, name: str, x: torch.Tensor) -> Timed:
        """Decoding after the context x. A peer's cache is changed in place: its context grows by what is decoded."""
        with torch.no_grad():
            out = model.eval()(x, use_cache=True, logits_to_keep=1)
        called = next(name for name in CACHES if getattr(out, name, None) is not None)
        state = out[called]
        if isinstance(model, KinForCausalLM):
            self.remembered[name, x.shape[1]] = int(state.nbytes)
        token = x[:, :1]

        @torch.no_grad()
        def decode() -> None:
            nonlocal state
            for _ in range(DECODED):
                state = model(token, **{called: state}, use_cache=True)[called]

        return self._timed(Section.decode, decode)


def measure(group: Group, work: Work, meter: Meter) -> dict[str, Cell]:
    """The group's cells by contestant."""
    section = group.section
    return meter.measure(
        {
            name: Workload(name, section.value, group.length, partial(work.prepare, section, name))
            for name in group.names
        }
    )


def cell_of(kept: dict[str, Any]) -> Cell:
    """A cell as it was written."""
    return Cell(**{**kept, "samples": [Sample(**sample) for sample in kept["samples"]]})


class Table:
    """What was measured, as pages show it."""

    def __init__(self, measured: Measured, remembered: dict[str, int]) -> None:
        self.measured, self.remembered = measured, remembered

    def groups(self, section: Section, length: int, *names: str) -> list[dict[str, Cell]]:
        """The groups at this length in which all of these have samples."""
        start = f"{section.value} {length}: "
        found = (cells for key, cells in self.measured.items() if key.startswith(start))
        return [cells for cells in found if all(name in cells and cells[name].samples for name in names)]

    def seconds(self, section: Section, length: int, name: str) -> float | None:
        """The median of all samples."""
        every = [s.total for cells in self.groups(section, length, name) for s in cells[name].samples]
        return Spread.of(every).median if every else None

    def times(self, section: Section, length: int, name: str, other: str) -> float | None:
        """How many times as fast as another it is: the median over the rounds that both took part in."""
        phases = [section.value]
        ratios = [
            ratio
            for cells in self.groups(section, length, name, other)
            for ratio in paired_ratios(cells[other].samples, cells[name].samples, phases)
        ]
        return Spread.of(ratios).median if ratios else None

    def text(self, section: Section, length: int, name: str) -> str:
        """One cell of a table."""
        seconds = self.seconds(section, length, name)
        if seconds is None:
            start = f"{section.value} {length}: "
            cells = [c[name] for key, c in self.measured.items() if key.startswith(start) and name in c]
            return f"({cells[0].status})" if cells else ""
        if section == Section.decode:
            remembered = self.remembered.get(f"{name} {length}")
            return f"{seconds / DECODED * 1e3:.2f}" + ("" if remembered is None else f" ({remembered:,})")
        cell = self.groups(section, length, name)[0][name]
        times = None if name == YARDSTICK else self.times(section, length, name, YARDSTICK)
        said = [] if times is None else [f"{times:.2f}"]
        said += [] if cell.peak_bytes_added is None else [gigabytes(cell.peak_bytes_added)]
        return f"{length / seconds:,.0f}" + (f" ({'; '.join(said)})" if said else "")

    def faster_from(self, section: Section, lengths: Sequence[int], name: str) -> str:
        """The efficiency length: from where on it is faster than `attention`, PyTorch's own kernel. Between measured
        lengths the logarithm of the ratio is taken to be a line over that of the length."""
        points = [(n, self.times(section, n, name, YARDSTICK)) for n in sorted(lengths)]
        known = [(n, math.log(times)) for n, times in points if times is not None]
        if name == YARDSTICK or not known or known[-1][1] <= 0:
            return ""
        slower = [i for i, (_, ratio) in enumerate(known) if ratio <= 0]
        if not slower:
            return f"{known[0][0]:,} or less"
        (a, low), (b, high) = known[slower[-1]], known[slower[-1] + 1]
        where = math.exp(math.log(a) + (math.log(b) - math.log(a)) * -low / (high - low))
        return f"about {float(f'{where:.2g}'):,.0f}"

    def section(self, section: Section, lengths: Sequence[int]) -> list[str]:
        """The Markdown of one section."""
        names = dict.fromkeys(
            n for key, cells in self.measured.items() if key.startswith(f"{section.value} ") for n in cells
        )
        if not names:
            return []
        head = ["mixer ", *(f"{n:,}" for n in lengths)]
        rows = [[name, *(self.text(section, n, name) for n in lengths)] for name in names]
        if section in (Section.train, Section.two_way, Section.cross):
            head.append("faster than attention from")
            rows = [[*row, self.faster_from(section, lengths, row[0])] for row in rows]
        return [f"## {TITLES[section]}", "", markdown_table(head, rows), ""]

    def reaches(self, lengths: Sequence[int]) -> list[str]:
        """What was aimed at, and what was reached."""
        rows = []
        for ours, peer, aim, least in REACHES:
            times = {n: self.times(Section.train, n, ours, peer) for n in lengths if n >= least}
            rows += [
                [ours, f"{aim:g} times {peer}", f"{n:,}", f"{found:.2f}", "yes" if found >= aim else "no"]
                for n, found in times.items()
                if found is not None
            ]
        if not rows:
            return []
        head = ["ours ", "shall train as fast as ", "length", "times as fast", "reached "]
        return ["## What was aimed at", "", markdown_table(head, rows), ""]


def load(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """An earlier run's result, to go on with; None where there is none.

    Raises:
        typer.BadParameter: it was made with other settings.
    """
    if not path.is_file():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    for name, value in settings.items():
        if result["settings"].get(name) != value:
            raise typer.BadParameter(
                f"{path.name} was measured with {name} {result['settings'].get(name)}, not {value}: remove it, give "
                "--afresh, or name another --folder"
            )
    return result


def main(
    mixers: Annotated[list[str] | None, typer.Option(help="mixers to measure; all if none is named")] = None,
    section: Annotated[list[Section] | None, typer.Option(help="sections to measure; all if none is named")] = None,
    length: Annotated[list[int] | None, typer.Option(help="tokens; 512, 2048, 8192 and 16384 if none is given")] = None,
    peers: Annotated[bool, typer.Option(help="measure Transformers' classes too")] = True,
    threads: Annotated[int, typer.Option(help="threads of PyTorch")] = 2,
    rounds: Annotated[int, typer.Option(help="rounds of each group")] = 3,
    budget: Annotated[float, typer.Option(help="seconds that one workload may take, all rounds together")] = 120.0,
    cpu_time: Annotated[
        bool, typer.Option(help="the time of one thread on a processor: for a machine that others use too")
    ] = False,
    afresh: Annotated[bool, typer.Option(help="measure again what an earlier run left in the folder")] = False,
    quick: Annotated[bool, typer.Option(help="tiny sizes, to see that the script works")] = False,
    folder: Annotated[Path, typer.Option(help="where the results go")] = RESULTS,
    say: Annotated[bool, typer.Option(help="report progress")] = True,
) -> None:
    """Measure and write benchmarks/results/kin_speed-MACHINE.json and .md after every group; called again, go on."""
    threads, rounds = 1 if cpu_time else threads, 1 if quick else rounds
    torch.set_num_threads(threads)
    sections, lengths = section or list(Section), sorted(length or ([64] if quick else [512, 2048, 8192, 16384]))
    settings = {
        "sizes": SMALL if quick else WIDE,
        "threads": threads,
        "rounds": rounds,
        "budget_seconds": budget,
        "clock": "the time of one thread on a processor" if cpu_time else "wall time",
    }
    name = "kin_speed" + ("-cpu_time" if cpu_time else "") + ("-quick" if quick else "")
    machine = describe_machine(64 if quick else 2048)
    before = None if afresh else load(folder / f"{name}-{machine_slug(machine)}.json", settings)
    result = new_run("kin_speed", machine, settings) if before is None else before
    kept: dict[str, dict[str, Any]] = result.setdefault("groups", {})
    remembered: dict[str, int] = result.setdefault("state_bytes", {})
    talk: Callable[[str], None] = print if say else lambda _: None
    meter = Meter(rounds, budget, 0.0 if quick else 0.3, talk)
    work = Work(quick, CLOCKS[cpu_time])
    measured = {key: {who: cell_of(cell) for who, cell in cells.items()} for key, cells in kept.items()}
    for group in groups_of(sections, lengths, mixers, peers):
        if group.key in kept:
            continue
        talk(group.key)
        measured[group.key] = measure(group, work, meter)
        kept[group.key] = {who: asdict(cell) for who, cell in measured[group.key].items()}
        remembered |= {f"{who} {tokens}": size for (who, tokens), size in work.remembered.items()}
        write(result, Table(measured, remembered), quick, folder, name)
    talk("\n".join(page(result, Table(measured, remembered))))


def page(result: dict[str, Any], table: Table) -> list[str]:
    """The tables of all that was measured so far."""
    lengths = sorted({int(key.split(":")[0].split()[1]) for key in table.measured})
    clock = result["settings"]["clock"]
    parts = [f"Clock: {clock}. Contestants were measured a few at a time, each few beside attention in turns.", ""]
    parts += table.reaches(lengths)
    for part in Section:
        parts += table.section(part, lengths)
    return parts


def write(result: dict[str, Any], table: Table, quick: bool, folder: Path, name: str) -> None:
    """Both files, each in one move."""
    save(result, document("The kin: speed and memory", result, page(result, table), quick), folder, name)


if __name__ == "__main__":
    typer.run(main)
