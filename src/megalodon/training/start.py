"""A run, from a resolved config to its end: on this process, or on those that a launcher started."""

from __future__ import annotations

from pathlib import Path

from megalodon.files import write_text
from megalodon.inference import choose_device
from megalodon.parallel.sharded import is_sharded
from megalodon.training import launch
from megalodon.training.checkpoint import list_checkpoints
from megalodon.training.config_file import config_text
from megalodon.training.corpora import prepare
from megalodon.training.interrupt import StopRequest
from megalodon.training.processes import under_torchrun
from megalodon.training.progress import Display, make_display
from megalodon.training.records import records_of
from megalodon.training.run_folder import RunFolder
from megalodon.training.trainer import Trainer


def train(resolved: launch.Resolved, display: Display | None = None) -> StopRequest:
    """Train as the config says, from the start or from where the run's folder stands, on the processes that there are.

    Returns:
        The request that stopped the run; false if it reached its last step.

    Raises:
        ValueError, OSError: before any work, if something does not fit; or as `Trainer.train`.
        DivergedError: as `Trainer.train`.
    """
    config = resolved.config
    assert config.run.folder is not None
    folder = RunFolder(Path(config.run.folder).expanduser())
    if under_torchrun() or has_sharded_checkpoints(folder):
        from megalodon.training.mesh_run import train_on_mesh  # whose imports a run on one process does not need

        return train_on_mesh(resolved, display)
    if (processes := config.mesh.sizes.world_size) > 1:
        raise ValueError(
            f"mesh: {config.mesh.sizes} needs {processes} processes: "
            f"torchrun --nproc-per-node={processes} -m megalodon train ..."
        )
    display = display or make_display(config.run.steps)
    device = choose_device(None if config.run.device == "auto" else config.run.device)
    with launch.opened(folder):
        checkpoint = launch.find_checkpoint(config, folder, display.say)
        texts = prepare(config, resolved.tokenizer, display)
        parts = launch.build_parts(resolved, texts, device)
        trainer = Trainer(config, folder, parts, display, records_of(config, folder))
        display.say(launch.introduction(resolved, parts, folder))
        if parts.model.note is not None:
            display.say(parts.model.note)
        if checkpoint is not None:
            trainer.restore(checkpoint)
            display.say(f"resuming from {checkpoint}")
        write_text(folder.config, config_text(config))
        with display, StopRequest() as stop:
            trainer.train(stop)
        return stop


def has_sharded_checkpoints(folder: RunFolder) -> bool:
    """Whether the run in a folder was last saved by processes on a mesh, which one process can go on from too."""
    found = list_checkpoints(folder.checkpoints)
    return bool(found) and is_sharded(found[-1])
