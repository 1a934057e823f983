"""The stage in which new mixers learn from the teacher's, layer by layer: each reads what the teacher gave its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from megalodon.convert.teachers import Teacher
from megalodon.data import Batch, Loader
from megalodon.files import load_tensors, save_tensors, write_folder
from megalodon.linearize.activations import Recomputed
from megalodon.linearize.recipe import Lesson, Recipe, Transfer, moving
from megalodon.models.kin import KinConfig
from megalodon.models.kin.block import KinBlock
from megalodon.models.kin.mixers import Mixer
from megalodon.models.kin.mixers.projected import Projected
from megalodon.models.kin.model import new_mixer
from megalodon.ops.layout import Layout, layout_of
from megalodon.training.corpora import HeldOut
from megalodon.training.heldout import HeldOutLoss
from megalodon.training.interrupt import StopRequest
from megalodon.training.optimizer import clip_gradients
from megalodon.training.step import NonFiniteError, StepResult, autocast, split_batch
from megalodon.training.trainer import Trainer


class Pupils(nn.Module):
    """Mixers that learn, by their layers, beside the blocks of the teacher that they learn from.

    To whatever saves it, it holds those parameters that move and no others: the rest are the teacher's.
    """

    all_tied_weights_keys: Mapping[str, str] = {}

    def __init__(self, mixers: Mapping[int, Mixer], blocks: Mapping[int, KinBlock], learning: int) -> None:
        """`learning`: mixers that learn in the stage, in memory or not: a loss is their mean."""
        super().__init__()
        self.learning = learning
        self.mixers = nn.ModuleDict({str(layer): mixer for layer, mixer in mixers.items()})
        self._blocks = [(layer, blocks.get(layer)) for layer in sorted(blocks)]

    def teach(
        self, x: Tensor, layout: Layout, objective: Callable[[Lesson], Tensor], use: Callable[[Tensor], None]
    ) -> tuple[Tensor, Tensor]:
        """Show each layer in turn what the teacher makes of x [B, L, D].

        Args:
            use: called with the loss of each layer, before the next layer's is computed.

        Returns:
            (the mean loss of the layers, what comes out of the last block [B, L, D]).
        """
        total = x.new_zeros((), dtype=torch.float32)
        for layer, block in self._blocks:
            assert block is not None
            with torch.no_grad():
                n = block.normalised(x)
                attention = cast(Projected, block.mixer)  # as all teachers have
                heads, _ = attention.head_outputs(n, None, layout)
            name = str(layer)
            if name in self.mixers:
                student = self.mixers[name]
                assert isinstance(student, Mixer)
                loss = objective(Lesson(layer, n, layout, attention, student, heads))
                use(loss)
                total += loss.detach().float()
            with torch.no_grad():
                x = block.after_mixer(x, n, attention.o_proj(heads.flatten(-2)))
        return total / max(len(self.mixers), 1), x

    # no arguments: nobody asks a whole model for a part of another's
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Of the parameters that move."""
        return {name: value.detach() for name, value in self.named_parameters() if value.requires_grad}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As any module's; missing are parameters that move alone."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        own = self.state_dict()
        missing = [name for name in result.missing_keys if name in own]
        if strict and (missing or result.unexpected_keys):
            raise ValueError(f"the parameters do not fit: missing {missing}, unknown {result.unexpected_keys}")
        return missing, result.unexpected_keys

    def read_weights(self, folder: Path) -> tuple[list[str], list[str]]:
        """Take what `save_pretrained` wrote: (those that are missing, those that are not known)."""
        missing, unexpected = self.load_state_dict(load_tensors(folder / "model.safetensors"), strict=False)
        return missing, unexpected

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        """Write what moves, as a checkpoint has a model's weights."""
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "model.safetensors", self.state_dict())


def started(recipe: Recipe, config: KinConfig, layer: int, block: KinBlock, seed: int) -> Mixer:
    """The new mixer of a layer as its recipe begins it, on the teacher's device."""
    device = next(block.parameters()).device
    torch.manual_seed(seed * 10007 + layer)  # its own, however many layers are made at once
    mixer = new_mixer(config, layer).to(device)
    recipe.start(mixer, cast(Projected, block.mixer))
    return mixer.requires_grad_(False).train()


