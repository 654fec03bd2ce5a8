"""Multi-query associative recall (MQAR), from examples to the table of `cells`."""

from loglinear.evaluation.mqar.batches import (
    RecallBatch,
    Scores,
    recall_batches,
    recall_counts,
    recall_loss,
    recall_scores,
)
from loglinear.evaluation.mqar.examples import Recall, recall_examples
from loglinear.evaluation.mqar.folder import read_results
from loglinear.evaluation.mqar.table import gather, markdown, rows_of
from loglinear.evaluation.mqar.training import run_cell
from loglinear.evaluation.mqar.workers import Progress, cores, run_table

__all__ = [
    "Progress",
    "Recall",
    "RecallBatch",
    "Scores",
    "cores",
    "gather",
    "markdown",
    "read_results",
    "recall_batches",
    "recall_counts",
    "recall_examples",
    "recall_loss",
    "recall_scores",
    "rows_of",
    "run_cell",
    "run_table",
]
