"""Groups of processes that run every case on slices, and leave the results in a folder."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from loglinear.parallel.collectives import all_gather
from tests.parallel.cases import BY_NAME, CASES, RANKS, SCORED, cases_on
from tests.parallel.models import MODELS
from tests.parallel.training import WAYS, several_processes

TIMEOUT = timedelta(seconds=60)
COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all_single", "broadcast", "send", "recv")


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Count the calls of all collectives of torch.distributed."""
    names = [name for name in COLLECTIVES if hasattr(dist, name)]
    counts, originals = dict.fromkeys(names, 0), {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def gradient_of_many_readers(rank: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Return the bfloat16 gradients of all ranks' messages: the first reader gives 1, and each other one 2^-9.

    The order in which a place is summed up depends on the place.
    """
    x = torch.ones(1000, dtype=torch.bfloat16, requires_grad=True)
    (all_gather(x, group) * (1 if rank == 0 else 2**-9)).sum().backward()
    return all_gather(x.grad, group)


def run(rank: int, ranks: int, folder: Path) -> None:
    """Run all cases as one rank; rank 0 saves the outputs, and the gradients that all ranks' parts add up to."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting_{ranks}", TIMEOUT, world_size=ranks, rank=rank)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("cp",))["cp"]
    found = {}
    for case in cases_on(ranks):
        for operator in BY_NAME.values():
            with counted() as collectives:
                results = case.sliced(operator, mesh)
            found[case.name, operator.name] = {**results, "collectives": collectives}
            for name, x in results.items():
                if name != "output":
                    dist.all_reduce(x)
    if ranks < 8:
        for name in SCORED:
            scores = CASES[name].sliced_scores(mesh)
            for x in (scores["q"], scores["k"]):
                dist.all_reduce(x)
            found[name] = scores

    found["float32 sums"] = gradient_of_many_readers(rank, mesh.get_group())

    def average(x: torch.Tensor) -> None:
        dist.all_reduce(x)
        x /= ranks

    for model in MODELS.values():
        if ranks in model.ranks:
            found[model.name] = model.sliced(mesh, average)
    for way, needed in WAYS.items():
        if ranks == needed:
            found[way] = several_processes(way)
    if rank == 0:
        torch.save(found, folder / f"{ranks}.pt")
    dist.destroy_process_group()


def forked(rank: int, ranks: int, folder: Path) -> int:
    """Return the id of a process that runs as this rank; what it prints is in a file."""
    process = os.fork()
    if process:
        return process
    try:
        with (folder / f"{ranks}_{rank}.log").open("w") as log:
            os.dup2(log.fileno(), 2)
            run(rank, ranks, folder)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def main(folder: Path) -> None:
    """Run each group of processes after the other; fork saves the imports of each."""
    for ranks in RANKS:
        processes = [forked(rank, ranks, folder) for rank in range(ranks)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        if any(codes):
            texts = (
                f"rank {rank} of {ranks}: " + (folder / f"{ranks}_{rank}.log").read_text() for rank in range(ranks)
            )
            raise SystemExit("\n".join(texts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
