"""Measuring trained models. One file a task; `megalodon evaluate TASK` runs it."""

from megalodon.evaluation.perplexity import Progress, document_losses, evaluate_perplexity
from megalodon.evaluation.plot import plot_by_position
from megalodon.evaluation.scores import Positions, Score, bucket_index, bucket_range

__all__ = [
    "Positions",
    "Progress",
    "Score",
    "bucket_index",
    "bucket_range",
    "document_losses",
    "evaluate_perplexity",
    "plot_by_position",
]
