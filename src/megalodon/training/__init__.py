"""Training: the config, the optimiser and its schedule, the step, checkpoints, metrics, and the run that uses them."""

from megalodon.training.checkpoint import CheckpointError
from megalodon.training.config import TrainConfig
from megalodon.training.config_file import check_config, config_text, load_config
from megalodon.training.heldout import HeldOutLoss, measure_heldout
from megalodon.training.launch import Resolved, build_parts, resolve
from megalodon.training.model_section import count_parameters
from megalodon.training.optimizer import OptimizerConfig, build_optimizer, clip_gradients
from megalodon.training.processes import UnresponsiveError, is_first_rank
from megalodon.training.schedule import ScheduleConfig, learning_rate_ratio
from megalodon.training.start import train
from megalodon.training.step import NonFiniteError, StepResult, split_batch, train_step
from megalodon.training.trainer import DivergedError, Parts, Trainer

__all__ = [
    "CheckpointError",
    "DivergedError",
    "HeldOutLoss",
    "NonFiniteError",
    "OptimizerConfig",
    "Parts",
    "Resolved",
    "ScheduleConfig",
    "StepResult",
    "TrainConfig",
    "Trainer",
    "UnresponsiveError",
    "build_optimizer",
    "build_parts",
    "check_config",
    "clip_gradients",
    "config_text",
    "count_parameters",
    "is_first_rank",
    "learning_rate_ratio",
    "load_config",
    "measure_heldout",
    "resolve",
    "split_batch",
    "train",
    "train_step",
]
