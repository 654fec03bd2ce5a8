"""Random calls of both operators by impl="torch": every number that comes back is the float64 recurrence's."""

import os
import random

import torch

from tests.ops.operators import OPERATORS, excess, gradients, parts, random_loss

CASES = 800 * int(os.environ.get("SOAK", "1"))
EXACT = 1e-11  # the error in float64
FACTOR = 16  # the error in float32, over that of the float32 recurrence: tensors of few numbers may be near by chance


def draw_lengths(rng, rows):
    """Some sequences are empty, not all; long ones cross chunks and merges."""
    lengths = [rng.choice([0, 1, rng.randint(2, 9), rng.randint(10, 60)]) for _ in range(rows)]
    return lengths if sum(lengths) else [*lengths[1:], 1]


def draw_case(seed):
    """An operator, two pieces of sequences of which the second continues the first, and the options of both calls."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    operator, is_packed = rng.choice(OPERATORS), rng.random() < 0.5
    rows, groups = rng.randint(1, 3), rng.choice([1, 2, 3])
    sizes = dict(G=groups, H=groups * rng.choice([1, 2]), K=rng.randint(1, 9), V=rng.randint(1, 9))
    sizes |= dict(L=rng.choice([1, 2, 3, 5, 8, 12, 40]), decay=rng.choice([0.0, 0.3, 0.3, 4.0, 90.0]))
    options = dict(chunk_size=rng.choice([1, 2, 4, 8, 16, 32]), scale=rng.choice([1.0, -0.3]))
    if operator.delta and rng.random() < 0.3:
        options["l2_normalize"] = True
    pieces = []
    for _ in range(rng.choice([1, 2])):
        lengths = draw_lengths(rng, rows)
        B, T = (1, sum(lengths)) if is_packed else (rows, max(lengths))
        ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]) if is_packed else None
        inputs = {name: x.detach() for name, x in operator.inputs(B=B, T=T, **sizes).items()}
        pieces.append((inputs, ends))
    if rng.random() < 0.1:
        for inputs, _ in pieces:
            inputs["log_decay"][torch.rand_like(inputs["log_decay"]) < 0.2] = -torch.inf
    return operator, pieces, options, rng.choice([torch.float64, torch.float32])


def results(operator, pieces, options, impl, dtype, weights=None):
    """Outputs, final state and every gradient by name, and the weights of the loss."""
    state, tensors, leaves = None, {}, {}
    for number, (inputs, ends) in enumerate(pieces):
        x = {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}
        leaves |= {f"gradient of {name} {number}": leaf for name, leaf in x.items()}
        options |= dict(cu_seqlens=ends, initial_state=state, output_final_state=True, impl=impl)
        tensors[f"output {number}"], state = operator(x, **options)
    tensors |= parts(state)
    weights = weights or random_loss(*tensors.values())
    grads = gradients(list(tensors.values()), tuple(w.to(dtype) for w in weights), list(leaves.values()))
    found = {name: x.detach() for name, x in (tensors | dict(zip(leaves, grads, strict=True))).items()}
    return found | {"position": state.position}, weights


def check(seed):
    operator, pieces, options, dtype = draw_case(seed)
    pieces = [({name: x.to(dtype) for name, x in inputs.items()}, ends) for inputs, ends in pieces]
    exact, weights = results(operator, pieces, options, "reference", torch.float64)
    actual, _ = results(operator, pieces, options, "torch", dtype, weights)
    assert torch.equal(actual.pop("position"), exact.pop("position")), seed
    twin = exact if dtype == torch.float64 else results(operator, pieces, options, "reference", dtype, weights)[0]
    largest = max(float(e.norm()) for e in exact.values())
    for name, e in exact.items():
        # A decay's gradient is the difference of two sums, and so is one through a normalization: they may cancel.
        cancels = ("log_decay", "q", "k") if options.get("l2_normalize") else ("log_decay",)
        size = largest if name.startswith(tuple(f"gradient of {x} " for x in cancels)) else 0.0
        assert actual[name].shape == e.shape and actual[name].dtype == dtype, (seed, name)
        if dtype == torch.float64:
            assert float((actual[name] - e).norm()) <= EXACT * max(size, float(e.norm())), (seed, name)
        else:
            assert excess(actual[name], twin[name], e, size) <= FACTOR, (seed, name)
    return dtype, len(exact)


def test_random_calls_are_the_recurrence_with_every_gradient(record_property):
    checked = [check(seed) for seed in range(CASES)]
    counts = {dtype: sum(kind == dtype for kind, _ in checked) for dtype in (torch.float64, torch.float32)}
    tensors = sum(number for _, number in checked)
    text = f"{CASES} random operator calls: {tensors} outputs, states and gradients equal the float64 recurrence's"
    record_property("soak", f"{text} ({counts[torch.float64]} calls in float64, {counts[torch.float32]} in float32)")
