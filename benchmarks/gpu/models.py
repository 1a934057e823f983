"""Times layers and models on a GPU, bfloat16, the operators by their Triton kernels, beside Llama.

Sections: `layer` (one 7B layer against a Llama-2-7B layer with fused attention, forward and backward), `decode` (the 7B
preset, one token at a time, after contexts that were really read), `training` (a step of the 1.3B preset at 32K tokens
with AdamW) and `small` (a 12 M-parameter byte model against Llama of its width). Each writes files of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import perf_counter
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
    ceilings,
    error,
    free_memory,
    milliseconds,
    synchronize,
)
from _layers import forward_backward, llama_config, llama_layer, our_layer, to_bfloat16
from torch import nn
from transformers import LlamaForCausalLM

from megalodon import MegalodonConfig, MegalodonForCausalLM, MegalodonState

TAIL = 32
"""Tokens of a context that are left for the timed steps, which so complete it."""


@dataclass(frozen=True)
class Sizes:
    """What is timed: shapes are (rows, tokens)."""

    preset: str = "paper-7b"
    llama: tuple[int, int, int] = (4096, 11008, 32)  # width, hidden width, heads
    layers: tuple[tuple[int, int], ...] = ((8, 4096), (1, 32768), (1, 131072))
    contexts: tuple[int, ...] = (1024, 4096, 25 * 4096 + 1024, (1 << 20) + 1024)  # a quarter chunk open, but for 4096
    batches: tuple[int, ...] = (1, 32)
    piece: int = 16384  # of a context, read at once
    training_preset: str = "1.3b"
    training_length: int = 32768
    small: tuple[int, int] = (128, 512)
    small_layers: int = 6
    small_unit: int = 128  # a third of the width
    changes: tuple[tuple[str, int], ...] = ()  # to the presets

    def config(self, preset: str) -> MegalodonConfig:
        """A preset, in a rehearsal far smaller."""
        return MegalodonConfig.from_preset(preset, **dict(self.changes))


TINY = Sizes(
    llama=(16, 32, 2), layers=((2, 8), (1, 16)), contexts=(40, 64), batches=(1, 4), piece=16, training_length=16,
    small=(1, 16), small_layers=1, small_unit=4,
    changes=(
        ("num_layers", 1), ("model_dim", 8), ("z_dim", 8), ("value_dim", 16), ("num_heads", 1), ("vocab_size", 64),
        ("ffn_hidden_dim", 16), ("chunk_size", 16), ("norm_num_groups", 1), ("cema_ndim", 2),
    ),
)  # fmt: skip


# Layers --------------------------------------------------------------------------------------------------------------


def time_layers(report: Report, sizes: Sizes) -> None:
    """Both layers in turn at each shape; a ratio compares two rows of this run, both eager or both compiled."""
    ours, llama = sizes.config(sizes.preset), llama_config(*sizes.llama)
    for compiled in (False, True):
        layers = [our_layer(ours, compiled), llama_layer(llama, compiled)]
        for batch, length in sizes.layers:
            names = {"compiled": compiled, "batch": batch, "length": length}
            rows = [
                attempt(partial(forward_backward, layer, batch, length), layer=layer.name, **names) for layer in layers
            ]
            if all("ms" in row for row in rows):
                rows[1]["ours_over_this"] = rows[1]["ms"] / rows[0]["ms"]
            for row in rows:
                report.add("layer", row)


# Training ------------------------------------------------------------------------------------------------------------


def train_step(model: nn.Module, vocabulary: int, batch: int, length: int) -> dict[str, float]:
    """One step: forward with loss, backward, fused AdamW; weights, gradients and moments in bfloat16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(vocabulary, (batch, length), device=DEVICE)
    extra = {"return_logits": False} if isinstance(model, MegalodonForCausalLM) else {}

    def step() -> None:
        model(tokens, labels=tokens, use_cache=False, **extra).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    time, spread = milliseconds(step, 10, 4.0)
    return {"ms": time, "spread": spread, "tokens_per_second": batch * length / time * 1e3}


def our_model(config: MegalodonConfig, compiled: bool) -> MegalodonForCausalLM:
    """For training; compiled block by block, which compiles once for all."""
    with DEVICE:
        model = MegalodonForCausalLM(config)
    to_bfloat16(model).train()
    if compiled:
        for block in model.model.layers:
            block.compile(fullgraph=True, **COMPILER)
    return model


