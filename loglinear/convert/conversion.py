"""Conversion of foreign checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from loglinear.convert.formats import get_format
from loglinear.convert.source import Options, Tensors
from loglinear.convert.target import build, configuration, write
from loglinear.models import LogLinearConfig
from loglinear.runs.folder import require_new
from loglinear.runs.foreign import stored_settings


class Conversion(NamedTuple):
    """The result of a conversion."""

    config: LogLinearConfig
    """The configuration of the new checkpoint."""
    dtype: str
    """The dtype of its weights, that of the source."""
    notes: list[str]
    """Sentences about values that a user may not expect."""


def convert(path: Path | str, out: Path | str, *, source: str, **levels: Any) -> Conversion:
    """Convert a checkpoint of another library into one of `LogLinearForCausalLM` with the same logits.

    A linear model becomes log-linear with neutral level weights: every bucket has the weight 1, so the logits stay.

    Args:
        path: The folder with config.json and the weights. None of its code runs.
        out: The new folder, which must not exist or be empty. It appears whole or not at all.
        source: The library that wrote the checkpoint, a name in `FORMATS`.
        levels: The levels of a linear model: num_levels (15 if left out; 1 keeps it linear), lambda_form, radix,
            finest_block, largest_block and routing, as in `LogLinearConfig`. A log-linear model has its own.

    Raises:
        ValueError: An unknown format or model, an option that our model cannot represent exactly, or a tensor that is
            missing, unexpected or of another shape. One line names it, its value and the expected one.
        OSError: The new folder cannot be written.
    """
    path, out = Path(path), Path(out)
    require_new(out, "the output")
    library = get_format(source)
    options = Options.of(path)
    read = library.reader(options)
    tensors = Tensors(path, pickle=library.pickle)
    converted = read(options, tensors)
    options.check_all_known()
    tensors.check_all_taken()
    config = configuration(converted.fields, levels)
    model = build(config, converted)
    model.generation_config = stored_settings(path) or model.generation_config
    notes = [*converted.notes, *write(model, path, out)]
    return Conversion(config, str(model.dtype).removeprefix("torch."), notes)
