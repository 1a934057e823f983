"""Architectures against each other: same size, same batches, each with its own best learning rate."""

from megalodon.comparison.config import CompareConfig, load_comparison
from megalodon.comparison.matching import Matched, match_parameters
from megalodon.comparison.plan import Job, Plan
from megalodon.comparison.report import write_report
from megalodon.comparison.results import ResultsFile, read_results
from megalodon.comparison.runner import JobError, compare, introduction
from megalodon.comparison.sweep import Choice, choose_rate

__all__ = [
    "Choice",
    "CompareConfig",
    "Job",
    "JobError",
    "Matched",
    "Plan",
    "ResultsFile",
    "choose_rate",
    "compare",
    "introduction",
    "load_comparison",
    "match_parameters",
    "read_results",
    "write_report",
]
