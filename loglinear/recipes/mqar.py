"""Multi-query associative recall (MQAR): a table of small models, each trained and tested on the same examples.

The set-up is that of Arora et al., "Zoology", arXiv 2312.04927, appendix E, and of their published code: two layers
without an MLP, tied embeddings, batches of examples with one number of pairs, AdamW, a cosine from the learning rate to
zero without warmup, and a rest where validation is nearly perfect. Models, sizes and numbers of pairs are those of Guo
et al., arXiv 2506.04761, section 4.1: sequences of 256 tokens, 4 to 64 pairs, dimensions 16, 32 and 64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

from loglinear.fenwick import num_levels
from loglinear.recipes.comparison import PUBLISHED, choices

if TYPE_CHECKING:
    from loglinear.models import LogLinearConfig

LAYERS = 2
STATE_DIM = 16  # of Mamba-2: head dimension and key dimension
CHUNK_SIZE = 16  # no result depends on it; on a CPU it suits such heads, and miniatures of short examples


def _mamba2(dim: int) -> dict[str, Any]:
    """Expansion 2 in heads of 16, one query/key group."""
    return dict(variant="mamba2", num_heads=2 * dim // STATE_DIM, num_groups=1, key_dim=STATE_DIM, head_dim=STATE_DIM)


def _gated_delta_net(dim: int) -> dict[str, Any]:
    """One head at dimension 16, otherwise two; values twice as wide as keys."""
    heads = 1 if dim <= 16 else 2
    return dict(
        variant="gated_delta_net",
        num_heads=heads,
        num_groups=heads,
        key_dim=dim // heads,
        head_dim=2 * dim // heads,
    )


def _attention(dim: int) -> dict[str, Any]:
    """Softmax attention: one head of the whole dimension, rotary positions."""
    return dict(layer_types=["full_attention"] * LAYERS, num_attention_heads=1, attention_head_dim=dim)


class Model(NamedTuple):
    """The sizes of a dimension, and what else its configuration says; without num_levels, all levels of the length."""

    sizes: Callable[[int], dict[str, Any]]
    changes: dict[str, Any] = {}


MODELS = {
    "mamba2": Model(_mamba2, {"num_levels": 1}),
    "log_linear_mamba2": Model(_mamba2, PUBLISHED),
    "gated_delta_net": Model(_gated_delta_net, {"num_levels": 1}),
    "log_linear_gated_delta_net": Model(_gated_delta_net, PUBLISHED),
    "attention": Model(_attention, {"num_levels": 1}),
}
CHOICES = choices(capped_levels=6)  # what is 16 tokens or more away shares the last
ABLATIONS = {
    f"{name}_{choice}": Model(MODELS[name].sizes, changes)
    for name in ("log_linear_mamba2", "log_linear_gated_delta_net")
    for choice, changes in CHOICES.items()
}
DIMS = (16, 32, 64)
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)


@dataclass(frozen=True, kw_only=True)
class RecallTask:
    """What all cells of a table share: the examples, and how long a model may learn from them.

    `examples` are for training, `test_examples` for validation and as many others for the test, each for every number
    of `pairs`; `length` is in tokens. Raises ValueError, naming the field, where a value cannot work.
    """

    examples: int = 20_480  # whole batches: each shape of a batch would be compiled by itself
    test_examples: int = 1_024
    length: int = 256
    pairs: tuple[int, ...] = (4, 8, 16, 32, 64)
    vocab_size: int = 8192
    batch_size: int = 256  # examples
    epochs: int = 32  # at most
    good_enough: float = 0.99  # the validation accuracy above which training ends
    weight_decay: float = 0.1
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("examples", "test_examples", "batch_size", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.pairs or min(self.pairs) < 1 or len(set(self.pairs)) < len(self.pairs):
            raise ValueError(f"pairs must be one or more different positive numbers, got {self.pairs}")
        if self.vocab_size <= 2 * max(self.pairs):
            raise ValueError(f"vocab_size must be more than twice the pairs {self.pairs}, got {self.vocab_size}")
        if self.length % 2 or self.length < 4 * max(self.pairs):
            raise ValueError(f"length must be even and at least 4 times the pairs {self.pairs}, got {self.length}")

    @property
    def steps_per_epoch(self) -> int:
        """Batches of all numbers of pairs."""
        return len(self.pairs) * -(-self.examples // self.batch_size)

    def override(self, **changes: Any) -> RecallTask:
        """The same task with every `changes` that is not None put in; lists become tuples."""
        given = {name: value for name, value in changes.items() if value is not None}
        values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in given.items()}
        return dataclasses.replace(self, **values)


@dataclass(frozen=True, kw_only=True)
class RecallCell:
    """One model, trained once. The seed is of its weights and of the order of the batches, not of the examples.

    Raises ValueError, naming the field, where a value cannot work.
    """

    model: str
    dim: int
    learning_rate: float
    seed: int
    task: RecallTask = field(default_factory=RecallTask)

    def __post_init__(self) -> None:
        models = MODELS | ABLATIONS
        if self.model not in models:
            nearest = get_close_matches(self.model, models, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown model {self.model!r}: did you mean {nearest!r}? There are {', '.join(models)}")
        block = models[self.model].changes.get("finest_block", 1)
        if self.task.length <= block:
            raise ValueError(f"length must be more than {block} tokens for {self.model}, got {self.task.length}")
        if self.dim < STATE_DIM or self.dim % STATE_DIM:
            raise ValueError(f"dim must be a multiple of {STATE_DIM}, got {self.dim}")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning rate must be positive and finite, got {self.learning_rate}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    @property
    def name(self) -> str:
        """For files and people: all that distinguishes the cells of one table."""
        return f"{self.model}-dim{self.dim}-lr{self.learning_rate:g}-seed{self.seed}"

    def model_config(self) -> LogLinearConfig:
        """The model's configuration (imports transformers)."""
        from loglinear.models import LogLinearConfig

        sizes, changes = (MODELS | ABLATIONS)[self.model]
        shared = dict(
            vocab_size=self.task.vocab_size,
            hidden_size=self.dim,
            num_hidden_layers=LAYERS,
            intermediate_size=0,
            tie_word_embeddings=True,
            num_levels=num_levels(self.task.length),
            chunk_size=CHUNK_SIZE,
        )
        return LogLinearConfig(**shared | sizes(self.dim) | changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` is its inverse."""
        values = dataclasses.asdict(self)
        task = {name: list(value) if isinstance(value, tuple) else value for name, value in values["task"].items()}
        return {**values, "task": task}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RecallCell:
        """The cell that `to_dict` wrote."""
        return cls(**{**values, "task": RecallTask().override(**values["task"])})


@dataclass(frozen=True, kw_only=True)
class RecallTable:
    """Which cells there are: every learning rate is tried with the smallest seed, and the best has all of them.

    Raises ValueError, naming the field, where a value cannot work.
    """

    models: tuple[str, ...] = tuple(MODELS)
    dims: tuple[int, ...] = DIMS
    learning_rates: tuple[float, ...] = LEARNING_RATES
    seeds: tuple[int, ...] = SEEDS
    task: RecallTask = field(default_factory=RecallTask)

    def __post_init__(self) -> None:
        for name in ("models", "dims", "learning_rates", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be one or more different values, got {values}")
        self.groups()

    def __len__(self) -> int:
        """Cells of the whole table."""
        return len(self.models) * len(self.dims) * (len(self.learning_rates) + len(self.seeds) - 1)

    def groups(self) -> list[tuple[str, int]]:
        """Every (model, dim), the slowest first: they should not be what all processes wait for in the end."""
        groups = [(model, dim) for dim in sorted(self.dims, reverse=True) for model in self.models]
        for model, dim in groups:
            self.sweep(model, dim)
        return groups

    def sweep(self, model: str, dim: int) -> list[RecallCell]:
        """The cells among which the learning rate of a model is chosen."""
        return [self._cell(model, dim, rate, min(self.seeds)) for rate in self.learning_rates]

    def repeats(self, model: str, dim: int, learning_rate: float) -> list[RecallCell]:
        """The other seeds at the learning rate that was chosen."""
        return [self._cell(model, dim, learning_rate, seed) for seed in sorted(self.seeds)[1:]]

    def _cell(self, model: str, dim: int, learning_rate: float, seed: int) -> RecallCell:
        return RecallCell(model=model, dim=dim, learning_rate=learning_rate, seed=seed, task=self.task)
