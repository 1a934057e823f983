"""Every mixer of the kin at one width and depth: tokens a second and memory, training, reading and decoding, beside the
peers' own plain paths.

Contestants of one section and length alternate round by round, so what a row says holds against its neighbours. What
would not fit the budget or the memory is left out, with the reason. Peers are Transformers' classes of the same width,
depth and feed-forward width, as they run on this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from _machine import describe_machine
from _measure import Cell, Meter, Seconds, Spread, Timed, Workload, gigabytes
from _report import RESULTS, document, markdown_table, new_run, save
from transformers import AutoConfig, AutoModelForCausalLM

from megalodon import KinConfig, KinForCausalLM, KinModel
from megalodon.models.kin.mixers import MIXERS, mixer_class

VOCABULARY = 512
DECODED = 8  # tokens decoded in one call
WIDE = {"model_dim": 256, "num_layers": 4, "num_heads": 4, "ffn_hidden_dim": 688}
SMALL = {"model_dim": 32, "num_layers": 1, "num_heads": 4, "ffn_hidden_dim": 48}
PEERS = ("llama (transformers)", "mamba (transformers)", "mamba2 (transformers)")


class Section(StrEnum):
    train = "train"
    read = "read"
    decode = "decode"
    two_way = "two_way"


TITLES = {
    Section.train: "Training: forward and backward, batch 1, tokens/s (memory added)",
    Section.read: "Reading: a text and its state, batch 1, tokens/s (memory added)",
    Section.decode: "Decoding: milliseconds a token after a context, batch 1 (bytes of the state)",
    Section.two_way: "Encoders: every token sees all, batch 1, tokens/s (memory added)",
}


def contestants(section: Section, mixers: list[str] | None, peers: bool) -> list[str]:
    """Who takes part in a section."""
    if section == Section.two_way:
        return [name for name in mixers or MIXERS if mixer_class(name).two_way_mode]
    names = [name for name in mixers or MIXERS if mixer_class(name).causal_mode]
    return [*names, *(PEERS if peers else ())]


def peer_config(name: str, sizes: dict[str, int]) -> Any:
    """The configuration of one of Transformers' classes."""
    dim, layers, heads = sizes["model_dim"], sizes["num_layers"], sizes["num_heads"]
    common = {"vocab_size": VOCABULARY, "hidden_size": dim, "num_hidden_layers": layers}
    kind = name.split()[0]
    own: dict[str, dict[str, Any]] = {
        "llama": {
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "intermediate_size": sizes["ffn_hidden_dim"],
            "max_position_embeddings": 1 << 20,
        },
        "mamba": {},
        "mamba2": {"head_dim": 16, "num_heads": 2 * dim // 16, "state_size": 64, "n_groups": 1},
    }
    return AutoConfig.for_model(kind, **common, **own[kind], bos_token_id=1, eos_token_id=1, pad_token_id=0)


@cache
def build(name: str, quick: bool, two_way: bool = False) -> torch.nn.Module:
    """A mixer's model or encoder, or a peer's model; the same weights whoever asks."""
    sizes = SMALL if quick else WIDE
    torch.manual_seed(0)
    if name in PEERS:
        return AutoModelForCausalLM.from_config(peer_config(name, sizes))
    config = KinConfig(mixers=name, vocab_size=VOCABULARY, two_way=two_way, **sizes)
    return KinModel(config) if two_way else KinForCausalLM(config)


def prepare(section: Section, name: str, quick: bool, length: int) -> Timed:
    """The call whose seconds are taken."""
    model, x = build(name, quick, section == Section.two_way), torch.randint(0, VOCABULARY, (1, length))

    def train() -> Seconds:
        model.train()
        start = perf_counter()
        model(x, labels=x).loss.backward()
        seconds = perf_counter() - start
        model.zero_grad()
        return {"train": seconds}

    @torch.no_grad()
    def read() -> Seconds:
        model.eval()
        start = perf_counter()
        model(x, use_cache=True, logits_to_keep=1)
        return {"read": perf_counter() - start}

    @torch.no_grad()
    def encode() -> Seconds:
        model.eval()
        start = perf_counter()
        model(x, use_cache=False)
        return {"two_way": perf_counter() - start}

    if section == Section.two_way:
        return encode
    if section == Section.decode:
        return decoder(model, x)
    return train if section == Section.train else read


def decoder(model: torch.nn.Module, x: torch.Tensor) -> Timed:
    """Decoding after the context x. A peer's cache is changed in place: its context grows by what is decoded."""
    model.eval()
    with torch.no_grad():
        state = model(x, use_cache=True, logits_to_keep=1).past_key_values
    token = x[:, :1]

    @torch.no_grad()
    def decode() -> Seconds:
        nonlocal state
        start = perf_counter()
        for _ in range(DECODED):
            state = model(token, past_key_values=state, use_cache=True).past_key_values
        return {"decode": perf_counter() - start}

    return decode


def state_bytes(name: str, quick: bool, length: int) -> int | None:
    """What a kin model remembers of so many tokens; None for a peer."""
    model = build(name, quick)
    if not isinstance(model, KinForCausalLM):
        return None
    with torch.no_grad():
        return int(
            model(torch.zeros(1, length, dtype=torch.long), use_cache=True, logits_to_keep=1).past_key_values.nbytes
        )


def cell_text(section: Section, name: str, quick: bool, cell: Cell) -> str:
    """One cell of the table."""
    if cell.status != "measured":
        return f"({cell.status})"
    seconds = Spread.of([sample.total for sample in cell.samples]).median
    if section == Section.decode:
        remembered = state_bytes(name, quick, cell.length)
        return f"{seconds / DECODED * 1e3:.2f}" + ("" if remembered is None else f" ({remembered:,})")
    memory = "" if cell.peak_bytes_added is None else f" ({gigabytes(cell.peak_bytes_added)})"
    return f"{cell.length / seconds:,.0f}{memory}"


def efficiency_length(name: str, by_length: dict[int, dict[str, Cell]]) -> str:
    """The shortest measured length from which on a contestant is faster than `attention`, PyTorch's own kernel."""
    faster = ""
    for length, cells in sorted(by_length.items(), reverse=True):
        if name == "attention" or any(cells[each].status != "measured" for each in (name, "attention")):
            continue
        own, exact = (
            Spread.of([sample.total for sample in cells[each].samples]).median for each in (name, "attention")
        )
        if own >= exact:
            break
        faster = f"{length:,}"
    return faster


def measure(
    sections: list[Section], names: dict[Section, list[str]], lengths: list[int], quick: bool, meter: Meter
) -> dict[Section, dict[int, dict[str, Cell]]]:
    """Cells by section, length and contestant."""
    found: dict[Section, dict[int, dict[str, Cell]]] = {}
    for section in sections:
        for length in lengths:
            workloads = {
                name: Workload(name, section.value, length, partial(prepare, section, name, quick))
                for name in names[section]
            }
            found.setdefault(section, {})[length] = meter.measure(workloads)
    return found


def main(
    mixers: Annotated[list[str] | None, typer.Option(help="mixers to measure; all if none is named")] = None,
    section: Annotated[list[Section] | None, typer.Option(help="sections to measure; all if none is named")] = None,
    length: Annotated[list[int] | None, typer.Option(help="tokens; 512, 2048, 8192 and 16384 if none is given")] = None,
    peers: Annotated[bool, typer.Option(help="measure Transformers' classes too")] = True,
    threads: Annotated[int, typer.Option(help="threads of PyTorch")] = 2,
    rounds: Annotated[int, typer.Option(help="rounds of each group")] = 3,
    budget: Annotated[float, typer.Option(help="seconds that one workload may take, all rounds together")] = 120.0,
    quick: Annotated[bool, typer.Option(help="tiny sizes, to see that the script works")] = False,
    folder: Annotated[Path, typer.Option(help="where the results go")] = RESULTS,
    say: Annotated[bool, typer.Option(help="report progress")] = True,
) -> None:
    """Measure and write benchmarks/results/kin_speed-MACHINE.json and .md."""
    torch.set_num_threads(threads)
    sections, lengths = section or list(Section), length or ([64] if quick else [512, 2048, 8192, 16384])
    names = {part: contestants(part, mixers, peers) for part in sections}
    settings = {"sizes": SMALL if quick else WIDE, "threads": threads, "rounds": rounds, "budget_seconds": budget}
    result = new_run("kin_speed", describe_machine(64 if quick else 2048), settings)
    talk: Callable[[str], None] = print if say else lambda _: None
    meter = Meter(1 if quick else rounds, budget, 0.0 if quick else 0.3, talk)
    found = measure(sections, names, lengths, quick, meter)
    result["cells"] = {
        part.value: {str(n): {name: asdict(cell) for name, cell in cells.items()} for n, cells in by_length.items()}
        for part, by_length in found.items()
    }
    parts = []
    for part, by_length in found.items():
        rows = [[name, *(cell_text(part, name, quick, by_length[n][name]) for n in lengths)] for name in names[part]]
        head = ["mixer ", *(f"{n:,}" for n in lengths)]
        if part in (Section.train, Section.two_way) and "attention" in names[part]:
            head.append("faster than attention from")
            rows = [[*row, efficiency_length(row[0], by_length)] for row in rows]
        parts += [f"## {TITLES[part]}", "", markdown_table(head, rows), ""]
    for path in save(result, document("The kin: speed and memory", result, parts, quick), folder, "kin_speed"):
        talk(f"wrote {path}")


if __name__ == "__main__":
    typer.run(main)
