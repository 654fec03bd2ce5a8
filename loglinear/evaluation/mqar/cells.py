"""Multi-query associative recall (MQAR): a table of small models, each trained and tested on the same examples.

The task is that of Arora et al., "Zoology", arXiv 2312.04927, appendix E. Models have two layers without an MLP and
tied embeddings; a batch has examples with one number of pairs. AdamW follows a cosine to zero without warmup. Training
ends early if validation is nearly perfect. Models, sizes and numbers of pairs are those of Guo et al., arXiv
2506.04761, section 4.1: 4 to 64 pairs, dimensions 16, 32 and 64. `PROTOCOLS` sets the training and the choice of the
learning rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from loglinear.evaluation.mqar.models import MODELS, STATE_DIM, find_model, model_bytes, model_config
from loglinear.recipes.recipe import LARGEST
from loglinear.registry import pick

if TYPE_CHECKING:
    from loglinear.models import LogLinearConfig, LogLinearForCausalLM

LARGEST_DIM = 4096
DIMS = (16, 32, 64)


class TrainingProtocol(NamedTuple):
    """The training of a table's cells, with its learning rates and seeds."""

    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]  # of the reported cells
    tuning_seeds: tuple[int, ...] | None  # their mean chooses the learning rate; None: the smallest of `seeds`
    hopeless: float | None  # a rate so far below the best with the first tuning seed is not tried with the others
    tokens_per_pair: int | None  # sets the length of an example, up to `RecallTask.length`; None: always that length
    easiest: int  # factor of the number of training examples with the fewest pairs
    torch_init: bool  # PyTorch's initial values of linear layers; otherwise normal ones of deviation 0.02
    max_grad_norm: float  # 0: gradients are not clipped
    decay_all: bool  # weight decay also for vectors and gates
    float32: bool  # otherwise bfloat16 autocast on a GPU
    by_epoch: bool  # the learning rate falls once an epoch; otherwise once a step


PROTOCOLS = {
    "loglinear": TrainingProtocol((1e-3, 3e-3, 1e-2), (0, 1, 2), None, None, None, 1, False, 1.0, False, False, False),
    # The published code of the task's authors: 64 tokens with 4 pairs, 128 with 8, 256 with more. `hopeless` is more
    # than the range of three seeds of Mamba-2 at every rate near the best: 17 points, if means up to 10 points behind
    # count (results/mqar-zoology.json). Seeds of worse rates range more widely.
    "zoology": TrainingProtocol(
        (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2), (3, 4, 5, 6, 7), (0, 1, 2), 0.2, 16, 5, True, 0.0, True, True, True
    ),
}


class Setting(NamedTuple):
    """The size of one kind of example, and their number."""

    pairs: int
    length: int
    examples: int


