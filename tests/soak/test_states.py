"""Tampered states and mistaken calls: each is refused in one line that names an argument, or answered exactly."""

import os
import random
import re
from collections import Counter
from fractions import Fraction

import numpy as np
import torch

from loglinear.ops import DecodeState, FenwickState, log_linear_attention_step, log_linear_delta_rule_step
from loglinear.partition import FENWICK, Partition
from tests.ops.operators import OPERATORS, relative_error
from tests.ops.test_step import take_step

CASES = 700 * int(os.environ.get("SOAK", "1"))
C, L, T, ROWS = 4, 6, 3, 2
EXACT = 1e-9
SHAPE = dict(B=ROWS, G=2, H=4, K=4, V=4, L=L)  # as many values as keys: a k may pass for a v
NAMES = re.compile(
    r"\b(state|initial_state|fenwick|inverse|position|blocks|k|v|q|log_decay|beta|level_scales|scale|active|impl|"
    r"chunk_size|cu_seqlens|l2_normalize|output_final_state)\b"
)
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [*FLOATS, torch.int8, torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.uint16]
POSITIONS = [-1, -(2**63), -7, 0, 1, 5, 10**6 + 3, 2**31, 2**32 + 7, 2**61, 2**62 - 9, 2**62, 2**63 - 1]
WRONG_TYPES = [None, "x", "line\nbreak", 3, 1.5, b"x", object(), {}, (), Ellipsis]


def tampered(random_: random.Random, x: torch.Tensor, others: list[torch.Tensor]) -> object:
    """Something else in the place of a tensor; some of it holds the same numbers."""
    dim = random_.randrange(x.dim())
    kinds = [
        lambda: random_.choice(WRONG_TYPES),
        lambda: x.tolist(),
        lambda: x.detach().numpy(),
        lambda: x.to(random_.choice(DTYPES)),
        lambda: x.to("meta"),
        lambda: x.to_sparse(),
        lambda: x.narrow(dim, 0, x.shape[dim] - 1),
        lambda: torch.cat([x, x], dim),
        lambda: x.unsqueeze(random_.randrange(x.dim() + 1)),
        lambda: x.flatten(),
        lambda: x.select(dim, 0),
        lambda: x.transpose(0, dim),
        lambda: x.narrow(dim, 0, 1).expand(x.shape),
        lambda: torch.stack([x, x], -1)[..., 0],
        lambda: x.clone(),
        lambda: random_.choice(others),
        lambda: x.clone().requires_grad_() if x.is_floating_point() else x[..., None],
        lambda: torch.nn.Parameter(x, requires_grad=x.is_floating_point()),
    ]
    return random_.choice(kinds)()


def numbers(x: object, dtype: torch.dtype = torch.float64) -> torch.Tensor | None:
    """The same numbers in memory that nothing else knows."""
    return None if x is None else torch.tensor(x.detach().to(dtype).tolist(), dtype=dtype)


def plain(state: object) -> FenwickState | None:
    """The same numbers in a state of plain memory; None of what has no numbers."""
    parts = list(state[:6]) if isinstance(state, FenwickState) else [None]
    if any(x is not None and (not isinstance(x, torch.Tensor) or x.is_sparse or x.is_meta) for x in parts):
        return None
    if any(x is None for x in parts[:-1]) or parts == [None]:
        return None
    if not isinstance(state.partition, Partition | None):
        return None
    return FenwickState(numbers(state.position, torch.int64), *map(numbers, state[1:6]), state.partition)


def precision(*tensors: object) -> float:
    """Results are rounded to the dtypes of what was given."""
    coarsest = max(torch.finfo(x.dtype).eps for x in tensors if isinstance(x, torch.Tensor) and x.is_floating_point())
    return max(EXACT, 100 * coarsest) if coarsest > 1e-15 else EXACT


