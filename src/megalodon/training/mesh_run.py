"""A run on a mesh, from a checked config: what `start.train` does for one process, agreed on by all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from megalodon.files import write_text
from megalodon.inference import choose_device
from megalodon.inference.loading import model_folder
from megalodon.parallel import Mesh, ParallelModel, mesh_problems
from megalodon.parallel.initial import empty_model, initial_parameters, stored_parameters
from megalodon.parallel.pipeline import CAN_MEASURE
from megalodon.parallel.sharded import read_weights, sharded_checkpoint, weight_shapes
from megalodon.training import launch
from megalodon.training.checkpoint import CheckpointError
from megalodon.training.config import TrainConfig, common_settings
from megalodon.training.config_file import config_text
from megalodon.training.corpora import Texts, another_rank, build_loader, held_out_sets, prepare
from megalodon.training.interrupt import StopRequest
from megalodon.training.mesh_trainer import AgreedStop, MeshTrainer, on_rank_0
from megalodon.training.optimizer import build_optimizer
from megalodon.training.processes import Processes, QuietExit, versions
from megalodon.training.progress import Display, LineDisplay, make_display
from megalodon.training.records import records_of
from megalodon.training.run_folder import RunFolder
from megalodon.training.snapshot import seed_everything
from megalodon.training.throughput import measure_peak_flops, training_flops_per_token
from megalodon.training.trainer import Parts


class Silent(LineDisplay):
    """The display of every rank but one."""

    def say(self, text: str) -> None:
        pass

    def show(self, report: Any) -> None:
        pass


class NoRecords:
    """The records of every rank but one."""

    def metrics(self, record: dict[str, Any]) -> None:
        pass

    def sample(self, step: int, prompt: str, text: str) -> None:
        pass

    def sync(self) -> None:
        pass

    def plot(self) -> None:
        pass

    def close(self) -> None:
        pass


def train_on_mesh(resolved: launch.Resolved, display: Display | None = None) -> StopRequest:
    """Train as the config says, on the processes that a launcher started.

    Returns:
        The request that stopped the run; without a signal if it reached its last step.

    Raises:
        ValueError, OSError: on rank 0, for what any rank found wrong; `QuietExit` on the others.
        DivergedError: on all ranks, as `Trainer.train`.
        UnresponsiveError: a collective failed or timed out.
    """
    config = resolved.config
    device = _device(config.run.device)
    processes = Processes(device, config.mesh.timeout_seconds)
    try:
        with processes.watched():
            processes.require_same("versions", versions())
            _require_same_config(processes, config)
            processes.together(lambda: _check(resolved, processes.world_size))
            if display is None or processes.rank:
                display = Silent(config.run.steps) if processes.rank else make_display(config.run.steps)
            return _run(resolved, processes, device, display)
    finally:
        processes.close()


def _device(name: str) -> torch.device:
    device = choose_device(None if name == "auto" else name)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return device


def _check(resolved: launch.Resolved, world_size: int) -> None:
    """Refuse, before anything is built, a mesh that cannot work."""
    config = resolved.config
    problems = mesh_problems(
        config.mesh.sizes,
        resolved.model_config,
        world_size=world_size,
        batch_size=config.data.batch_size,
        sequence_length=config.data.sequence_length,
        accumulation_steps=config.run.accumulation_steps,
        virtual_stages=config.mesh.virtual_stages,
    )
    if config.mesh.pipeline > 1 and not CAN_MEASURE:
        problems.append(
            f"mesh.pipeline: {config.mesh.pipeline} needs PyTorch 2.9 or later, this is {torch.__version__}"
        )
    if config.sampling.every is not None:
        problems.append("sampling.every: a run on a mesh does not sample; sample from its checkpoints")
    if config.run.compile:
        problems.append("run.compile: a run on a mesh does not compile its blocks; leave it out")
    if problems:
        raise ValueError("\n".join(problems))


def _run(resolved: launch.Resolved, processes: Processes, device: torch.device, display: Display) -> StopRequest:
    config = resolved.config
    folder = RunFolder(Path(str(config.run.folder)).expanduser())
    lock = processes.together(lambda: folder.open() if processes.rank == 0 else None)
    try:
        with launch.telling_of_full_disks(folder):
            checkpoint = processes.together(
                lambda: launch.find_checkpoint(config, folder, display.say) if processes.rank == 0 else None
            )
            checkpoint = _from_rank_0(checkpoint)
            texts = processes.together(lambda: prepare(config, resolved.tokenizer, display))
            _require_same_texts(processes, texts)
            parts, model = _build(resolved, texts, device, processes)
            if checkpoint is None:
                processes.together(lambda: _fill(model, resolved))
            records: Any = records_of(config, folder) if processes.rank == 0 else lambda step: NoRecords()
            trainer = MeshTrainer(processes, model, config, folder, parts, display, records)
            display.say(f"mesh: {config.mesh.sizes}, {processes.world_size} processes")
            display.say(launch.introduction(resolved, parts, folder))
            if checkpoint is not None:
                trainer.restore(checkpoint)
                display.say(f"resuming from {checkpoint}")
            processes.together(on_rank_0(processes, lambda: write_text(folder.config, config_text(config))))
            stop = AgreedStop()
            with display, stop:
                trainer.train(stop)
            return _common(stop)
    finally:
        if lock is not None:
            lock.release()


def _require_same_config(processes: Processes, config: TrainConfig) -> None:
    """Refuse a rank with other settings than rank 0; where its files lie is its own affair."""
    settings: list[Any] = [None] * processes.world_size
    torch.distributed.all_gather_object(settings, common_settings(config))
    error = None
    for rank, own in enumerate(settings):
        other = [key for key in settings[0].keys() | own.keys() if settings[0].get(key) != own.get(key)]
        if error is None and other:
            key = min(other)
            first, here = (values.get(key) for values in (settings[0], own))
            error = ValueError(f"config: {key} is {first!r} on rank 0 and {here!r} on rank {rank}")
    processes.agree(error if processes.rank == 0 else None)


def _require_same_texts(processes: Processes, texts: Texts) -> None:
    """Refuse, before the first step, a rank that has other text than rank 0, such as a copy that was cut short."""
    summaries: list[Any] = [None] * processes.world_size
    torch.distributed.all_gather_object(summaries, texts.summary())
    error = None
    for rank, summary in enumerate(summaries):
        if error is None and (told := another_rank(summaries[0], summary)) is not None:
            error = ValueError(f"rank {rank}: {told}. Give all ranks the same files")
    processes.agree(error if processes.rank == 0 else None)


def _from_rank_0(value: Path | None) -> Path | None:
    """What rank 0 has."""
    values: list[Path | None] = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def _common(stop: AgreedStop) -> StopRequest:
    """The request with the signal of the first rank that got one, on all ranks."""
    signals: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(signals, stop.signal if stop.agreed else None)
    stop.signal = next((signal for signal in signals if signal is not None), None)
    return stop


def _build(
    resolved: launch.Resolved, texts: Texts, device: torch.device, processes: Processes
) -> tuple[Parts, ParallelModel]:
    config, data = resolved.config, resolved.config.data
    mesh = Mesh(config.mesh.sizes, device.type, config.mesh.timeout_seconds)
    rank, world_size = mesh.data_rank, mesh.sizes.data
    loader = processes.together(lambda: build_loader(config, texts.training, rank, world_size))
    whole = empty_model(resolved.model_config)
    flops = training_flops_per_token(whole, resolved.model_config, data.sequence_length)
    if config.run.gradient_checkpointing:
        launch.checkpoint_activations(whole)
    model = ParallelModel(whole, mesh, device, config.run.precision, config.mesh.virtual_stages)
    dtype = torch.bfloat16 if config.run.precision == "bfloat16" else torch.float32
    parts = Parts(
        model=model,  # type: ignore[arg-type]  # the trainer asks it for no more than a module's train and eval
        optimizer=build_optimizer(model, config.optimizer),
        tokenizer=resolved.tokenizer,
        loader=loader,
        heldout=held_out_sets(config, texts, rank, world_size, data.batch_size),
        flops_per_token=flops,
        peak_flops=measure_peak_flops(device, dtype) * mesh.sizes.world_size,
        device=device,
    )
    return parts, model


def _fill(model: ParallelModel, resolved: launch.Resolved) -> None:
    """Give the model the values that one process would give it, without holding them all."""
    section = resolved.config.model
    seed_everything(resolved.config.run.seed)
    if section.init_from is None:
        model.fill(initial_parameters(resolved.model_config))
        return
    folder = model_folder(Path(section.init_from))
    if (checkpoint := sharded_checkpoint(folder.resolve())) is not None:
        names = weight_shapes(checkpoint)
        model.fill((name, read_weights(checkpoint, [name])[name].float()) for name in names)
    else:
        model.fill(stored_parameters(folder))


__all__ = ["CheckpointError", "QuietExit", "train_on_mesh"]