@dataclass(frozen=True, kw_only=True)
class RecallTask:
    """The examples and the limits of training that all cells of a table share.

    For every number of `pairs` there are `examples` for training, `test_examples` for validation and as many others
    for the test. `length` is in tokens; `protocol` is a name in PROTOCOLS.

    With `jitter` every sequence starts at a random position of the tree, because the standard task cannot tell more
    buckets from one. There the P pairs are the tokens s < 2 P, and every query is a later token t. Let P be a power of
    two. Then t has a bit at or above that of 2 P, and s has none there, so t XOR s has the highest bit of t:

        level(t, s) = bit_length(t XOR s) = bit_length(t)    for all s < 2 P <= t

    All pairs lie in one bucket, for every query. Jitter moves the pairs over boundaries of buckets; numbers of pairs
    that are no powers of two do so as well.

    Raises ValueError, which names the field, for a value that cannot work.
    """

    protocol: str = "loglinear"
    examples: int = 20_480  # whole batches, because every shape of a batch is compiled
    test_examples: int = 1_024
    length: int = 256
    pairs: tuple[int, ...] = (4, 8, 16, 32, 64)
    vocab_size: int = 8192
    batch_size: int = 256  # examples
    epochs: int = 32  # the most
    good_enough: float = 0.99  # validation accuracy that ends the training
    weight_decay: float = 0.1
    adam_betas: tuple[float, float] = (0.9, 0.999)
    jitter: bool = False

    def __post_init__(self) -> None:
        pick("protocol", PROTOCOLS, self.protocol)
        for name in ("examples", "test_examples", "batch_size", "epochs"):
            if not 1 <= getattr(self, name) <= LARGEST:
                raise ValueError(f"{name} must lie between 1 and {LARGEST}, got {getattr(self, name)}")
        if not self.pairs or min(self.pairs) < 1 or len(set(self.pairs)) < len(self.pairs):
            raise ValueError(f"pairs must be one or more different positive numbers, got {self.pairs}")
        if self.vocab_size <= 2 * max(self.pairs):
            raise ValueError(f"vocab_size must be more than twice the pairs {self.pairs}, got {self.vocab_size}")
        if self.length > LARGEST:
            raise ValueError(f"length must be at most {LARGEST}, got {self.length}")
        if self.length % 2 or self.length < 4 * max(self.pairs):
            raise ValueError(f"length must be even and at least 4 times the pairs {self.pairs}, got {self.length}")

    @property
    def how(self) -> TrainingProtocol:
        """The protocol of that name."""
        return PROTOCOLS[self.protocol]

    def settings(self, *, training: bool) -> list[Setting]:
        """Return the kinds of examples for training, or for validation and test."""
        of_a_pair = self.how.tokens_per_pair
        lengths = {pairs: min(self.length, of_a_pair * pairs) if of_a_pair else self.length for pairs in self.pairs}
        times = {min(self.pairs): self.how.easiest} if training else {}
        examples = self.examples if training else self.test_examples
        return [Setting(pairs, lengths[pairs], examples * times.get(pairs, 1)) for pairs in self.pairs]

    @property
    def starts(self) -> int:
        """The number of positions at which a sequence may start: with jitter the power of two from `length` on."""
        return 1 << (self.length - 1).bit_length() if self.jitter else 1

    @property
    def positions(self) -> int:
        """The number of positions in the tree that the sequences use, wherever they start."""
        return self.starts - 1 + self.length

    @property
    def steps_per_epoch(self) -> int:
        """The number of training batches."""
        return sum(-(-setting.examples // self.batch_size) for setting in self.settings(training=True))

    def override(self, **changes: Any) -> RecallTask:
        """Return the task with every change that is not None. Lists become tuples."""
        given = {name: value for name, value in changes.items() if value is not None}
        given.pop("max_grad_norm", None)  # results of earlier versions name it; it belongs to the protocol
        values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in given.items()}
        return dataclasses.replace(self, **values)


TASKS = {
    "standard": RecallTask(),
    "jittered": RecallTask(jitter=True, length=1024, pairs=(6, 12, 24, 48, 96, 192)),  # the few are learnt first
}


def get_task(name: str) -> RecallTask:
    """Return the task called `name`. Raises ValueError if there is none."""
    return pick("task", TASKS, name)


@dataclass(frozen=True, kw_only=True)
class RecallCell:
    """One model, trained once. The seed sets its weights and the order of the batches, not the examples.

    Raises ValueError, which names the field, for a value that cannot work.
    """

    model: str
    dim: int
    learning_rate: float
    seed: int
    task: RecallTask = field(default_factory=RecallTask)

    def __post_init__(self) -> None:
        model = find_model(self.model)
        if self.task.jitter and model.adapt is not None and not model.takes_positions:
            raise ValueError(f"a jittered task needs a model that starts at any position, got {self.model}")
        block = model.changes.get("finest_block", 1)
        if self.task.length <= block:
            raise ValueError(f"length must be more than {block} tokens for {self.model}, got {self.task.length}")
        if not STATE_DIM <= self.dim <= LARGEST_DIM or self.dim % STATE_DIM:
            raise ValueError(f"dim must be a multiple of {STATE_DIM} up to {LARGEST_DIM}, got {self.dim}")
        if not 0 < self.learning_rate <= 1:
            raise ValueError(f"learning rate must be positive and at most 1, got {self.learning_rate}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie between 0 and {2**32 - 1}, got {self.seed}")

    @property
    def name(self) -> str:
        """The name of files and rows: model, dimension, learning rate and seed."""
        return f"{self.model}-dim{self.dim}-lr{self.learning_rate:g}-seed{self.seed}"

    def model_config(self) -> LogLinearConfig:
        """Return the model's configuration. Imports transformers."""
        task = self.task
        sizes = dict(vocab_size=task.vocab_size, length=task.length, positions=task.positions)
        return model_config(self.model, self.dim, **sizes)

    def build(self) -> LogLinearForCausalLM:
        """Return the untrained model, from the present random state. Imports transformers."""
        from loglinear.models import LogLinearForCausalLM

        model = LogLinearForCausalLM(self.model_config())
        if adapt := find_model(self.model).adapt:
            adapt(model, self.task.length)
        return model

    @property
    def decode_bytes(self) -> int | None:
        """The bytes of the float32 decode state of one sequence of the longest examples, in all layers.

        None for an adapted model that does not say.
        """
        return model_bytes(self.model, self.model_config(), self.task.length)

    @property
    def cache_bytes(self) -> int:
        """The bytes of the float32 KV cache of the attention model of this dimension for the same sequence."""
        attention = dataclasses.replace(self, model="attention").decode_bytes
        assert attention is not None
        return attention

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types. `from_dict` is the inverse."""
        values = dataclasses.asdict(self)
        task = {name: list(value) if isinstance(value, tuple) else value for name, value in values["task"].items()}
        return {**values, "task": task}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RecallCell:
        """Return the cell that `to_dict` wrote."""
        return cls(**{**values, "task": RecallTask().override(**values["task"])})


@dataclass(frozen=True, kw_only=True)
class RecallTable:
    """The cells of a table. Every learning rate is tried with the tuning seeds, and the best has all `seeds`.

    The first tuning seed tries every rate. The others try those that are not hopeless, see TrainingProtocol. The
    protocol gives the default learning rates and seeds. With one rate there is no choice.

    Raises ValueError, which names the field, for a value that cannot work.
    """

    models: tuple[str, ...] = tuple(MODELS)
    dims: tuple[int, ...] = DIMS
    learning_rates: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()
    task: RecallTask = field(default_factory=RecallTask)

    def __post_init__(self) -> None:
        for name in ("learning_rates", "seeds"):
            object.__setattr__(self, name, getattr(self, name) or getattr(self.task.how, name))
        for name in ("models", "dims", "learning_rates", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must be one or more different values, got {values}")
        own = self.task.how.tuning_seeds or ()
        if len(self.learning_rates) > 1 and (both := [seed for seed in self.seeds if seed in own]):
            raise ValueError(
                f"seeds must not be tuning seeds {own} of protocol {self.task.protocol!r}, which choose among the "
                f"learning rates, got {both[0]}"
            )
        self.groups()

    def __len__(self) -> int:
        """Return the number of cells in the whole table if no rate is hopeless."""
        model, dim = self.models[0], self.dims[0]
        rate = self.learning_rates[0]
        return len(self.models) * len(self.dims) * len(self.sweep(model, dim) + self.repeats(model, dim, rate))

    def groups(self) -> list[tuple[str, int]]:
        """Return every (model, dim), the slowest first, so that none of them is left alone at the end."""
        groups = [(model, dim) for dim in sorted(self.dims, reverse=True) for model in self.models]
        for model, dim in groups:
            self.repeats(model, dim, self.learning_rates[0])
        return groups

    @property
    def tuning_seeds(self) -> tuple[int, ...]:
        """The seeds whose mean validation accuracy chooses a learning rate."""
        own = self.task.how.tuning_seeds
        return (min(self.seeds),) if own is None else own

    def trial(self, model: str, dim: int) -> list[RecallCell]:
        """Return the cells of `sweep` with the first tuning seed, which decide the rates that the others try."""
        return [cell for cell in self.sweep(model, dim) if cell.seed == self.tuning_seeds[0]]

    def sweep(self, model: str, dim: int, rates: Sequence[float] | None = None) -> list[RecallCell]:
        """Return the cells that decide the learning rate of a model, among `rates` (default: all)."""
        if len(self.learning_rates) == 1:
            return []
        tried = self.learning_rates if rates is None else rates
        return [self._cell(model, dim, rate, seed) for rate in tried for seed in self.tuning_seeds]

    def repeats(self, model: str, dim: int, learning_rate: float) -> list[RecallCell]:
        """Return the reported cells at the chosen learning rate, without those of the sweep."""
        swept = self.sweep(model, dim)
        cells = [self._cell(model, dim, learning_rate, seed) for seed in sorted(self.seeds)]
        return [cell for cell in cells if cell not in swept]

    def _cell(self, model: str, dim: int, learning_rate: float, seed: int) -> RecallCell:
        return RecallCell(model=model, dim=dim, learning_rate=learning_rate, seed=seed, task=self.task)
