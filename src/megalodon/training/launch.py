"""From a checked config to a run: what there is to do before the first step, in the order that finds mistakes early."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from megalodon.data import Tokenizer, load_tokenizer, same_tokens
from megalodon.files import is_full
from megalodon.inference.loading import has_tokenizer, model_folder
from megalodon.models import CausalLM, Config
from megalodon.training.checkpoint import CheckpointError, checkpoint_step, choose_checkpoint, list_checkpoints
from megalodon.training.config import TrainConfig, differences
from megalodon.training.config_file import load_config
from megalodon.training.corpora import Texts, build_loader, held_out_rows, held_out_sets
from megalodon.training.model_section import count_parameters, make_model, resolve_model, resolved_section
from megalodon.training.optimizer import build_optimizer
from megalodon.training.run_folder import RunFolder
from megalodon.training.snapshot import seed_everything
from megalodon.training.throughput import MATRIX_SIZE, measure_peak_flops, neighbours, training_flops_per_token
from megalodon.training.trackers import require_libraries
from megalodon.training.trainer import Parts


@dataclass(frozen=True)
class Resolved:
    """A config with nothing left open, and what was needed to know."""

    config: TrainConfig
    model_config: Config
    tokenizer: Tokenizer


def resolve(config: TrainConfig, name: str) -> Resolved:
    """Fill in what a config leaves to others: the tokenizer, the model's every field, the run's folder.

    Args:
        name: of the run's folder under runs/, where none is given.

    Raises:
        ValueError, FileNotFoundError: naming the key, if tokenizer and model are not there or do not fit each other.
    """
    spec = config.tokenizer
    if spec is None:
        spec = "bytes" if config.model.init_from is None else str(model_folder(Path(config.model.init_from)))
    tokenizer = load_tokenizer(spec)
    model_config = resolve_model(config.model, tokenizer)
    require_libraries(config.tracking)
    if config.model.init_from is not None:
        _require_own_tokenizer(tokenizer, config.model.init_from)
    changes = {
        "model": resolved_section(config.model, model_config),
        "tokenizer": spec,
        "run": config.run.model_copy(update={"folder": config.run.folder or f"runs/{name}"}),
    }
    return Resolved(config.model_copy(update=changes), model_config, tokenizer)


def _require_own_tokenizer(tokenizer: Tokenizer, init_from: str) -> None:
    """Refuse a tokenizer by which the weights would take ids for other tokens than those they were trained on."""
    folder = model_folder(Path(init_from))
    if not has_tokenizer(folder):
        return
    if (told := same_tokens(tokenizer, load_tokenizer(folder))) is not None:
        raise ValueError(
            f"tokenizer: {tokenizer.name!r} is another than that of model.init_from ({folder}): {told}. Leave "
            "tokenizer out to train on with the model's own, or leave init_from out to train from the start"
        )


class FullDiskError(OSError):
    """There is no space left: what is left of the run, and how to go on."""


@contextmanager
def telling_of_full_disks(folder: RunFolder) -> Iterator[None]:
    """Whatever file of a run a full disk cuts short, the error says what is left, once."""
    try:
        yield
    except OSError as error:
        if not is_full(error) or isinstance(error, FullDiskError):
            raise
        kept = list_checkpoints(folder.checkpoints)
        place = f"from {kept[-1].name}, which is whole" if kept else "from the start"
        advice = f"free some space and give the same command again: it goes on {place}"
        told = f"{error.strerror}; {advice}"
        raise FullDiskError(error.errno, told, str(error.filename or folder.path)) from error


@contextmanager
def opened(folder: RunFolder) -> Iterator[None]:
    """A run's folder while this process alone works in it.

    Raises:
        ValueError: as `RunFolder.open`.
        FullDiskError: a file could not be written.
    """
    lock = folder.open()
    try:
        with telling_of_full_disks(folder):
            yield
    finally:
        lock.release()


def find_checkpoint(
    config: TrainConfig, folder: RunFolder, say: Callable[[str], None] = lambda text: None
) -> Path | None:
    """The checkpoint to go on from, of this config; None to start. `say` is told of a change that has consequences.

    Raises:
        CheckpointError: if it is damaged, or made with a config that differs in what matters.
        ValueError: if there is one and `run.resume` is never.
    """
    if config.run.resume == "never" and list_checkpoints(folder.checkpoints):
        raise ValueError(
            f"run.resume: never, but {folder.path} holds checkpoints of an earlier run; name another run.folder, or "
            "continue it with run.resume=auto"
        )
    checkpoint = choose_checkpoint(folder.checkpoints, config.run.resume)
    if checkpoint is None:
        return None
    step = checkpoint_step(checkpoint)
    changed, note = differences(load_config(checkpoint / "config.yaml"), config, step)
    if note is not None:
        say(note)
    if changed:
        listed = "".join(f"\n  {change}" for change in changed)
        raise CheckpointError(
            f"{checkpoint} was made with another config:{listed}\nGo on with {folder.config}, "
            f"or start anew in another run.folder (with model.init_from={checkpoint} to keep the weights)"
        )
    return checkpoint


def build_parts(
    resolved: Resolved,
    texts: Texts,
    device: torch.device,
) -> Parts:
    """Loader, model and optimiser of a config, seeded."""
    config, data = resolved.config, resolved.config.data
    loader = build_loader(config, texts.training, 0, 1)
    seed_everything(config.run.seed)
    model = make_model(config.model, resolved.model_config)
    model.to(device)  # type: ignore[arg-type]  # Transformers wraps it, and mypy loses its first argument
    if config.run.gradient_checkpointing:
        checkpoint_activations(model)
    if config.run.compile:
        compile_blocks(model)
    dtype = torch.bfloat16 if config.run.precision == "bfloat16" else torch.float32
    return Parts(
        model=model,
        optimizer=build_optimizer(model, config.optimizer),
        tokenizer=resolved.tokenizer,
        loader=loader,
        heldout=held_out_sets(config, texts, 0, 1, held_out_rows(config, texts)),
        flops_per_token=training_flops_per_token(model, resolved.model_config, data.sequence_length),
        peak_flops=measure_peak_flops(device, dtype),
        device=device,
    )


def checkpoint_activations(model: CausalLM) -> None:
    """Have every block computed twice, to save memory."""
    # Transformers renames the method in 5.x and drops the old name in 6.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def compile_blocks(model: CausalLM) -> None:
    """Compile each block: one graph where the kernels run on plain batches, else what stands between its operators."""
    for block in model.model.layers:
        block.compile()


def introduction(resolved: Resolved, parts: Parts, folder: RunFolder) -> str:
    run = resolved.config.run
    beside = neighbours() if parts.device.type == "cpu" else None
    return (
        f"model: {count_parameters(resolved.model_config):,} parameters on {parts.device}, {run.precision}\n"
        f"peak: {parts.peak_flops / 1e9:,.0f} GFLOP/s, measured with {run.precision} matrix products of {MATRIX_SIZE}; "
        f"a token's training takes {parts.flops_per_token / 1e9:.3g} GFLOP\n"
        f"run: {run.steps:,} steps, kept in {folder.path}" + (f"\n{beside}" if beside else "")
    )
