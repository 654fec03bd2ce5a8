"""Torch's operators in a layer of a model that trains with impl="triton", on a driver without a device.

As a program it prints for each of `MODELS` how many operators one layer more takes, forward and backward: packed
sequences that start at 0, and at positions of their own. The interpreter must be off, because it calls torch.
"""

import json

import torch
from torch.profiler import ProfilerActivity, profile
from triton.runtime import driver

from loglinear.kernels.triton import replay
from loglinear.kernels.triton.launcher import Launcher
from loglinear.models import LogLinearConfig, LogLinearForCausalLM
from loglinear.ops import impl_triton
from tests.kernels.launches_without_device import Driver

SIZES = dict(vocab_size=32, hidden_size=32, num_heads=2, key_dim=16, head_dim=16, intermediate_size=64, impl="triton")
MODELS = {
    "scalar gate": dict(variant="mamba2"),
    "delta rule": dict(variant="gated_delta_net"),
    "routed, radix 16": dict(variant="mamba2", radix=16, finest_block=64, routing="gram", num_levels=31),
}
BATCH = dict(cu_seqlens=torch.tensor([0, 100, 517, 700, 1024]))
POSITIONS = dict(initial_position=torch.tensor([3, 1000, 64, 77]))


def operators(call):
    """A call's result, and how many operators the call takes, those inside others included."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        result = call()
    return result, sum(event.name.startswith(("aten::", "loglinear::")) for event in found.events())


def of_model(layers, options, batch):
    """The operators of a model's forward and of its backward, in its second step."""
    model = LogLinearForCausalLM(LogLinearConfig(num_hidden_layers=layers, **SIZES, **options)).train()
    ids = torch.zeros(1, 1024, dtype=torch.int64)

    def loss_of():
        return model(input_ids=ids, labels=ids, **batch).loss

    loss_of().backward()
    loss, forward = operators(loss_of)
    return forward, operators(loss.backward)[1]


def of_layer(options, batch):
    """The operators of one layer more, forward and backward."""
    few, more = (of_model(layers, options, batch) for layers in (1, 2))
    return [y - x for x, y in zip(few, more, strict=True)]


def main():
    driver.set_active(Driver())
    Launcher.start = lambda self, grid, arguments, constants: None
    replay.is_watched = lambda: True
    impl_triton._is_interpreted = lambda: True
    print(json.dumps({name: [of_layer(o, BATCH), of_layer(o, BATCH | POSITIONS)] for name, o in MODELS.items()}))


if __name__ == "__main__":
    main()
