"""The trainer of a run on a mesh: the same loop; all ranks take part in steps, measurements and checkpoints."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as distributed_checkpoint
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException

from megalodon.data import Batch
from megalodon.files import PARTIAL, publish_folder, require_free_space, save_json, write_folder
from megalodon.parallel import ParallelModel, Rows
from megalodon.parallel.sharded import SHARDS, is_sharded, weight_shapes, write_whole_model
from megalodon.training.checkpoint import MARGIN, CheckpointError, checkpoint_name, write_manifest
from megalodon.training.config_file import config_text
from megalodon.training.contents import TrainingState
from megalodon.training.corpora import HeldOut
from megalodon.training.heldout import HeldOutLoss
from megalodon.training.interrupt import StopRequest
from megalodon.training.mesh_contents import (
    carried_tensors,
    empty_tensors,
    model_tensors,
    open_width,
    optimizer_entries,
    start_optimizer,
    states_of,
)
from megalodon.training.processes import Processes
from megalodon.training.snapshot import tensor_bytes
from megalodon.training.step import NonFiniteError, StepResult, next_state, split_batch
from megalodon.training.trainer import Parts, Trainer


class AgreedStop(StopRequest):
    """A stop request that holds once all ranks have seen that any of them had one."""

    agreed = False

    def __bool__(self) -> bool:
        return self.agreed


class MeshTrainer(Trainer):
    """`Trainer` over a `ParallelModel`. Arguments as there, and the processes of the run."""

    def __init__(self, processes: Processes, model: ParallelModel, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.processes, self.model = processes, model
        self.stop: AgreedStop | None = None
        self._begun = 0  # documents that begin in the rows of the present step, on all ranks
        self._saving_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=processes.seconds))
        self._pending: Future | None = None
        self._publisher = ThreadPoolExecutor(1)

    # --- the step -------------------------------------------------------------------------------------------

    def train(self, stop: StopRequest) -> bool:
        assert isinstance(stop, AgreedStop)
        self.stop = stop
        try:
            with self.processes.watched():
                finished = super().train(stop)
                self._wait_for_save()
        finally:
            self._publisher.shutdown(wait=True)
        return finished

    def _next_batch(self) -> Batch:
        """This rank's rows; an error of any rank's data stops all."""
        step = self.state.step + 1

        def read() -> Batch:
            batch = super(MeshTrainer, self)._next_batch()
            self.processes.report(step)
            return batch

        return self.processes.together(read)

    def _update(self, batch: Batch) -> StepResult:
        step, settings = self.state.step + 1, self.config
        targets = self._agree_on(batch)
        # Dropout: other numbers on every rank and in every step, the same again after a restart.
        torch.manual_seed(hash((settings.run.seed, step, self.processes.rank)) % 2**63)
        self.parts.optimizer.zero_grad(set_to_none=True)
        rows = self._rows(batch, self.state.states)
        loss, states = self.model.accumulate_gradients(rows, targets)
        norm = self.model.clip_gradients(settings.optimizer.max_grad_norm)
        value, size = loss.item(), norm.item()
        if not math.isfinite(value + size):
            self.parts.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(value, size)
        self.parts.optimizer.step()
        return StepResult(value, size, targets, states)

    def _agree_on(self, batch: Batch) -> int:
        """The number of targets of all rows. Also spreads a request to stop."""
        assert self.stop is not None
        mine = batch.num_tokens if self.model.mesh.counts else 0
        begun = batch.num_documents if self.model.mesh.counts else 0
        targets, documents, stops = self.processes.sum(mine, begun, self.stop.signal is not None)
        self._begun = int(documents)
        self.stop.agreed = stops > 0
        return int(targets)

    def _documents(self, batch: Batch) -> int:
        return self._begun

    def _rows(self, batch: Batch, states: list) -> list[Rows]:
        parts = split_batch(batch.to(self.parts.device), self.config.run.accumulation_steps)
        return [
            Rows(
                part.input_ids,
                part.labels,
                part.segment_ids,
                next_state(state, part.continues),
                part.continues is not None,
            )
            for part, state in zip(parts, states, strict=True)
        ]

    # --- measuring ------------------------------------------------------------------------------------------

    def _measure(self, held: HeldOut, stop: StopRequest) -> HeldOutLoss | None:
        self.model.eval()
        states: list = [None] * self.config.run.accumulation_steps
        nats, targets, bytes_, unknown = 0.0, 0, 0, False
        try:
            for batch in held.read():
                loss, states = self.model.losses(self._rows(batch, states))
                nats += float(loss)
                if self.model.mesh.counts:
                    targets += batch.num_tokens
                    bytes_ += batch.num_bytes or 0
                    unknown |= batch.num_bytes is None
        finally:
            self.model.train()
        all_targets, all_bytes, all_unknown = self.processes.sum(targets, bytes_, unknown)
        if not all_targets:
            raise ValueError("the held-out set is too small: it has no token to predict")
        bits = nats / math.log(2) / all_bytes if all_bytes and not all_unknown else None
        return HeldOutLoss(nats / all_targets, bits, int(all_targets))

    # --- checkpoints ----------------------------------------------------------------------------------------

    def _tensors(self, width: int) -> dict[str, torch.Tensor]:
        return {
            **model_tensors(self.model),
            **optimizer_entries(self.model, self.parts.optimizer),
            **carried_tensors(self.model, self.state.states, width),
        }

    def _save(self) -> None:
        """Begin to save the present step; the files are written while training goes on."""
        if self._saved_step == self.state.step:
            return
        self._wait_for_save()
        self._note_position()
        width = open_width(self.model, self.state.states)
        tensors = self._tensors(width)
        target = self.folder.checkpoints / checkpoint_name(self.state.step)
        temporary = target.with_name(f".{target.name}{PARTIAL}-mesh")
        needed = self.processes.sum(tensor_bytes({k: local(v) for k, v in tensors.items()}))[0]
        self.processes.together(lambda: self._begin_folder(temporary, int(needed), width))
        written = distributed_checkpoint.async_save(
            tensors, storage_writer=FileSystemWriter(temporary / SHARDS), process_group=self._saving_group
        )
        assert isinstance(written, Future)
        self._pending = written
        if self.processes.rank == 0:
            self._pending = self._publisher.submit(self._publish, written, temporary, target, self.state.step)
        self._saved_step = self.state.step

    def _begin_folder(self, temporary: Path, needed: int, width: int) -> None:
        """Make a checkpoint's folder with all that is not tensors; rank 0 does."""
        if self.processes.rank != 0:
            return
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        require_free_space(temporary, needed + MARGIN)
        self.model.config.save_pretrained(temporary / "model")
        self.parts.tokenizer.save(temporary / "model")
        plain = {f.name: getattr(self.state, f.name) for f in dataclasses.fields(self.state) if f.name != "states"}
        carried = any(state is not None for state in self.state.states)
        save_json(temporary / "trainer.json", {**plain, "carried_width": width if carried else None})
        (temporary / "config.yaml").write_text(config_text(self.config), encoding="utf-8")

    def _publish(self, written: Future, temporary: Path, target: Path, step: int) -> None:
        """Give a checkpoint its name once every rank has written its part."""
        written.result()  # of rank 0, which ends after all others have reported theirs
        write_manifest(temporary, step)
        publish_folder(temporary, target)
        self._prune()
        self.records.plot()

    def _wait_for_save(self) -> None:
        """Return once the save under way has its name.

        Raises:
            OSError: if it failed; earlier checkpoints are as they were.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None

        def ended() -> None:
            try:
                pending.result()
            except OSError:
                raise
            except (Exception, CheckpointException) as error:
                raise self._not_saved(error) from error

        self.processes.together(ended)

    def _not_saved(self, error: BaseException) -> OSError:
        """What went wrong with a save, in one line; the library's own text has every rank's traceback in it."""
        code = re.search(r"\[Errno (\d+)\]", str(error))
        number = int(code[1]) if code else errno.EIO
        if code is None and shutil.disk_usage(self.folder.path).free < MARGIN:
            number = errno.ENOSPC  # its writer of tensors has other words for it
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = os.strerror(number) if number != errno.EIO else (lines[-1] if lines else type(error).__name__)
        return OSError(number, f"cannot save a checkpoint: {reason}", str(self.folder.checkpoints))

    def restore(self, checkpoint: Path) -> None:
        """Go on from a checkpoint of any mesh, which was verified."""
        self.processes.together(lambda: self._require_fitting(checkpoint))
        plain = json.loads((checkpoint / "trainer.json").read_text(encoding="utf-8"))
        width, steps = plain.pop("carried_width"), self.config.run.accumulation_steps
        state = TrainingState(**plain)
        self.processes.together(lambda: self.parts.loader.load_state_dict(state.loader))
        self.processes.together(lambda: self._require_held_out(state))
        start_optimizer(self.parts.optimizer)
        tensors = self._tensors(0)
        if width is not None:
            rows = self.config.data.batch_size // self.model.mesh.sizes.data
            dtype = torch.bfloat16 if self.config.run.precision == "bfloat16" else torch.float32
            tensors |= empty_tensors(self.model, rows, width, dtype)
        distributed_checkpoint.load(tensors, storage_reader=FileSystemReader(checkpoint / SHARDS))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model/{name}"])
        state.states = [None] * steps if width is None else states_of(self.model, tensors, steps)
        self.state = state
        self._recorded_step = state.step if state.record is None else state.step - 1
        self._saved_step = state.step if state.record is None else None

    def _require_fitting(self, checkpoint: Path) -> None:
        if not is_sharded(checkpoint):
            raise CheckpointError(
                f"{checkpoint} was made by a run without a mesh: go on with one process, or start anew in another "
                f"run.folder with model.init_from={checkpoint / 'model'} to keep the weights"
            )
        stored = weight_shapes(checkpoint)
        for name, parameter in self.model.named_parameters():
            shape = stored[name][0] if name in stored else None
            if shape != parameter.shape:
                found = "is missing" if shape is None else f"has shape {tuple(shape)}"
                raise CheckpointError(
                    f"{checkpoint} holds another model: {name} {found}, and this model's is {tuple(parameter.shape)}"
                )

    def _finish(self) -> None:
        """Save the last step, and the whole model for use."""
        self._save()
        self._wait_for_save()
        checkpoint = self.folder.checkpoints / checkpoint_name(self.state.step)

        def fill(folder: Path) -> None:
            write_whole_model(checkpoint, folder, self.model.config)
            self.parts.tokenizer.save(folder)

        self.processes.together(on_rank_0(self.processes, lambda: write_folder(self.folder.model, fill)))


def on_rank_0(processes: Processes, work: Callable[[], object]) -> Callable[[], None]:
    """The work on rank 0, nothing on the others."""
    return lambda: None if processes.rank else (work(), None)[1]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


__all__ = ["AgreedStop", "MeshTrainer", "Parts", "on_rank_0"]
