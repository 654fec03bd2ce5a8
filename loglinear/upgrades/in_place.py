"""The upgrade of a pretrained model of transformers, in place."""

import logging
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from loglinear.models import LogLinearConfig
from loglinear.ops.validation import whole_number
from loglinear.upgrades.checkpoint import BASE, ENTRY, TRAINED, become_saveable, choices_of, own_configuration
from loglinear.upgrades.families import FAMILIES, family_of
from loglinear.upgrades.mixer import NEW_PARTS
from loglinear.upgrades.places import Placement, decoder_of, upgraded_mixers

logger = logging.getLogger(__name__)


class UpgradeReport(NamedTuple):
    """The result of an upgrade; as text, two lines."""

    layers: dict[str, str]
    """The name of each replaced module, and transformers' class of it."""
    kept: int
    """The number of the model's other layers."""
    new_parameters: int
    """The numbers of the new parameters' elements."""
    parameters: int
    """All elements of the model's parameters, with the new ones."""
    trained: bool = False
    """True if the new parameters come from a file of `save_upgrade`."""

    def __str__(self) -> str:
        kinds, share = ", ".join(sorted(set(self.layers.values()))), 100 * self.new_parameters / self.parameters
        linear = "1 linear layer" if len(self.layers) == 1 else f"{len(self.layers)} linear layers"
        others = "one is" if self.kept == 1 else f"{self.kept} are"
        return (
            f"{linear} ({kinds}) {'is' if len(self.layers) == 1 else 'are'} now log-linear"
            f"{f', the other {others} unchanged' if self.kept else ''}\n"
            f"{self.new_parameters:,} new parameters ({share:.2g} % of {self.parameters:,}) "
            f"{'are loaded' if self.trained else 'start neutral'}"
        )


def upgrade(
    model: PreTrainedModel,
    *,
    num_levels: int,
    radix: int = 2,
    finest_block: int = 1,
    largest_block: int | None = None,
    routing: str | None = None,
    routing_tau: float = 0.0,
    chunk_size: int = 64,
    impl: str = "auto",
    freeze: bool = True,
) -> UpgradeReport:
    """Make the linear layers of a pretrained model of transformers log-linear, in place, and return what was done.

    Every supported linear mixer keeps its parameters under their names and gets level weights, which are exactly 1 at
    the start. So the logits stay the same, within the rounding of another order of sums, until the new weights are
    trained. Attention, experts, MLPs and norms stay transformers'.

    Args:
        model: A model whose class is one of transformers', with at least one layer of `FAMILIES`.
        num_levels: L, the levels, at least 2, which tell 2**(L-1) tokens apart: take log2(length) + 1. See
            `LogLinearConfig`, as for the next five.
        radix: r, the blocks that join into one.
        finest_block: The tokens of each aligned block of this size share one weight.
        largest_block: Tokens of the largest block.
        routing: "gram" or "selective_gram" for the routed read. None: the weights depend on the token alone.
        routing_tau: The factor of the score at the start, at least 0. The model is unchanged at 0 alone.
        chunk_size: C, tokens per chunk of the algorithm.
        impl: The implementation of the operators.
        freeze: True: only the new parameters require gradients afterwards. False: parameters stay as they were.

    Raises:
        ValueError: A model without a supported layer, that is already upgraded, has adapters of PEFT or options that
            are not represented exactly, or an argument out of range. The model is then as before.
    """
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model must be a model of transformers, got {type(model).__name__}")
    if isinstance(model.config, LogLinearConfig):
        raise ValueError(
            f"model is a model of this library already: {type(model).__name__} has {model.config.num_levels} levels"
        )
    if whole_number("num_levels", num_levels) < 2:
        raise ValueError(f"num_levels must be at least 2 (1 is the linear model itself), got {num_levels}")
    if any(hasattr(module, "_hf_hook") for module in model.modules()) and any(p.is_meta for p in model.parameters()):
        raise ValueError("model must have its parameters in memory, some are offloaded: upgrade it before")
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        raise ValueError("model has adapters of PEFT: upgrade it before it gets them, or after merge_and_unload()")
    entry: dict[str, Any] = dict(
        num_levels=num_levels,
        radix=radix,
        finest_block=finest_block,
        largest_block=largest_block,
        routing=routing,
        routing_tau=routing_tau,
        chunk_size=chunk_size,
        impl=impl,
    )
    report = place_levels(model, LogLinearConfig(**entry))
    own_configuration(model)
    become_saveable(model, {**entry, "freeze": freeze})
    train_as_configured(model)
    logger.info("%s", report)
    return report


