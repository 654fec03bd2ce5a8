"""`loglinear eval membership`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loglinear.cli import console
from loglinear.data.sources import read_documents
from loglinear.evaluation import evaluate_membership
from loglinear.evaluation.plots import plot_membership
from loglinear.models import decode_top_k
from loglinear.runs.folder import require_folder
from loglinear.runs.json_files import write_object
from loglinear.runs.loading import load_checkpoint
from loglinear.runs.provenance import command, versions


def run(
    path: Path,
    members: tuple[str, ...],
    others: tuple[str, ...],
    out: Path | None,
    *,
    reference: Path | None,
    max_tokens: int,
    min_k: int,
    seed: int,
) -> None:
    """Print the table of all scores. With `out` write membership.json and membership.png."""
    if out is not None:
        require_folder(out, "--out")
    documents = [list(read_documents(sources)) for sources in (members, others)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_checkpoint(path, device=device)
    console.note_all_buckets("membership", decode_top_k(model))
    result = evaluate_membership(
        model,
        tokenizer,
        *documents,
        reference=None if reference is None else load_checkpoint(reference, device=device),
        max_tokens=max_tokens,
        min_k=min_k,
    )
    found = result.to_dict(seed)
    counts = f"{console.count(len(documents[0]), 'member')}, {console.count(len(documents[1]), 'other')}"
    columns = ["score", "AUC", "95 % interval", "best F1", "threshold", "true positives at 1 % false"]
    console.print_table(
        f"{path}: {counts}", columns, [[name, *_cells(score)] for name, score in found["scores"].items()]
    )
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "model": str(path),
        "reference": None if reference is None else str(reference),
        "members": list(members),
        "others": list(others),
        "max_tokens": max_tokens,
        "min_k": min_k,
    }
    write_object(out / "membership.json", {**settings, **found, "versions": versions(), "command": command()})
    plot_membership(out / "membership.png", result.curves)
    print(f"Figure and results: {out}")


def _cells(score: dict[str, Any]) -> list[str]:
    low, high = score["auc_interval"]
    return [
        f"{score['auc']:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{score['best_f1']:.3f}",
        f"{score['threshold']:.4f}",
        f"{score['true_positive_rate']:.3f}",
    ]
