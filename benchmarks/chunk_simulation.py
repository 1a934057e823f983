"""Chunk parallelism over 2 to 256 ranks on a simulated network, beside handing states on in turn and ring attention.

A forward pass of one layer over a row of `--lengths` tokens. Every rank computes at a given rate; a message takes
latency + bytes / bandwidth. Four ways to cut the sequence:

- gather: ours. All ranks compute their spans at once; two all-gathers of summaries, of log2(R) steps each. CEMA's
  travels while the values are projected, so that only what is left of it counts.
- scan: the same, were CEMA's states combined in log2(R) steps of one state each; not written.
- turn: the authors' scheme. Each rank waits for the state of the one before: norm, then CEMA, layer by layer.
- ring: exact attention of a Transformer of the same width and layers, keys and values passed around a ring while the
  blocks that have come are computed; causal halves balanced.

It is arithmetic, not a measurement: it shows what grows with ranks and length. Bytes of the first are those that the
tests count.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from _report import RESULTS

from megalodon import MegalodonConfig
from megalodon.parallel import MeshSizes
from megalodon.parallel.traffic import Step, block_parameters, chunk_traffic


def layer_seconds(config: MegalodonConfig, tokens: float, flops: float) -> float:
    """Computing one layer's forward pass of so many tokens."""
    attention = config.chunk_size / 2 * (config.z_dim + config.value_dim)
    return 2 * tokens * (sum(block_parameters(config)) + attention) / flops


MEMORY_BANDWIDTH = 3.35e12
"""Bytes a second of an H100's memory: what bounds norm and CEMA."""


def memory_seconds(config: MegalodonConfig, tokens: float) -> float:
    """Computing norm and CEMA, before which the next rank in turn cannot begin: each float32 read and written twice."""
    return tokens * config.model_dim * 2 * 16 / MEMORY_BANDWIDTH


def computing(config: MegalodonConfig, tokens: float, flops: float) -> float:
    """A span's layer, and what the state before it adds to its tokens."""
    response = 2 * tokens * config.model_dim * 2 * config.cema_ndim / flops
    return layer_seconds(config, tokens, flops) + memory_seconds(config, tokens) + response


def summaries(config: MegalodonConfig, length: int, ranks: int, flops: float, norm: float, cema: float) -> float:
    """Seconds of a layer whose two summaries travel for so long; CEMA's while the values are projected."""
    tokens = length / ranks
    hidden = 2 * tokens * config.model_dim * config.value_dim / flops
    return computing(config, tokens, flops) + norm + max(0.0, cema - hidden)


def gather(config: MegalodonConfig, length: int, ranks: int, flops: float, latency: float, bandwidth: float) -> float:
    """Seconds of a layer."""
    step = Step(rows=1, parts=1, length=length, bytes_=2, checkpointing=False)
    sent = chunk_traffic(config, MeshSizes(chunk=ranks), step, 1, False).bytes_ / 2  # forward only
    norms = (ranks - 1) * 2 * config.norm_num_groups * 8
    steps = math.ceil(math.log2(ranks)) * latency
    return summaries(config, length, ranks, flops, steps + norms / bandwidth, steps + (sent - norms) / bandwidth)


def scan(config: MegalodonConfig, length: int, ranks: int, flops: float, latency: float, bandwidth: float) -> float:
    """Seconds of a layer if CEMA's states were combined in log2(R) steps of one state each, forward; not written."""
    steps = math.ceil(math.log2(ranks))
    state = config.model_dim * config.cema_ndim * 8
    norms = (ranks - 1) * 2 * config.norm_num_groups * 8
    return summaries(
        config,
        length,
        ranks,
        flops,
        steps * latency + norms / bandwidth,
        steps * (latency + state / bandwidth),
    )


def turn(config: MegalodonConfig, length: int, ranks: int, flops: float, latency: float, bandwidth: float) -> float:
    """Seconds of a layer. The ranks before go on with the next layer meanwhile, so that the last one's wait is shared
    by all layers of a pass."""
    states = config.model_dim * config.cema_ndim * 8 + 2 * config.norm_num_groups * 4
    memory = memory_seconds(config, length / ranks)
    hop = 2 * latency + states / bandwidth + memory
    return layer_seconds(config, length / ranks, flops) + memory + hop * (ranks - 1) / config.num_layers


def ring(config: MegalodonConfig, length: int, ranks: int, flops: float, latency: float, bandwidth: float) -> float:
    """Seconds of a Transformer's layer: 12 D^2 parameters, keys and values of width D in bfloat16."""
    dim, span = config.model_dim, length / ranks
    dense = 2 * span * 12 * dim**2 / flops
    block = 2 * span * span / 2 * 2 * dim / flops * 2  # a causal half of scores and values, balanced
    message = latency + 2 * span * dim * 2 / bandwidth
    return dense + block + (ranks - 1) * max(block, message)


def table(arguments: argparse.Namespace, length: int) -> list[str]:
    """Markdown: seconds of a layer over a row of so many tokens, and its bytes."""
    config = MegalodonConfig.from_preset(arguments.model)
    given = (arguments.flops, arguments.latency, arguments.bandwidth)
    lines = [
        f"{arguments.model}, one row of {length:,} tokens, forward pass of one layer; computing at "
        f"{arguments.flops / 1e12:.0f} TFLOP/s, {arguments.latency * 1e6:.0f} us a message, "
        f"{arguments.bandwidth / 1e9:.0f} GB/s. Simulated.",
        "",
        "| ranks | one rank / R, ms | gather, ms | scan (not written), ms | in turn, ms | ring attention, ms | "
        "bytes sent: gather | bytes sent: ring |",
        "| --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for ranks in (2, 4, 8, 16, 32, 64, 128, 256):
        span = length / ranks
        ideal = layer_seconds(config, span, arguments.flops) + memory_seconds(config, span)
        times = [scheme(config, length, ranks, *given) for scheme in (gather, scan, turn, ring)]
        step = Step(rows=1, parts=1, length=length, bytes_=2, checkpointing=False)
        sent = chunk_traffic(config, MeshSizes(chunk=ranks), step, 1, False).bytes_ / 2
        passed = (ranks - 1) * 2 * length / ranks * config.model_dim * 2
        cells = [f"{1e3 * t:.3f}" for t in (ideal, *times)]
        lines.append(f"| {ranks} | " + " | ".join(cells) + f" | {sent / 1e6:.2f} MB | {passed / 1e6:.2f} MB |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="paper-7b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[262144, 2097152])
    parser.add_argument("--flops", type=float, default=445e12, help="per second and rank (45 %% of an H100's peak)")
    parser.add_argument("--latency", type=float, default=15e-6, help="seconds a message")
    parser.add_argument("--bandwidth", type=float, default=50e9, help="bytes a second")
    arguments = parser.parse_args()
    text = "\n\n".join("\n".join(table(arguments, length)) for length in arguments.lengths) + "\n"
    RESULTS.mkdir(exist_ok=True)
    Path(RESULTS / "chunk_simulation.md").write_text("# Chunk parallelism, simulated\n\n" + text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