def outcome(call, expected, close: float = EXACT) -> str:
    """`call` gives tensors that must be those of `expected`, or raises; both are functions."""
    try:
        actual = call()
    except (ValueError, TypeError) as error:
        text = str(error)
        assert "\n" not in text and len(text) < 300 and NAMES.search(text), text
        return "refused"
    for a, e in zip(actual, expected(), strict=True):
        assert a.shape == e.shape and relative_error(a, e) < close
    return "answered"


def seeded(case: int) -> random.Random:
    torch.manual_seed(case)
    random.seed(case)
    return random.Random(case)


def detached(inputs):
    return {name: x.detach() for name, x in inputs.items()}


def some_state(operator, levels=L, chunk_size=C, **shape) -> FenwickState:
    inputs = operator.inputs(T=random.randrange(1, 30), **SHAPE | dict(L=levels) | shape)
    return operator(inputs, chunk_size=chunk_size, output_final_state=True).final_state.detach()


def tampered_state(random_: random.Random, operator) -> object:
    state = some_state(operator)
    kind = random_.randrange(10)
    if kind == 0:
        other = [
            dict(chunk_size=8),
            dict(levels=9),
            dict(levels=1),
            dict(H=2),
            dict(K=3),
            dict(V=2),
            dict(B=1),
            dict(G=1),
        ]
        mixed = some_state(operator, **random_.choice(other))
        names = random_.sample(FenwickState._fields, random_.randrange(1, 7))
        return state._replace(**{name: getattr(mixed, name) for name in names})
    if kind == 1:
        family = next(one for one in OPERATORS if one is not operator)
        return random_.choice([some_state(family), tuple(state), state._asdict(), list(state), DecodeState.of(state)])
    if kind in (2, 3):
        position = [random_.choice(POSITIONS) for _ in range(ROWS)]
        return state._replace(position=torch.tensor(position))
    if kind == 4:
        return state._replace(partition=random_.choice([FENWICK, Partition(4), Partition(16), Partition(2, 4), 4]))
    name = random_.choice([name for name, part in state._asdict().items() if part is not None])
    others = [part for part in state if part is not None]
    return state._replace(**{name: tampered(random_, getattr(state, name), others)})


def state_case(random_: random.Random, operator):
    """A call with a tampered state, and what it must give if it gives anything."""
    state, token = tampered_state(random_, operator), detached(operator.inputs(T=T, **SHAPE))
    honest = plain(state)

    def whole(state, impl, chunk_size=C, partition=FENWICK):
        options = dict(chunk_size=chunk_size, partition=partition, output_final_state=True, impl=impl)
        output, final = operator(token, initial_state=state, **options)
        return [output, *final.tensors[1:-1]]

    def stepped(decode):
        steps = [take_step(operator, {name: x[:, t : t + 1] for name, x in token.items()}, decode) for t in range(T)]
        return [torch.stack(steps, 1)]

    def owned():
        inverse = DecodeState.of(some_state(OPERATORS[1]) if honest is None else honest).inverse
        return DecodeState(state, None if getattr(state, "beta", None) is None else inverse)

    calls = [
        lambda: whole(state, "torch"),
        lambda: whole(state, "reference"),
        lambda: stepped(DecodeState.of(state)),
        lambda: stepped(DecodeState.of(some_state(operator)).copy_(state)),
        lambda: stepped(owned()),
    ]
    use = random_.randrange(len(calls))

    def expected():
        partition = honest.partition or FENWICK
        return whole(honest, "reference", honest.chunk_size, partition)[: None if use < 2 else 1]

    return calls[use], expected


def test_states(record_property):
    counts: Counter[str] = Counter()
    for case in range(CASES):
        counts[outcome(*state_case(seeded(case), OPERATORS[case % 2]))] += 1
    assert counts["refused"] > CASES / 3 and counts["answered"] > CASES / 10
    text = f"{CASES} tampered states: {counts['refused']} refused in one line, {counts['answered']} answered exactly"
    record_property("soak", text)


