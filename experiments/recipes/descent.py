"""Double descent: one small model of each kind, on datasets of real text around its capacity."""

from typing import Any

from experiments.recipes.capacity import BATCH, PREDICTED, model_changes, small_model
from experiments.recipes.comparison import parameters_of, widened
from experiments.text_pieces import TextPieces
from loglinear.recipes.bytes import BYTE_VOCABULARY
from loglinear.recipes.recipe import TrainingRecipe

LENGTH, MINIATURE_LENGTH = 64, 32  # bytes of a piece
HIDDEN, LAYERS = 64, 2  # the miniature has half the width and one layer
BITS = 2.5  # of a byte under a small model, about: what the loads are relative to, not what a result says
LOADS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # bits of the dataset, about, over the predicted capacity
RESERVED, MINIATURE_RESERVED = 131_072, 2048  # pieces of the reference model
STEPS, MINIATURE_STEPS = 3_000, 60
MINIATURE_BATCH = 128  # pieces of a step
RATE = 0.3  # learning rate times the width; not searched
DATA = "data/long_text/validation.jsonl.zst"


def descent(
    kind: str, load: float | None, *, data: str, dtype: str = "float32", miniature: bool = False
) -> TrainingRecipe:
    """Return the recipe of a kind of model and a load; None is the reference model, which reads RESERVED other pieces.

    All kinds have equally many parameters, as far as the steps of the SwiGLU layers' width allow. Raises ValueError for
    any other kind or load.
    """
    length, reserved = (MINIATURE_LENGTH, MINIATURE_RESERVED) if miniature else (LENGTH, RESERVED)
    hidden, layers = (HIDDEN // 2, 1) if miniature else (HIDDEN, LAYERS)
    changes: dict[str, dict[str, Any]] = model_changes(length + 1, layers)
    if kind not in changes:
        raise ValueError(f"--kind must be one of {', '.join(changes)}, got {kind!r}")
    if load not in (None, *LOADS):
        raise ValueError(f"--load must be one of {', '.join(f'{x:g}' for x in LOADS)}, got {load!r}")
    base = small_model(hidden, layers, length + 1, BYTE_VOCABULARY)
    parameters = parameters_of(base)
    sequences = reserved if load is None else round(load * PREDICTED * parameters / (length * BITS))
    steps = MINIATURE_STEPS if miniature else STEPS
    name = "reference" if load is None else f"{load:g}"
    return TrainingRecipe(
        name=f"descent_{kind}_{name}_{dtype}{'_miniature' * miniature}",
        summary=f"{parameters:,} parameters, {sequences:,} pieces of text: {kind.replace('_', '-')}",
        model=widened({**base, **changes[kind]}, parameters),
        data=(TextPieces(sequences, length, reserved, data).source,),
        seq_len=length + 1,
        batch_tokens=min(MINIATURE_BATCH if miniature else BATCH, sequences) * (length + 1),
        steps=steps,
        learning_rate=RATE / hidden,
        warmup_steps=steps // 50,
        final_lr_ratio=0.01,
        weight_decay=0.0,
        eval_every=steps // 4,
        eval_tokens=1_048_576,
        save_every=steps // 4,
        keep_checkpoints=1,
        dtype=dtype,
    )