def time_training(report: Report, sizes: Sizes) -> None:
    """Every block computed twice, which the share of the rate does not count; and once, where there is room."""
    config, length = sizes.config(sizes.training_preset), sizes.training_length

    def run(compiled: bool, checkpointing: bool) -> dict[str, Any]:
        model = our_model(config, compiled)
        if checkpointing:  # Transformers renames it in 5.x
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        found = train_step(model, config.vocab_size, 1, length)
        pairs = min(length, config.chunk_size) / 2
        attention = 6 * config.num_layers * pairs * (config.z_dim + config.value_dim)
        flops = length * (6 * model.num_parameters() + attention)
        rate = ceilings().matrix_floor(flops) / found["ms"]
        return {"parameters": model.num_parameters(), **found, "of_matrix_rate": rate}

    for compiled in (False, True):
        for checkpointing in (True, False):
            variant = {"compiled": compiled, "checkpointing": checkpointing}
            names = {"model": sizes.training_preset, **variant, "batch": 1, "length": length}
            report.add("training", attempt(partial(run, **variant), **names))


def time_small(report: Report, sizes: Sizes) -> None:
    """A byte model beside Llama of its width; a ratio compares two rows of this run, both eager or both compiled."""
    unit, (batch, length) = sizes.small_unit, sizes.small
    ours = MegalodonConfig(
        vocab_size=256, num_layers=sizes.small_layers, model_dim=3 * unit, z_dim=3 * unit // 2, value_dim=6 * unit,
        num_heads=3, ffn_hidden_dim=8 * unit, chunk_size=length, norm_num_groups=6, swiglu=True,
    )  # fmt: skip
    llama = llama_config(3 * unit, 11 * unit, 6, vocab_size=256, num_hidden_layers=sizes.small_layers)

    def run(name: str, compiled: bool) -> dict[str, Any]:
        if name == "ours":
            model: nn.Module = our_model(ours, compiled)
        else:
            model = to_bfloat16(LlamaForCausalLM(llama)).train()
            if compiled:
                model.compile(**COMPILER)
        parameters = sum(p.numel() for p in model.parameters())
        return {"parameters": parameters, **train_step(model, 256, batch, length)}

    for compiled in (False, True):
        names = {"compiled": compiled, "batch": batch, "length": length}
        rows = [attempt(partial(run, name, compiled), model=name, **names) for name in ("ours", "llama")]
        if all("ms" in row for row in rows):
            rows[1]["ours_over_this"] = rows[1]["ms"] / rows[0]["ms"]
        for row in rows:
            report.add("small", row)


# Decoding ------------------------------------------------------------------------------------------------------------


class Reader:
    """One row that reads random tokens in pieces, and says beforehand what it cannot read in time."""

    def __init__(self, model: MegalodonForCausalLM, piece: int, seconds: float) -> None:
        """`seconds`: how long it may read altogether."""
        self.model, self.piece, self.left = model, piece, seconds
        self.state: MegalodonState | None = None
        warm = self._next(None, piece)  # compiles the kernels of new and of carried states
        self._next(warm, piece)
        begin = perf_counter()
        self._next(warm, piece)
        self.seconds_per_token = (perf_counter() - begin) / piece

    def _next(self, state: MegalodonState | None, length: int) -> MegalodonState:
        tokens = torch.randint(self.model.config.vocab_size, (1, length), device=DEVICE)
        state = self.model(tokens, past_key_values=state, use_cache=True, logits_to_keep=1).past_key_values
        synchronize()
        assert state is not None
        return state

    def read(self, context: int) -> dict[str, float]:
        """Go on until so many tokens are read.

        Raises:
            LeftOut: it would take more seconds than are left.
        """
        read = 0 if self.state is None else int(self.state.position[0])
        expected = (context - read) * self.seconds_per_token
        if expected > self.left:
            raise LeftOut(f"would take {expected:.0f} s to read: {self.left:.0f} s are left")
        begin, first = perf_counter(), read
        while read < context:
            length = min(self.piece, context - read)
            self.state = self._next(self.state, length)
            read += length
        seconds = perf_counter() - begin
        self.left -= seconds
        return {"ms": 1e3 * seconds, "tokens_per_second": (context - first) / seconds}