def pupils(
    recipe: Recipe,
    stage: Transfer,
    config: KinConfig,
    teacher: Teacher,
    layers: range,
    earlier: Mapping[str, Tensor],
    replaced: list[int],
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Pupils:
    """The mixers of some layers with what stages before have made of them (`LAYER.NAME`), and the teacher's blocks."""
    blocks = {layer: teacher.block(layer, device, dtype) for layer in layers}
    mixers: dict[int, Mixer] = {}
    for layer in layers:
        if layer not in replaced:
            continue
        mixer = started(recipe, config, layer, blocks[layer], seed)
        own = {name.removeprefix(f"{layer}."): x for name, x in earlier.items() if name.startswith(f"{layer}.")}
        mixer.load_state_dict(own, strict=False)
        for name in moving([name for name, _ in mixer.named_parameters()], stage.trainable):
            parent, _, last = name.rpartition(".")
            # One of its own, in float32: what it was may be the teacher's.
            fresh = nn.Parameter(mixer.get_parameter(name).detach().float().clone())
            setattr(mixer.get_submodule(parent), last, fresh)
        mixers[layer] = mixer
    return Pupils(mixers, blocks, len(replaced))


class TransferTrainer(Trainer):
    """`Trainer` of `Pupils`. `lessons` gives the blocks' inputs in steps, `held_out` those of held-out rows."""

    def __init__(self, stage: Transfer, lessons: Recomputed, held_out: Recomputed, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.stage, self.lessons, self.held_out = stage, lessons, held_out
        self.pupils = cast(Pupils, self.parts.model)

    def _layout(self, batch: Batch) -> Layout:
        rows, length = batch.input_ids.shape
        return layout_of(rows, length, self.parts.device, segment_ids=batch.segment_ids)

    def _update(self, batch: Batch) -> StepResult:
        optimizer, config = self.parts.optimizer, self.config
        optimizer.zero_grad(set_to_none=True)
        parts = split_batch(batch, config.run.accumulation_steps)
        share = 1 / (len(parts) * self.pupils.learning)
        with autocast(self.parts.device, config.run.precision):
            x = self.lessons.inputs(self.state.step, batch.input_ids, self._layout(batch))
        total, outputs = 0.0, []
        for part, rows in zip(parts, x.chunk(len(parts)), strict=True):
            with autocast(self.parts.device, config.run.precision):
                loss, out = self.pupils.teach(
                    rows, self._layout(part), self.stage.objective, lambda loss: (loss * share).backward()
                )
            total += float(loss) / len(parts)
            outputs.append(out)
        self.lessons.keep(self.state.step, torch.cat(outputs))
        norm = clip_gradients(self.pupils.parameters(), config.optimizer.max_grad_norm)
        if not torch.isfinite(norm + total):
            optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(total, norm.item())
        optimizer.step()
        return StepResult(total, norm.item(), batch.num_tokens, self.state.states)

    @torch.no_grad()
    def _measure(self, held: HeldOut, stop: StopRequest) -> HeldOutLoss | None:
        """The layers' loss on rows of held-out text."""
        total, targets = 0.0, 0
        for batch in self._held_out_rows(held):
            if stop:
                return None
            with autocast(self.parts.device, self.config.run.precision):
                x = self.held_out.inputs(0, batch.input_ids, self._layout(batch))
                loss, _ = self.pupils.teach(x, self._layout(batch), self.stage.objective, lambda loss: None)
            total += float(loss)
            targets += 1
        return HeldOutLoss(total / targets, None, targets)

    def _held_out_rows(self, held: HeldOut) -> Iterator[Batch]:
        data, most = self.config.data, self.config.evaluation.max_tokens
        rows = max(1, data.batch_size // self.config.run.accumulation_steps)
        loader = Loader(
            held.documents, mode="packed", batch_size=rows, sequence_length=data.sequence_length, shuffle=False
        )
        tokens = held.documents.num_tokens if most is None else min(most, held.documents.num_tokens)
        for step in range(max(1, tokens // (rows * data.sequence_length))):
            yield loader.batch_at(step)

    def _finish(self) -> None:
        self._save()
        write_folder(self.folder.model, lambda folder: self.pupils.save_pretrained(folder))
        self.lessons.finish()