SCALARS = [
    None, True, False, 0, 1, -1, 2, 3, 4, 64, 2**40, 4.0, 0.5, -2.0, 1e30, float("nan"), float("inf"), 10**400, "4",
    "auto", "torch", "reference", "triton", "a\nb", b"4", [4], (4,), {}, 1j, Fraction(1, 2), np.int64(4), np.int8(2),
    np.uint8(4), np.float32(0.5), np.float64("nan"), np.bool_(True), np.array(4), np.array([4, 4]), torch.tensor(4),
    torch.tensor(True), torch.tensor([1, 2]), object(), object, lambda: 4,
]  # fmt: skip
SEQUENCES = [
    [0, ROWS], [0, T], [0, 1, T], [0, 0, T], [1, T], [0, T + 1], [0, 2, 1, T], [-1, T], [0], [], [[0, T]],
    [0, 2**40, T],
]  # fmt: skip


def mistaken_value(random_: random.Random, name: str) -> object:
    if name in ("cu_seqlens", "active") and random_.random() < 0.7:
        values = torch.tensor(random_.choice(SEQUENCES))
        if name == "active":
            values = torch.tensor([random_.random() < 0.5 for _ in range(ROWS)])
        return random_.choice([values, values.to(random_.choice(DTYPES)), values.to("meta"), values.tolist()])
    return random_.choice(SCALARS)


def operator_case(random_: random.Random, operator):
    """A call of an operator with one mistaken argument, and what it must give if it gives anything."""
    inputs, given = detached(operator.inputs(T=T, **SHAPE | dict(B=1))), {}
    options = ["scale", "impl", "chunk_size", "cu_seqlens", "output_final_state", "initial_state"]
    name = random_.choice([*inputs, *options, *(["l2_normalize"] if operator.delta else [])])
    if name in inputs:
        inputs[name] = tampered(random_, inputs[name], list(inputs.values()))
    else:
        given = {name: mistaken_value(random_, name)}

    def expected():
        options = {key: value for key, value in given.items() if key in ("scale", "l2_normalize")}
        if given.get("cu_seqlens") is not None:
            options["cu_seqlens"] = torch.tensor(given["cu_seqlens"].tolist())
        options |= {key: float(value) for key, value in options.items() if key == "scale"}
        return [operator({key: numbers(x) for key, x in inputs.items()}, impl="reference", **options).output]

    return lambda: list(operator(inputs, **dict(chunk_size=C) | given)[:1]), expected, precision(*inputs.values())


def step_case(random_: random.Random, operator):
    """The same of a step."""
    tokens, given = {name: x.detach()[:, 0] for name, x in operator.inputs(T=1, **SHAPE).items()}, {}
    name = random_.choice([*tokens, "scale", "impl", "active", *(["l2_normalize"] if operator.delta else [])])
    if name in tokens:
        tokens[name] = tampered(random_, tokens[name], list(tokens.values()))
    else:
        given = {name: mistaken_value(random_, name)}
    state = DecodeState.of(some_state(operator))
    start = plain(state.fenwick)
    function = log_linear_delta_rule_step if operator.delta else log_linear_attention_step

    def expected():
        sequence = {key: None if x is None else numbers(x)[:, None] for key, x in tokens.items()}
        options = {key: value for key, value in given.items() if key in ("scale", "l2_normalize")}
        options |= {key: float(value) for key, value in options.items() if key == "scale"}
        output = operator(sequence, chunk_size=C, impl="reference", initial_state=start, **options).output[:, 0]
        active = given.get("active")
        return [output if active is None else output * active.double()[:, None, None]]

    return lambda: [function(*tokens.values(), state, **given)], expected, precision(*tokens.values())


def test_calls(record_property):
    counts: Counter[str] = Counter()
    for case in range(CASES):
        make = operator_case if case % 4 < 2 else step_case
        counts[outcome(*make(seeded(case), OPERATORS[case % 2]))] += 1
    assert counts["refused"] > CASES / 3 and counts["answered"] > CASES / 10
    text = f"{CASES} mistaken calls: {counts['refused']} refused in one line, {counts['answered']} answered exactly"
    record_property("soak", text)
