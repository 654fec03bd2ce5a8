"""From a whole batch to the arguments of a model for one slice of it."""

# B batch, T time, R ranks
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from loglinear.parallel.slices import Slices
from loglinear.partition import LARGEST_CHUNK, Partition

IGNORE = -100


class Tree(Protocol):
    """The parts of a `LogLinearConfig` that decide where a sequence can be cut."""

    chunk_size: int

    @property
    def partition(self) -> Partition:
        """The partition of the past."""


def shard(
    config: Tree,
    mesh: DeviceMesh,
    input_ids: Tensor,
    labels: Tensor | None = None,
    *,
    cu_seqlens: Tensor | Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return the arguments with which a `LogLinearForCausalLM` computes this rank's slice of a batch.

    The loss of the model is the mean over the whole batch, the same on each of the R ranks. The gradient on a rank is R
    times that of its own tokens. So the mean over the ranks is the whole gradient, and DistributedDataParallel and
    fully_shard take that mean.

    Args:
        config: The configuration of the model.
        mesh: The mesh of one dimension over which a sequence is cut, as mesh["cp"].
        input_ids: [B, T], the whole batch, equal on all ranks of the mesh.
        labels: [B, T], the token ids, -100 where nothing is to be predicted. They are shifted before the cut, because
            the last token of a slice does not know the next one.
        cu_seqlens: [n + 1] integers from 0 to T: the boundaries of packed documents (B = 1).

    Returns:
        input_ids and slices; with labels also shift_labels and num_items_in_batch, the number of targets in the whole
            batch. With gradient accumulation, replace num_items_in_batch by the number in all batches of a step.

    Raises:
        ValueError: An argument does not fit; the message names it.
    """
    if not hasattr(config, "partition"):
        raise ValueError(f"config must be a LogLinearConfig, got {type(config).__name__}")
    if input_ids.dim() != 2:
        raise ValueError(f"input_ids must have shape [B, T], got {list(input_ids.shape)}")
    chunk_size = config.partition.chunk_near(config.chunk_size, LARGEST_CHUNK)
    slices = Slices.of(input_ids.shape[1], mesh, chunk_size=chunk_size, cu_seqlens=cu_seqlens)
    batch: dict[str, Any] = {"input_ids": slices.take(input_ids), "slices": slices}
    if labels is None:
        return batch
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels must have shape {list(input_ids.shape)}, got {list(labels.shape)}")
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    if slices.documents is not None:
        targets[:, [end - 1 for end in slices.documents[1:]]] = IGNORE
    own = slices.take(targets) if slices.length else targets[:, -1:]  # the padding has no target, as the last token
    return batch | {"shift_labels": own, "num_items_in_batch": (targets != IGNORE).sum().clamp(min=1)}