def upgrade_as_configured(model: PreTrainedModel) -> None:
    """Upgrade a new model as its configuration says, unless a part that is a model itself has done so."""
    entry = {name: value for name, value in getattr(model.config, ENTRY).items() if name != BASE}
    if not upgraded_mixers(model):
        place_levels(model, choices_of(model.config))
    become_saveable(model, entry)
    train_as_configured(model)


def train_as_configured(model: PreTrainedModel) -> None:
    """Let only the parameters that an upgrade added, and those of `note_trained`, require gradients, if it froze."""
    entry = getattr(model.config, ENTRY)
    if not entry["freeze"]:
        return
    new, trained, prefix = new_parameters(model), {*entry.get(TRAINED, ())}, f"{model.base_model_prefix}."
    for name, parameter in model.named_parameters():
        names = {name, prefix + name, name.removeprefix(prefix)}  # the folder may be of a model with or without a head
        parameter.requires_grad_(name in new or not names.isdisjoint(trained))


def note_trained(model: PreTrainedModel) -> None:
    """Write into the configuration which parameters a frozen model trains beside the new ones, such as a head."""
    entry = {name: value for name, value in getattr(model.config, ENTRY).items() if name != TRAINED}
    if entry["freeze"]:
        new = new_parameters(model)
        others = {name: parameter for name, parameter in model.named_parameters() if name not in new}
        trained = [name for name, parameter in others.items() if parameter.requires_grad]
        entry["freeze"] = len(trained) < len(others)
        if entry["freeze"] and trained:
            entry[TRAINED] = trained
    setattr(model.config, ENTRY, entry)


def place_levels(model: PreTrainedModel, choices: LogLinearConfig) -> UpgradeReport:
    """Replace every supported mixer of a model; ValueError if there is none or one cannot be."""
    mixers = {name: (module, family_of(module)) for name, module in model.named_modules()}
    found = {name: (module, family) for name, (module, family) in mixers.items() if family is not None}
    if upgraded_mixers(model):
        raise ValueError("model is already upgraded: load the original again to choose other levels")
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no linear layer that can be upgraded, supported are {', '.join(FAMILIES)}"
        )
    refusals = {phrase for module, family in found.values() for phrase in family.refusals(module)}
    if any("forward" in vars(module) and not hasattr(module, "_hf_hook") for module, _ in found.values()):
        refusals.add("a forward pass that was replaced, for instance by use_kernels=True (upgrade before)")
    if refusals:
        raise ValueError(f"{type(model).__name__} cannot be upgraded exactly: {', '.join(sorted(refusals))}")
    layers = {name: type(module).__name__ for name, (module, _) in found.items()}
    for module, family in found.values():
        family.become(module, choices)
    decoder = decoder_of(model)
    Placement(decoder).attach(decoder, model)
    new = sum(p.numel() for p in new_parameters(model).values())
    every = sum(p.numel() for p in model.parameters())
    return UpgradeReport(layers, model.config.get_text_config().num_hidden_layers - len(layers), new, every)


def new_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that an upgrade added to a model, by name; ValueError if the model has none.

    Wrappers such as those of PEFT may surround the model. If PEFT has copied a module to train it, the copy counts.
    """
    new = {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(f".{part}." in f".{name}" for part in NEW_PARTS) and ".original_module." not in name
    }
    if not new:
        raise ValueError(f"{type(model).__name__} has no new parameters: upgrade it first")
    return new
