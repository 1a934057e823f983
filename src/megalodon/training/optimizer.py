"""AdamW with the parameter groups of a training config, and gradient clipping."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from megalodon.training.section import Section


class OptimizerConfig(Section):
    """AdamW. The defaults of betas, epsilon, weight decay and clipping are the paper's for its 7B model."""

    learning_rate: float = Field(default=1e-3, gt=0, description="the peak of the schedule")
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    decay_norms_and_biases: bool = Field(default=True, description="the paper decays everything")
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="scale gradients down to this norm; null: never")


def optimizer_problems(config: OptimizerConfig) -> list[str]:
    """What is wrong with the values taken together, one sentence each; empty when all is well."""
    return [
        f"optimizer.betas: each must be at least 0 and below 1, not {beta}"
        for beta in config.betas
        if not 0 <= beta < 1
    ]


def is_norm_or_bias(name: str) -> bool:
    """Whether a parameter, by its dotted name, is a bias or belongs to a normalisation."""
    *owners, last = name.split(".")
    return last.endswith("bias") or any("norm" in owner for owner in owners)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The trainable parameters as AdamW's groups: one, or two when norms and biases are not decayed."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if config.decay_norms_and_biases:
        return [{"params": [parameter for _, parameter in named], "weight_decay": config.weight_decay}]
    spared = [parameter for name, parameter in named if is_norm_or_bias(name)]
    decayed = [parameter for name, parameter in named if not is_norm_or_bias(name)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the model's trainable parameters; PyTorch's fused update on devices that have one."""
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in model.parameters())
    return torch.optim.AdamW(
        parameter_groups(model, config),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        fused=fused,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale the gradients down to `max_norm` in place. Returns their L2 norm before that, a scalar tensor."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if max_norm is not None:
        return nn.utils.clip_grad_norm_(parameters, max_norm)
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
