"""Measuring trained models. One file a task; `megalodon evaluate TASK` runs it."""

from megalodon.evaluation.memory import evaluate_memory, memory_parts
from megalodon.evaluation.perplexity import Losses, Progress, document_losses, evaluate_perplexity
from megalodon.evaluation.plot import plot_by_position
from megalodon.evaluation.scores import Distances, Places, Positions, Score, bucket_index, bucket_range
from megalodon.evaluation.tokens_file import TokensFile

__all__ = [
    "Distances",
    "Losses",
    "Places",
    "Positions",
    "Progress",
    "Score",
    "TokensFile",
    "bucket_index",
    "bucket_range",
    "document_losses",
    "evaluate_memory",
    "evaluate_perplexity",
    "memory_parts",
    "plot_by_position",
]
