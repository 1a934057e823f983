"""The stage that trains the whole model: all of its weights, some of them, or adapters that are merged at its end."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from megalodon.data import Batch
from megalodon.files import write_folder
from megalodon.linearize.config import LoraSection
from megalodon.linearize.recipe import Batchwise, FineTune
from megalodon.models import CausalLM
from megalodon.models.kin import KinForCausalLM
from megalodon.training.contents import save_model
from megalodon.training.optimizer import clip_gradients
from megalodon.training.step import NonFiniteError, StepResult, autocast, split_batch
from megalodon.training.trainer import Trainer


def prepare(model: CausalLM, stage: FineTune) -> None:
    """Put a stage's adapters into a model, and let those parameters move that the stage trains.

    Raises:
        ValueError: no parameter would move.
        ImportError: the stage has adapters and PEFT is not installed.
    """
    nn.Module.requires_grad_(model, False)
    if stage.lora is not None:
        _adapt(model, stage.lora)
    for name, parameter in model.named_parameters():
        if stage.trainable and re.fullmatch(stage.trainable, name):
            parameter.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{stage.name}: no parameter is called {stage.trainable}")


def _adapt(model: nn.Module, lora: LoraSection) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("adapters need PEFT: pip install peft, or give lora=null") from error
    names = "|".join(map(re.escape, lora.targets))
    # Rank-stabilised or initialised otherwise it is not: alpha / rank, as the papers have it.
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number divides by the rank
        lora_dropout=lora.dropout,
        target_modules=rf".*layers\.\d+\..*\b({names})",
    )
    inject_adapter_in_model(config, model)


def merge(model: nn.Module) -> None:
    """Add what adapters learned to the weights below them, and take them out."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())


class FineTuner(Trainer):
    """`Trainer` of a stage. `teacher`: for stages that compare with it; None where the next token is all."""

    def __init__(self, stage: FineTune, teacher: KinForCausalLM | None, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.stage, self.teacher = stage, teacher

    def _update(self, batch: Batch) -> StepResult:
        if self.stage.objective is None:
            return super()._update(batch)
        assert self.teacher is not None
        config, device, model = self.config, self.parts.device, self.parts.model
        self.parts.optimizer.zero_grad(set_to_none=True)
        parts, total = split_batch(batch, config.run.accumulation_steps), 0.0
        for part in parts:
            share = part.num_tokens / max(batch.num_tokens, 1)
            part = part.to(device)
            asked: dict[str, Any] = {
                "segment_ids": part.segment_ids,
                "use_cache": False,
                "output_hidden_states": True,
            }
            with autocast(device, config.run.precision):
                with torch.no_grad():
                    theirs = self.teacher(part.input_ids, **asked)
                loss = self.stage.objective(Batchwise(model(part.input_ids, **asked), theirs, part.labels)) * share
            loss.backward()
            total += float(loss.detach())
        norm = clip_gradients(model.parameters(), config.optimizer.max_grad_norm)
        if not torch.isfinite(norm + total):
            self.parts.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(total, norm.item())
        self.parts.optimizer.step()
        return StepResult(total, norm.item(), batch.num_tokens, self.state.states)

    def _finish(self) -> None:
        self._save()
        if self.stage.lora is not None:
            merge(self.parts.model)
        write_folder(self.folder.model, lambda folder: save_model(folder, self.parts.model, self.parts.tokenizer))
