"""Run the tests as other machines would: with other vector instructions, other BLAS kernels, one thread and two.

    python -m tests.machines                     the numeric tests on every combination
    python -m tests.machines --whole -n 2        the whole suite on a few, in which every value of every axis occurs
    python -m tests.machines tests/ops -x        any arguments of pytest; paths stand for the numeric tests

A product's rounding depends on three things that a processor decides: torch's own loops on ATEN_CPU_CAPABILITY, numpy's
products (Triton's interpreter multiplies with them) on OPENBLAS_CORETYPE, sums of both on the number of threads. They
meet in the numeric tests alone, where torch checks the interpreter; these run on every combination. The other tests
use one of them at a time, so that for the whole suite it is enough that each value occurs. MKL, which multiplies for
torch, chooses by itself.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import time

AXES = {
    "ATEN_CPU_CAPABILITY": ["default", "avx2", "avx512"],
    "OPENBLAS_CORETYPE": ["Haswell", "SkylakeX", "Zen", None],  # None: OpenBLAS chooses by the processor
    "OMP_NUM_THREADS": ["1", "2"],
}
NEEDS = {"avx2": "AVX2", "avx512": "AVX512", "Haswell": "AVX2", "SkylakeX": "AVX512", "Zen": "AVX2"}
CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]
NUMERIC = ["tests/kernels", "tests/ops/test_step.py"]

Machine = tuple[str | None, ...]


def every_combination() -> list[Machine]:
    return list(itertools.product(*AXES.values()))


def covering() -> list[Machine]:
    """As many machines as the longest axis has values; the shorter axes begin again."""
    rows = max(len(values) for values in AXES.values())
    return [tuple(values[row % len(values)] for values in AXES.values()) for row in range(rows)]


def capability() -> str:
    """The best vector instructions that torch finds in this processor."""
    os.environ.pop("ATEN_CPU_CAPABILITY", None)
    import torch

    return torch.backends.cpu.get_cpu_capability()


def missing(machine: Machine, best: str) -> str | None:
    """Why this processor cannot be that machine."""
    has = CAPABILITIES[: CAPABILITIES.index(best) + 1] if best in CAPABILITIES else []
    needs = sorted({NEEDS[value] for value in machine if value in NEEDS} - set(has))
    return f"skipped: this processor has no {' and no '.join(needs)}" if needs else None


def environment(machine: Machine) -> dict[str, str]:
    others = {name: value for name, value in os.environ.items() if not name.startswith(("ATEN_", "OPENBLAS_"))}
    return others | {name: value for name, value in zip(AXES, machine, strict=True) if value is not None}


def run(machine: Machine, arguments: list[str]) -> tuple[bool, str, list[str]]:
    """Passed or not, the outcome in words, the lines that name what failed."""
    command = [sys.executable, "-m", "pytest", "--tb=no", "-rfE", "-W", "ignore", *arguments]
    began = time.monotonic()
    done = subprocess.run(command, env=environment(machine), capture_output=True, text=True)
    lines = done.stdout.splitlines() or done.stderr.splitlines() or [""]
    counts = re.findall(r"\d+ (?:passed|failed|errors?)", lines[-1])
    outcome = ", ".join(counts) or f"pytest ended with {done.returncode} and no counts: {lines[-1]}"
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 0, f"{outcome} in {time.monotonic() - began:.0f} s", failed


def main(arguments: list[str]) -> int:
    whole = "--whole" in arguments
    arguments = [argument for argument in arguments if argument != "--whole"]
    has_paths = any(os.path.exists(argument.split("::")[0]) for argument in arguments)
    paths = [] if whole or has_paths else NUMERIC
    best, all_passed = capability(), True
    print("".join(f"{name:<21}" for name in AXES) + "outcome", flush=True)
    for machine in covering() if whole else every_combination():
        passed, outcome, failed = True, missing(machine, best), []
        if outcome is None:
            passed, outcome, failed = run(machine, paths + arguments)
        print("".join(f"{value or 'unset':<21}" for value in machine) + outcome, *failed, sep="\n    ", flush=True)
        all_passed &= passed
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
