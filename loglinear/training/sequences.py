"""Training in which several processes share each sequence (context parallelism)."""

from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import Dataset

from loglinear import parallel
from loglinear.processes import world_size
from loglinear.recipes import TrainingRecipe
from loglinear.runs.checkpoints import resolve
from loglinear.runs.upgraded import is_upgraded


class Repeated(Dataset):
    """The items of a dataset, each `times` in turn.

    Process p of N reads the items p, p + N, ... So `times` consecutive processes read the same item in each step.
    """

    def __init__(self, items: Any, times: int) -> None:
        self.items, self.times = items, times

    def __len__(self) -> int:
        return self.times * len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index // self.times]


def sequence_groups(processes: int) -> int:
    """Return the number of groups of so many processes, which share their sequences. Raises ValueError for a rest."""
    if processes < 1 or world_size() % processes:
        raise ValueError(f"context_parallel must divide the number of processes, got {processes} and {world_size()}")
    return world_size() // processes


def sequence_mesh(processes: int, device: str) -> DeviceMesh:
    """Return the mesh of the consecutive processes that share their sequences with this one."""
    return init_device_mesh(device, (sequence_groups(processes), processes), mesh_dim_names=("dp", "cp"))["cp"]


def require_sliceable(recipe: TrainingRecipe, *, equal_rows: bool) -> None:
    """Raise ValueError unless the sequences of a recipe can be cut into slices."""
    if recipe.start is not None and is_upgraded(resolve(recipe.start)):
        raise ValueError("context_parallel needs a model of this library, and this run starts from an upgraded one")
    if recipe.jitter is not None:
        raise ValueError("context_parallel needs sequences that start at position 0: leave jitter out")
    if equal_rows:
        raise ValueError("context_parallel needs packed rows: leave equal_rows out")


def own_slice(config: Any, mesh: DeviceMesh, batch: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the model for this process's slice of a row of packed documents."""
    whole = {name: batch[name] for name in ("input_ids", "labels", "cu_seqlens")}
    return {name: value for name, value in batch.items() if name not in whole} | parallel.shard(config, mesh, **whole)
