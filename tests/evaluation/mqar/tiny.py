"""A task that is learnt in seconds, its cells, results, and a flag that stops them."""

from typing import Any

from loglinear.evaluation.mqar.cells import RecallCell, RecallTask

TASK = RecallTask(examples=1280, test_examples=64, length=8, pairs=(1, 2), vocab_size=12, batch_size=64, epochs=4)


def tiny_cell(**changes: Any) -> RecallCell:
    values: dict[str, Any] = {"model": "attention", "dim": 16, "learning_rate": 1e-2, "seed": 0, "task": TASK}
    return RecallCell(**{**values, **changes})


class AfterSteps:
    """A flag that is set at a step of this call, or a kill there: it is asked once before training and once a step."""

    def __init__(self, steps, kill=False):
        self.left, self.kill = steps + 1, kill

    def is_set(self):
        self.left -= 1
        if self.left <= 0 and self.kill:
            raise MemoryError
        return self.left <= 0


def result_of(cell: RecallCell, test: float, validation: float | None = None) -> dict[str, Any]:
    """A possible result of a cell."""
    return {
        "cell": cell.to_dict(),
        "test_accuracy": test,
        "test_accuracy_by_pairs": {"1": test + 0.1, "2": test - 0.1},
        "validation_accuracy": test if validation is None else validation,
        "parameters": 1000,
        "epochs": 4,
        "steps": 160,
        "seconds": 1.5,
        "precision": "float32",
        "versions": {"torch": "2"},
        "command": ["loglinear", "eval", "mqar"],
    }
