"""The models of the upgrade benchmark, their upgrades, and the code that computes their linear layers."""

from __future__ import annotations

import copy
import importlib
import inspect
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, Mamba2Config, PreTrainedConfig, PreTrainedModel, Qwen3_5TextConfig
from transformers.cache_utils import Cache, DynamicCache

import loglinear
from loglinear.partition import Partition


class Family(NamedTuple):
    """A published model and a tiny one with the same layers."""

    config_class: type[PreTrainedConfig]
    published: dict[str, Any]
    tiny: dict[str, Any]
    cache_name: str
    """The argument of the forward pass that takes the cache."""
    module: str
    """transformers' file of the linear layer, in transformers.models."""
    functions: dict[str, tuple[str, ...]]
    """By work: the functions of the file for which transformers takes an installed package, or its own torch code."""

    def config(self, tiny: bool, layers: int | None) -> PreTrainedConfig:
        """Return the configuration, with another number of layers if one is given."""
        sizes = self.tiny if tiny else self.published
        return self.config_class(**{**sizes, **({} if layers is None else {"num_hidden_layers": layers})})

    def implementations(self, work: str) -> list[str]:
        """Return "function: module" for each function of the original's linear layer, as transformers chose it."""
        module = importlib.import_module(f"transformers.models.{self.module}")
        return [f"{name}: {_origin(getattr(module, name))}" for name in self.functions[work]]


def _origin(function: Any) -> str:
    """Return the module of the code behind one of transformers' functions, which falls back to torch by itself."""
    closure = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
    chosen = closure.get("implementation")
    return "unknown" if chosen is None else chosen.__module__


FAMILIES = {
    "Mamba-2": Family(
        Mamba2Config,
        dict(
            vocab_size=50_288,
            hidden_size=2048,
            num_hidden_layers=48,
            num_heads=64,
            n_groups=1,
            tie_word_embeddings=True,
        ),  # fmt: skip
        dict(vocab_size=256, hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=16, n_groups=1),
        "cache_params",
        "mamba2.modeling_mamba2",
        {
            "prefill": ("causal_conv1d_fn", "mamba2_chunk_scan"),
            "decode": ("causal_conv1d_update", "mamba2_selective_state_update"),
        },
    ),
    "Qwen3.5": Family(
        Qwen3_5TextConfig,
        dict(
            hidden_size=2048,
            intermediate_size=6144,
            num_hidden_layers=24,
            num_attention_heads=8,
            num_key_value_heads=2,
            linear_num_value_heads=16,
            max_position_embeddings=262_144,
            tie_word_embeddings=True,
        ),  # fmt: skip
        dict(
            vocab_size=256,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        ),  # fmt: skip
        "past_key_values",
        "qwen3_5.modeling_qwen3_5",
        {
            "prefill": ("causal_conv1d_fn", "torch_chunk_gated_delta_rule"),
            "decode": ("causal_conv1d_update", "torch_recurrent_gated_delta_rule"),
        },
    ),
}
"""The published sizes are those of state-spaces/mamba2-1.3b and of the text model in Qwen/Qwen3.5-2B."""
KINDS: dict[str, tuple[Partition, str | None] | None] = {
    "original": None,
    "radix 2": (Partition(), None),
    "radix 16, routed": (Partition(radix=16, finest_block=64), "gram"),
}
"""Not upgraded; the published tree, with weights from the token alone; a routed read. Each has a tree and a routing."""


def build(family: Family, device: str, layers: int | None) -> PreTrainedModel:
    """Return a bfloat16 model with random weights, the same in each call; on a CPU a tiny one."""
    torch.manual_seed(0)
    with torch.device(device):
        config = family.config(device == "cpu", layers)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def of_kind(original: PreTrainedModel, kind: str, longest: int) -> PreTrainedModel:
    """Return the original, or an upgrade of it that shares its weights and tells `longest` tokens apart."""
    upgrade = KINDS[kind]
    if upgrade is None:
        return original
    shared: dict[int, Any] = {id(p): p for p in original.parameters()}
    model = copy.deepcopy(original, shared)
    tree, routing = upgrade
    columns, radix, finest = max(2, tree.num_columns(longest)), tree.radix, tree.finest_block
    loglinear.upgrade(model, num_levels=columns, radix=radix, finest_block=finest, routing=routing)
    return model


def cache_bytes(cache: Cache) -> dict[str, int]:
    """Return the bytes of a cache: the states of linear layers, and the keys and values of full attention."""
    states = keys_values = 0
    for layer in cache.layers:
        states += getattr(layer, "nbytes", 0)  # of an upgraded layer
        parts = [getattr(layer, name, {}).values() for name in ("conv_states", "recurrent_states")]
        states += sum(x.nbytes for part in parts for x in part if x is not None)
        keys_values += sum(x.nbytes for x in (getattr(layer, n, None) for n in ("keys", "values")) if x is not None)
    return {"state_bytes": states, "key_value_bytes": keys_values}


def new_cache(model: PreTrainedModel) -> Cache:
    """Return an empty cache of transformers for a model."""
    return DynamicCache(config=model.config)


def repeat_rows(cache: Cache, rows: int) -> None:
    """Turn the cache of one sequence into that of `rows` equal ones."""
    first: Any = torch.zeros(rows, dtype=torch.long)
    for layer in cache.layers:
        if hasattr(layer, "batch_repeat_interleave"):
            layer.batch_repeat_interleave(rows)
        else:
            layer.reorder_cache(first)
