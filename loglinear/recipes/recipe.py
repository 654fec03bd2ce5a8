"""A training run as one value: model, data and optimisation. run.json holds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loglinear.models import LogLinearConfig

# Fields of `model` that a command line may override. A recipe sets all others.
MODEL_OVERRIDES = ("variant", "num_levels", "embedding_range")
DTYPES = ("float32", "bfloat16")
LARGEST = 2**31 - 1  # of a count: positions of tokens are int32


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """A named, complete training run. Equal recipes on equal data give equal loss curves.

    Lengths are in tokens. `seq_len` is the length of the longest sequence. `batch_tokens` is the size of one optimiser
    step, and `micro_batch_tokens` that of one forward pass (default: the whole batch). Every `eval_every` steps the
    model reads `eval_tokens` of validation text. `data` and `tokenizer` are as in `loglinear.data`. The
    learning rate rises linearly for `warmup_steps` and falls on a cosine to `final_lr_ratio` of its peak. `compile`
    compiles the blocks (`loglinear.training.compilation`). `checkpointing` computes each block again in the backward
    pass, in place of keeping its activations.

    With `jitter` every training sequence starts at a random position of the tree below it (`initial_position`), so that
    levels beyond the sequences are trained too. With `new_only` a model of a folder trains its level weights alone.
    `dtype` is one of DTYPES, in which the training multiplies; weights stay float32. None: bfloat16 on a GPU that has
    it, else float32.

    Raises ValueError, which names the field, for a value that cannot work.
    """

    name: str
    summary: str
    model: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments of LogLinearConfig
    data: tuple[str, ...] = ()
    tokenizer: str | None = "bytes"
    seq_len: int
    batch_tokens: int
    micro_batch_tokens: int | None = None
    steps: int
    learning_rate: float
    warmup_steps: int
    final_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    adam_betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    seed: int = 0
    eval_every: int
    eval_tokens: int
    save_every: int
    keep_checkpoints: int = 2
    validation_fraction: float = 0.05
    compile: bool = False
    checkpointing: bool = False
    start: str | None = None  # the folder of a model to train; then `model` has no meaning
    jitter: int | None = None  # in tokens; None: every sequence starts at 0
    new_only: bool | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "eval_every", "eval_tokens", "save_every", "keep_checkpoints"):
            self._require(name, 1, LARGEST)
        for name in ("seq_len", "batch_tokens", "micro_batch_tokens"):  # one token predicts nothing
            self._require(name, 2, LARGEST)
        self._require("jitter", 1, LARGEST)
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.new_only and self.start is None:
            raise ValueError("new_only needs a start from a folder: weights at random stay at random")
        self._require("seed", 0, 2**32 - 1)  # the limit of numpy's generator
        if not 0 < self.learning_rate <= 1:  # AdamW moves every weight by about this much in a step
            raise ValueError(f"learning_rate must be positive and at most 1, got {self.learning_rate}")
        if not 0 < self.validation_fraction < 1:
            raise ValueError(f"validation_fraction must lie between 0 and 1, got {self.validation_fraction}")
        if self.batch_tokens % self.row_tokens:
            raise ValueError(
                f"micro_batch_tokens must divide batch_tokens, got {self.micro_batch_tokens} and {self.batch_tokens}"
            )
        if self.row_tokens < self.seq_len:
            name = "batch_tokens" if self.micro_batch_tokens is None else "micro_batch_tokens"
            raise ValueError(f"{name} must be at least seq_len = {self.seq_len}, got {self.row_tokens}")

    def _require(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
        if value is not None and value > most:
            raise ValueError(f"{name} must be at most {most}, got {value}")

    @property
    def row_tokens(self) -> int:
        """The tokens of one packed row, which is one forward pass."""
        return self.batch_tokens if self.micro_batch_tokens is None else self.micro_batch_tokens

    @property
    def missing(self) -> list[str]:
        """The fields without a value that a run needs: `tokenizer`, `data`, both or none."""
        return [name for name in ("tokenizer", "data") if not getattr(self, name)]

    def require_complete(self) -> None:
        """Raise ValueError, which names the options to give, if a field is `missing`."""
        if self.missing:
            options = {"tokenizer": "--tokenizer (a folder, or 'bytes')", "data": "--data (files, or 'stdlib')"}
            give = " and ".join(options[name] for name in self.missing)
            raise ValueError(f"recipe {self.name!r} names no {' and no '.join(self.missing)}: give {give}")

    def model_config(self) -> LogLinearConfig:
        """Return the model's configuration. Imports transformers."""
        from loglinear.models import LogLinearConfig

        return LogLinearConfig(**self.model)

    def override(self, **changes: Any) -> TrainingRecipe:
        """Return the recipe with every change that is not None: a field of the recipe or of MODEL_OVERRIDES.

        If `steps` changes, the warmup is shortened to at most a tenth of them. A start from a folder drops the recipe's
        model.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        model = {name: given.pop(name) for name in MODEL_OVERRIDES if name in given}
        if "batch_tokens" in given and self.micro_batch_tokens is not None:
            given.setdefault("micro_batch_tokens", min(self.micro_batch_tokens, given["batch_tokens"]))
        if "steps" in given:
            given.setdefault("warmup_steps", min(self.warmup_steps, max(1, given["steps"] // 10)))
        recipe_model = {} if "start" in given else self.model
        return dataclasses.replace(self, model={**recipe_model, **model}, **given)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types. `from_dict` is the inverse."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingRecipe:
        """Return the recipe that `to_dict` wrote."""
        fields: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
        return cls(**fields)
