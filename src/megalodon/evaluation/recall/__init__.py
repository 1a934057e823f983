"""Recall from scratch: small models trained and measured on tasks whose answers stand in the text (docs/recall.md)."""

from megalodon.evaluation.recall.config import TASKS, Cell, RecallConfig, load_study
from megalodon.evaluation.recall.joint_recall import JointRecall
from megalodon.evaluation.recall.mqar import MQAR
from megalodon.evaluation.recall.questions import NOT_ASKED, Questions, Segment, segment_seeds
from megalodon.evaluation.recall.report import best_rows, table
from megalodon.evaluation.recall.study import read_results, run_study
from megalodon.evaluation.recall.synthetic import Induction, SelectiveCopying
from megalodon.evaluation.recall.training import accuracy, run_cell, state_bytes

__all__ = [
    "MQAR",
    "NOT_ASKED",
    "TASKS",
    "Cell",
    "Induction",
    "JointRecall",
    "Questions",
    "RecallConfig",
    "Segment",
    "SelectiveCopying",
    "accuracy",
    "best_rows",
    "load_study",
    "read_results",
    "run_cell",
    "run_study",
    "segment_seeds",
    "state_bytes",
    "table",
]
