"""`loglinear upgrade`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from loglinear.cli import console
from loglinear.convert.target import write
from loglinear.runs.folder import require_new
from loglinear.runs.foreign import hub_hint, stored_settings, weight_files
from loglinear.runs.loading import without_bars
from loglinear.upgrades import upgrade


def run(path: Path, out: Path, options: dict[str, Any]) -> None:
    """Upgrade the model of a folder into a new folder, and print what was done.

    Raises ValueError, in one line, for a folder that transformers cannot load, and as `loglinear.upgrade` does.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"--model must be a folder with config.json and the weights, got {path}{hub_hint(path)}")
    weight_files(path)
    require_new(out, "--out")
    settings = stored_settings(path)
    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise ValueError(f"{config.model_type!r} is no language model: loglinear.upgrade takes it in Python")
        with without_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                generation_config=settings,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"no model could be loaded from {path}: {str(error).splitlines()[0]}") from error
    model, found = loaded
    if found["missing_keys"]:  # transformers has drawn these weights at random
        raise ValueError(f"{path} lacks a weight of {type(model).__name__}: {sorted(found['missing_keys'])[0]}")
    if found["unexpected_keys"]:
        name = sorted(found["unexpected_keys"])[0]
        print(f"note: {type(model).__name__} has no place for {name}, so it is left out", file=sys.stderr)
    report = upgrade(model, **options)
    for note in write(model, path, out):
        print(f"note: {note}", file=sys.stderr)
    rows = [
        ["log-linear layers", f"{len(report.layers):,} ({', '.join(sorted(set(report.layers.values())))})"],
        ["other layers", f"{report.kept:,}"],
        ["new parameters", f"{report.new_parameters:,}"],
        ["parameters", f"{report.parameters:,}"],
    ]
    console.print_table(str(out), ["", "value"], rows)
