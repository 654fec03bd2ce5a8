"""A task that is learnt in seconds, and cells of it."""

from typing import Any

from loglinear.recipes.mqar import RecallCell, RecallTask

TASK = RecallTask(examples=1280, test_examples=64, length=8, pairs=(1, 2), vocab_size=12, batch_size=64, epochs=4)


def tiny_cell(**changes: Any) -> RecallCell:
    values: dict[str, Any] = {"model": "attention", "dim": 16, "learning_rate": 1e-2, "seed": 0, "task": TASK}
    return RecallCell(**{**values, **changes})


def result_of(cell: RecallCell, test: float, validation: float | None = None) -> dict[str, Any]:
    """What a cell might have left."""
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
