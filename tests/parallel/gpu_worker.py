"""One of several GPUs that run calls of operators on slices of a sequence; rank 0 compares them with one GPU.

torchrun --nproc-per-node 2 -m tests.parallel.gpu_worker FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from loglinear.parallel import Slices
from loglinear.partition import FENWICK, Partition
from tests.ops.operators import OPERATORS, Operator, relative_error
from tests.parallel.cases import SLICED

LENGTH, COLUMNS, CHUNK = 10_000, 14, 64
CASES: dict[str, dict[str, Any]] = {
    "rows": dict(B=2),
    "packed": dict(documents=(0, 1, 700, 700, 6100, LENGTH)),
    "radix_4": dict(partition=Partition(4)),
    "radix_16": dict(partition=Partition(16, 16)),
    "few_columns": dict(columns=4),
}


def results(output: Tensor, weights: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the output and every gradient."""
    (output * weights).sum().backward()
    return {"output": output.detach(), **{name: x.grad for name, x in inputs.items() if x.grad is not None}}


def errors(
    operator: Operator,
    mesh: Any,
    *,
    B: int = 1,
    documents: tuple[int, ...] | None = None,
    partition: Partition = FENWICK,
    columns: int = COLUMNS,
) -> dict[str, dict[str, float]]:
    """Return the error of each part on slices, and that of one GPU."""
    torch.manual_seed(0)
    sizes = dict(B=B, T=LENGTH, G=1, H=2, K=64, V=64, L=columns, decay=0.05)
    given = {name: x.detach().cuda().bfloat16() for name, x in operator.inputs(**sizes).items()}
    weights = torch.randn(given["v"].shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).bfloat16()
    chunk = partition.chunk_near(CHUNK, most=CHUNK)
    common = dict(chunk_size=chunk, partition=partition)
    packed = {} if documents is None else {"cu_seqlens": torch.tensor(documents, device="cuda")}

    def leaves(dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: x.to(dtype, copy=True).requires_grad_() for name, x in given.items()}

    x = leaves(torch.float64)
    exact = results(operator(x, impl="torch", **common, **packed).output, weights, x)
    x = leaves(torch.bfloat16)
    one = results(operator(x, impl="triton", **common, **packed).output, weights, x)
    x = leaves(torch.bfloat16)
    slices = Slices.of(LENGTH, mesh, chunk_size=chunk, cu_seqlens=documents)
    local = [slices.take(part) for part in x.values()]
    output = SLICED[operator.name](*local, slices=slices, impl="triton", **common)
    sliced = results(output, slices.take(weights), x)
    sliced["output"] = slices.gather(sliced["output"])
    for name in x:
        part = sliced.get(name, torch.zeros_like(x[name])).float()
        dist.all_reduce(part)
        sliced[name] = part.bfloat16()
    return {
        name: {"slices": relative_error(sliced[name], x), "one": relative_error(one[name], x)}
        for name, x in exact.items()
    }


def main(folder: Path) -> None:
    """Join the processes of torchrun, compare every case, and leave the errors in `folder`."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    mesh = init_device_mesh("cuda", (dist.get_world_size(),), mesh_dim_names=("cp",))["cp"]
    found = {
        f"{operator.name} {name}": errors(operator, mesh, **case)
        for operator in OPERATORS
        for name, case in CASES.items()
    }
    if dist.get_rank() == 0:
        (folder / "errors.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