@torch.no_grad()
def time_decode(report: Report, sizes: Sizes, seconds: float) -> None:
    """Milliseconds for a token after each context, the longest last; batches repeat the one row that was read."""
    with DEVICE:
        model = MegalodonForCausalLM(sizes.config(sizes.preset))
    to_bfloat16(model).eval()
    reader = Reader(model, sizes.piece, seconds)
    for context in sizes.contexts:
        names = {"context": context, "batch": 1, "way": "reading"}
        report.add("decode", attempt(partial(reader.read, context - TAIL), **names))
        if "ms" not in report.sections["decode"][-1]:
            break
        state = reader.state
        assert state is not None
        report.add("decode", attempt(partial(eager_step, model, state), **names | {"way": "eager"}))
        for batch in sizes.batches:
            for compiled in (False, True):
                run = partial(graph_step, model, state, batch, compiled)
                way = "graph, compiled" if compiled else "graph"
                report.add("decode", attempt(run, **names | {"batch": batch, "way": way}))


def eager_step(model: MegalodonForCausalLM, state: MegalodonState) -> dict[str, float]:
    """The model's own forward pass, which plans and launches every step anew."""
    token = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    newest = state

    def step() -> None:
        nonlocal newest  # an older state would be copied before anything is appended to it
        newest = model(token, past_key_values=newest, use_cache=True).past_key_values

    time, spread = milliseconds(step, TAIL - 8)
    return against_floors(model, state, 1, time, spread)


def graph_step(model: MegalodonForCausalLM, state: MegalodonState, batch: int, compiled: bool) -> dict[str, Any]:
    """A step of the `StaticDecoder`, one CUDA graph; its first is compared with the model's own.

    Raises:
        LeftOut: `megalodon.inference` needs a package that is not installed; or so many rows do not fit: the repeated
            state and the decoder's own.
    """
    try:
        from megalodon.inference import StaticDecoder
    except ImportError as reason:
        raise LeftOut(f"not installed: {reason}") from None
    places = state.layers[0].chunk.keys.shape[1] + int(state.open_tokens[0]) + TAIL
    needed, free = batch * places * bytes_per_place(model.config), free_memory()
    if needed > free:
        raise LeftOut(f"needs {needed / 2**30:.0f} GiB for open chunks: {free / 2**30:.0f} are free")
    token = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    expected = model(token, past_key_values=state, use_cache=True).logits[0]
    tokens = torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    with torch.compiler.set_stance("force_eager" if REHEARSAL else "default"):  # a rehearsal generates no code
        decoder = StaticDecoder(model, state.repeat(batch), tokens=TAIL, compiled=compiled)
        difference = error(decoder.step(tokens)[-1:], expected)
        time, spread = milliseconds(lambda: decoder.step(tokens), TAIL - 8)
    right = {"difference": difference, "right": difference < 0.1}
    return {**against_floors(model, state, batch, time, spread), **right}


def bytes_per_place(config: MegalodonConfig) -> int:
    """Of the keys and values of one token in all layers, bfloat16."""
    return 2 * config.num_layers * (config.z_dim + config.value_dim)


def against_floors(
    model: MegalodonForCausalLM, state: MegalodonState, batch: int, time: float, spread: float
) -> dict[str, float]:
    """A step's time beside that of reading every weight once, and beside that with the open chunks' keys and values."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    chunks = batch * int(state.open_tokens[0] + TAIL // 2) * bytes_per_place(model.config)
    of_weights, floor = (ceilings().memory_floor(n) for n in (weights, weights + chunks))
    return {
        "ms": time, "spread": spread, "tokens_per_second": batch / time * 1e3, "weights_floor": of_weights,
        "over_weights": time / of_weights, "floor": floor, "over_floor": time / floor,
    }  # fmt: skip


TITLES = {
    "layer": "A layer on a GPU, forward and backward",
    "decode": "Decoding on a GPU",
    "training": "A training step on a GPU",
    "small": "A step of a byte model on a GPU",
}


def main(
    rehearse: Rehearse = False,
    output: Output = None,
    section: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(TITLES)}; can be repeated. All by default.")
    ] = None,
    read_seconds: Annotated[float, typer.Option(help="What `decode` may spend on reading contexts.")] = 150,
) -> None:
    """Times, writes JSON and tables; exit status 1 if a row failed."""
    chosen = section or list(TITLES)
    if unknown := set(chosen) - set(TITLES):
        raise typer.BadParameter(f"--section {', '.join(sorted(unknown))}: choose from {', '.join(TITLES)}")
    sizes, passed = TINY if rehearse else Sizes(), True
    time: dict[str, Callable[[Report, Sizes], None]] = {
        "layer": time_layers,
        "decode": partial(time_decode, seconds=read_seconds),
        "training": time_training,
        "small": time_small,
    }
    for name in chosen:
        report = Report(f"models-{name}", TITLES[name], vars(sizes), output)
        time[name](report, sizes)
        passed = report.finish() and passed
    if not passed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
