"""A recipe that trains in a second, and the text for it."""

from pathlib import Path
from typing import Any

import torch

from loglinear.recipes import TrainingRecipe
from loglinear.runs.loading import load_model
from loglinear.runs.metrics import read_metrics
from loglinear.training.train import train


def write_text(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(8):
        lines = [f"line {line} of file {index}: {line * index % 97}" for line in range(20 + 5 * index)]
        (folder / f"{index}.txt").write_text("\n".join(lines))
    return folder


def tiny_recipe(data: Path, **changes: Any) -> TrainingRecipe:
    values: dict[str, Any] = {
        "name": "tiny",
        "summary": "for tests",
        "model": {
            "vocab_size": 264,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "intermediate_size": 32,
            "variant": "mamba2",
            "num_levels": 6,
            "num_heads": 2,
            "num_groups": 1,
            "key_dim": 16,
            "head_dim": 16,
            "chunk_size": 16,
            "tie_word_embeddings": True,
        },
        "data": (str(data),),
        "seq_len": 64,
        "batch_tokens": 128,
        "steps": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "eval_every": 4,
        "eval_tokens": 256,
        "save_every": 2,
        "keep_checkpoints": 3,
        "validation_fraction": 0.25,
    }
    return TrainingRecipe(**{**values, **changes})


def train_tiny(data: Path, out: Path) -> Path:
    """The folder of a run of the tiny recipe, from its beginning to its end."""
    train(tiny_recipe(data), out, progress=False)
    return out


def curve(out: Path) -> list[dict[str, Any]]:
    """Everything in metrics.jsonl that does not measure time."""
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in record.items() if k not in timed} for record in read_metrics(out)]


def assert_same_run(out: Path, reference: Path) -> None:
    """Bit for bit: the same curve, and the same weights at its end."""
    assert curve(out) == curve(reference)
    weights = [load_model(path).state_dict() for path in (out, reference)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
