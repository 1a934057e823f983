"""The loop of a run: step, measure, sample, record, save; stop when asked, and on a loss that is not finite."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalodon.data import Batch, Loader, Mixture, Tokenizer
from megalodon.files import write_folder
from megalodon.models import CausalLM
from megalodon.training.checkpoint import CheckpointError, list_checkpoints, prune_checkpoints, save_checkpoint
from megalodon.training.config import TrainConfig
from megalodon.training.contents import TrainingState, checkpoint_bytes, read_contents, save_model, write_contents
from megalodon.training.corpora import HeldOut, another_held_out
from megalodon.training.heldout import HeldOutLoss, combined, measure_heldout
from megalodon.training.interrupt import StopRequest
from megalodon.training.optimizer import set_learning_rate
from megalodon.training.progress import Display, StepClock, StepReport
from megalodon.training.records import Records
from megalodon.training.run_folder import RunFolder
from megalodon.training.samples import sample_text
from megalodon.training.schedule import learning_rate_ratio
from megalodon.training.step import NonFiniteError, StepResult, split_batch, train_step


class DivergedError(ArithmeticError):
    """Training met a loss or gradient that is not finite. Says where, and what there is to go back to."""


@dataclass(frozen=True)
class Parts:
    """What a trainer works with; made by `launch.py`, or by a caller that shards them first.

    Attributes:
        heldout: the held-out documents of each source, by its name; read only where evaluation is on.
        flops_per_token: of a training step; peak_flops: per second, of this machine.
    """

    model: CausalLM
    optimizer: torch.optim.Optimizer
    tokenizer: Tokenizer
    loader: Loader
    heldout: dict[str, HeldOut]
    flops_per_token: float
    peak_flops: float
    device: torch.device


class Trainer:
    """A run over its parts. `open_records` opens what it writes down as it goes, to go on after a step (-1: anew)."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        parts: Parts,
        display: Display,
        open_records: Callable[[int], Records],
    ) -> None:
        self.config, self.folder, self.parts, self.display = config, folder, parts, display
        self._open_records = open_records
        self.state = TrainingState(states=[None] * config.run.accumulation_steps)
        if config.evaluation.every is not None:
            self.state.record = {"step": 0}  # where the held-out loss starts from
        self._recorded_step = -1  # the last step whose record was written
        self._saved_step: int | None = None
        self._heldout_loss: float | None = None  # of the present step, if it was measured
        self._clock = StepClock()

    def restore(self, checkpoint: Path) -> None:
        """Go on from a checkpoint that was verified.

        Raises:
            CheckpointError: if it is another model's.
        """
        state = read_contents(checkpoint, self.parts.model, self.parts.optimizer)
        self.parts.loader.load_state_dict(state.loader)
        self._require_held_out(state)
        if state.threads != torch.get_num_threads():
            self.display.say(
                f"note: the checkpoint was made with {state.threads} threads, there are {torch.get_num_threads()} now: "
                "the last bits of the results may differ from an uninterrupted run's"
            )
        state.states = state.states or [None] * self.config.run.accumulation_steps
        self.state = state
        self._recorded_step = state.step if state.record is None else state.step - 1
        self._saved_step = state.step if state.record is None else None

    def _require_held_out(self, state: TrainingState) -> None:
        """Refuse to go on with other held-out documents than the checkpoint's losses are of."""
        now = {name: Mixture.of(held.documents).identity() for name, held in self.parts.heldout.items()}
        if state.held_out and (told := another_held_out(state.held_out, now)) is not None:
            raise CheckpointError(told)

    def train(self, stop: StopRequest) -> bool:
        """Run to the last step, or until `stop`. True if the last step was reached and the model written.

        Raises:
            DivergedError: at a loss or gradient norm that is not finite; nothing is saved over.
            OSError: if something cannot be written; the checkpoints before are whole.
        """
        self.records = self._open_records(self._recorded_step)
        try:
            self.parts.model.train()
            self._settle(stop)
            while not stop and self.state.step < self.config.run.steps:
                self._step()
                self._settle(stop)
                if stop or self._due(self.config.checkpoint.every):
                    self._save()
            if stop:
                self._save()
                return False
            self._finish()
            return True
        finally:
            self.records.close()

    def _due(self, every: int | None) -> bool:
        """Whether the present step is one of every `every`, or the last."""
        step = self.state.step
        return every is not None and (step % every == 0 or step == self.config.run.steps)

    def _step(self) -> None:
        """Make one update and keep its numbers as the record."""
        config, state = self.config, self.state
        learning_rate = config.optimizer.learning_rate * learning_rate_ratio(
            state.step, config.run.steps, config.schedule
        )
        set_learning_rate(self.parts.optimizer, learning_rate)
        begin = time.perf_counter()
        batch = self._next_batch()
        try:
            result = self._update(batch)
        except NonFiniteError as error:
            raise DivergedError(self._divergence(error, batch)) from error
        seconds = time.perf_counter() - begin
        state.step += 1
        tokens = config.data.batch_size * config.data.sequence_length
        state.tokens += tokens
        state.documents += self._documents(batch)
        state.seconds += seconds
        state.states = result.states
        state.record = self._record(result, learning_rate, tokens, self._clock.tick(seconds))

    def _documents(self, batch: Batch) -> int:
        """How many documents begin in the rows of a step."""
        return batch.num_documents

    def _next_batch(self) -> Batch:
        return next(self.parts.loader)

    def _update(self, batch: Batch) -> StepResult:
        """Move the weights once."""
        return train_step(
            self.parts.model,
            self.parts.optimizer,
            split_batch(batch, self.config.run.accumulation_steps),
            self.state.states,
            max_grad_norm=self.config.optimizer.max_grad_norm,
            device=self.parts.device,
            precision=self.config.run.precision,
        )

    def _measure(self, held: HeldOut, stop: StopRequest) -> HeldOutLoss | None:
        """The loss on the held-out documents of a source, or None if a signal came first."""
        return measure_heldout(
            self.parts.model,
            held.read(),
            device=self.parts.device,
            precision=self.config.run.precision,
            stop=lambda: bool(stop),
        )

    def _record(self, result: StepResult, learning_rate: float, tokens: int, seconds: float) -> dict[str, Any]:
        state, loader = self.state, self.parts.loader
        speed = tokens / seconds
        utilisation = speed * self.parts.flops_per_token / self.parts.peak_flops
        left = (self.config.run.steps - state.step) * seconds
        self.display.show(StepReport(state.step, result.loss, speed, utilisation, left))
        return {
            "step": state.step,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": learning_rate,
            "tokens": state.tokens,
            "epoch": round(loader.epoch, 6),
            **({f"epoch/{name}": round(epoch, 6) for name, epoch in loader.epochs.items()} if self._mixed else {}),
            "documents": state.documents,
            "seconds": round(state.seconds, 3),
            "tokens_per_second": round(speed, 1),
            "flop_utilisation": round(utilisation, 4),
        }

    def _settle(self, stop: StopRequest) -> None:
        """Measure and sample where the present step is due for it, and write its record.

        A signal during the measurement leaves the record for the process that goes on.
        """
        record = self.state.record
        if record is None:
            return
        if self._due(self.config.evaluation.every):
            measured: dict[str, HeldOutLoss] = {}
            for name, held in self.parts.heldout.items():
                one = self._measure(held, stop)
                if one is None:
                    return
                measured[name] = one
            self._take_in(record, measured)
        if self.state.step and self._due(self.config.sampling.every):
            prompt = self.config.sampling.prompt
            text = sample_text(self.parts.model, self.parts.tokenizer, self.config.sampling)
            self.records.sample(self.state.step, prompt, text)
            shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in prompt + text)
            self.display.say(f"step {self.state.step}: sample\n{shown}")
        if self._due(self.config.run.log_every) or "heldout_loss" in record:
            self.records.metrics(record)
        self._heldout_loss = record.get("heldout_loss")
        self.state.record = None

    @property
    def _mixed(self) -> bool:
        return "" not in self.parts.heldout

    def _take_in(self, record: dict[str, Any], measured: dict[str, HeldOutLoss]) -> None:
        """Put held-out losses into a record: that of the mixture as a whole, and those of its sources."""
        weights = {name: held.weight for name, held in self.parts.heldout.items()}
        named = {"": combined(measured, weights), **{f"/{name}": one for name, one in measured.items() if name}}
        for suffix, one in named.items():
            if not math.isfinite(one.loss):
                raise DivergedError(
                    f"stopped at step {self.state.step}: the held-out loss{suffix.replace('/', ' of ')} is {one.loss}, "
                    f"so the weights are damaged; {self._way_back()}"
                )
            record[f"heldout_loss{suffix}"] = one.loss
            if one.bits_per_byte is not None:
                record[f"heldout_bits_per_byte{suffix}"] = one.bits_per_byte
            self.display.say(f"step {self.state.step}: held-out {f'{suffix[1:]} ' * bool(suffix)}{one}")

    def _save(self) -> None:
        """Save the present step, unless it is saved; then prune, and draw the plot."""
        state, parts = self.state, self.parts
        if self._saved_step == state.step:
            return
        self._note_position()
        save_checkpoint(
            self.folder.checkpoints,
            state.step,
            checkpoint_bytes(parts.model, parts.optimizer, state.states),
            lambda folder: write_contents(folder, self.config, parts.model, parts.optimizer, parts.tokenizer, state),
        )
        self._saved_step = state.step
        self._prune()
        self.records.plot()

    def _note_position(self) -> None:
        """Bring what a checkpoint holds beside tensors up to date."""
        state = self.state
        self.records.sync()
        state.loader = self.parts.loader.state_dict()
        state.held_out = {name: Mixture.of(held.documents).identity() for name, held in self.parts.heldout.items()}
        state.threads = torch.get_num_threads()
        if self._heldout_loss is not None and (state.best_loss is None or self._heldout_loss < state.best_loss):
            state.best_loss, state.best_step = self._heldout_loss, state.step

    def _prune(self) -> None:
        settings, best = self.config.checkpoint, self.state.best_step
        also = {best} if settings.keep_best and best is not None else set()
        prune_checkpoints(self.folder.checkpoints, settings.keep, also)

    def _finish(self) -> None:
        """Save the last step, and the model for use."""
        self._save()
        write_folder(self.folder.model, lambda folder: save_model(folder, self.parts.model, self.parts.tokenizer))

    def _divergence(self, error: NonFiniteError, batch: Batch) -> str:
        origins = "\n".join(f"  {origin}" for origin in batch.origins)
        return (
            f"stopped at step {self.state.step + 1}: {error}. Nothing was changed by this step or saved after it; "
            f"{self._way_back()}. The batch was\n{origins}"
        )

    def _way_back(self) -> str:
        good = list_checkpoints(self.folder.checkpoints)
        return f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
