"""`loglinear info`."""

from __future__ import annotations

from itertools import groupby
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from loglinear.cli import console
from loglinear.models import LogLinearConfig, key_value_cache_bytes, parameter_counts, state_bytes
from loglinear.ops import IMPLEMENTATIONS, impl_triton
from loglinear.recipes import RECIPES, get_recipe
from loglinear.runs.loading import load_model
from loglinear.runs.provenance import versions
from loglinear.upgrades import new_parameters
from loglinear.upgrades.checkpoint import choices_of
from loglinear.variants import VARIANTS

CONTEXTS = (("4K", 4096), ("16K", 16_384), ("128K", 131_072), ("1M", 1_048_576))


def run(recipe: str | None, model: Path | None) -> None:
    """Describe the installation, or one model."""
    if recipe is not None and model is not None:
        raise ValueError("--recipe and --model exclude each other: give one of them")
    if model is not None:
        found = load_model(model)
        if isinstance(found.config, LogLinearConfig):
            _describe(str(model), found.config)
        else:
            _describe_upgraded(str(model), found)
    elif recipe is not None:
        _describe(recipe, get_recipe(recipe).model_config())
    else:
        _installation()


def _installation() -> None:
    console.print_table("Versions", ["", "version"], list(versions().items()), text=True)
    every_gate = ("scalar", "diagonal")
    implementations = [
        [name, ", ".join(impl_triton.GATES), impl_triton.availability()]
        if name == "triton"
        else [name, ", ".join(every_gate), "yes"]
        for name in IMPLEMENTATIONS
    ]
    columns = ["name", "gates", "available"]
    console.print_table("Implementations of the operators (impl=)", columns, implementations, text=True)
    variants = [
        [name, variant.transition, "diagonal" if variant.diagonal_gate else "scalar"]
        for name, variant in VARIANTS.items()
    ]
    console.print_table("Variants (--variant)", ["name", "transition", "gate"], variants, text=True)
    recipes = {name: make() for name, make in RECIPES.items()}
    rows = [[name, recipe.summary] for name, recipe in recipes.items()]
    console.print_table("Recipes (--recipe)", ["name", "summary"], rows, text=True)
    for missing, group in groupby(recipes, key=lambda name: recipes[name].missing):
        needs = " ".join(f"--{name}" for name in missing)
        print(f"{_together(list(group))}: {'needs ' + needs if needs else 'runs as it is'}")


def _together(names: list[str]) -> str:
    """Return the names of recipes by their common beginning: 'paper_*'."""
    return names[0] if len(names) == 1 else f"{commonprefix(names)}*"


def _describe(name: str, config: LogLinearConfig) -> None:
    counts = parameter_counts(config)
    rows = [
        ["variant", config.variant if "linear_attention" in (config.layer_types or []) else "full attention"],
        ["levels", str(config.num_levels)],
        ["partition", _partition(config)],
        ["routing", _routing(config)],
        ["parameters", f"{counts.total:,}"],
        ["of which embeddings", f"{counts.embeddings:,}"],
        ["of which lambda", f"{counts.level_scales:,} ({counts.lambda_share:.2%})"],
    ]
    console.print_table(name, ["", "value"], rows)
    attention = f"KV cache of a Transformer ({config.num_key_value_heads} heads of {config.attention_head_dim})"
    rows = [
        [
            label,
            console.human_bytes(state_bytes(config, tokens)),
            console.human_bytes(state_bytes(_with_full_levels(config, tokens), tokens)),
            console.human_bytes(key_value_cache_bytes(config, tokens)),
        ]
        for label, tokens in CONTEXTS
    ]
    levels = console.count(config.num_levels, "level")
    console.print_table(
        "Memory to decode one sequence, all layers (float32 states, all else bfloat16)",
        ["tokens", f"state, {levels}", "state, all levels of these tokens", attention],
        rows,
    )


def _describe_upgraded(name: str, model: PreTrainedModel) -> None:
    choices = choices_of(model.config)
    total, new = model.num_parameters(), sum(p.numel() for p in new_parameters(model).values())
    rows = [
        ["model", f"{type(model).__name__} of transformers, upgraded"],
        ["levels", str(choices.num_levels)],
        ["partition", _partition(choices)],
        ["routing", _routing(choices)],
        ["parameters", f"{total:,}"],
        ["of which new", f"{new:,} ({new / total:.2%})"],
        ["decode state of one sequence, log-linear layers", console.human_bytes(_decoding_bytes(model))],
    ]
    console.print_table(name, ["", "value"], rows)


@torch.no_grad()
def _decoding_bytes(model: Any) -> int:
    """Return the bytes of the upgraded layers' states, which have one size from the first token on."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    options = dict(max_new_tokens=2, do_sample=False, return_dict_in_generate=True, eos_token_id=-1)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)  # 0 may be the padding's token
    return sum(getattr(layer, "nbytes", 0) for layer in made.past_key_values.layers)


def _partition(config: LogLinearConfig) -> str:
    """Return the partition of the past in a few words."""
    largest = "" if config.largest_block is None else f", largest {config.largest_block:,}"
    return f"radix {config.radix}, finest block {config.finest_block:,}{largest}"


def _routing(config: LogLinearConfig) -> str:
    """Return the routing, and how many buckets a decode step reads if it does not read all."""
    if config.routing is None or config.decode_top_k is None:
        return config.routing or "none"
    return f"{config.routing}, a step reads its own block and {console.count(config.decode_top_k, 'other bucket')}"


def _with_full_levels(config: LogLinearConfig, tokens: int) -> LogLinearConfig:
    """Return the configuration with all levels of a length; that of a linear model stays the same."""
    levels = config.partition.num_columns(tokens) if config.num_levels > 1 else 1
    if config.routing is not None:
        levels = max(2, levels)
    return LogLinearConfig(**{**config.to_dict(), "num_levels": levels})
