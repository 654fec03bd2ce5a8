"""bfloat16 and tf32 in Triton's interpreter as on a GPU, and the errors that this rounding makes in the kernels.

TRITON_INTERPRET=1 python -m tests.kernels.emulation          (a quarter of an hour; prints the tables of emulated.py)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

from loglinear.ops import FenwickState, impl_triton
from loglinear.partition import FENWICK, Partition
from tests.kernels.emulated import KEYS
from tests.kernels.interpreter import teach_haste
from tests.ops.operators import OPERATORS, Operator, excess, gradients, parts, random_loss, relative_error

STATE_HEADS = [(1, 2, 64, 64), (1, 2, 128, 64)]
HEADS = [(1, 4, 128, 64), (4, 4, 128, 128), (2, 4, 64, 64), (1, 2, 80, 48)]
WIDE = [(2, 2, 256, 256)]  # where tf32's error is largest: it cuts digits off, which adds up


def operator_of(inputs: dict[str, Tensor]) -> Operator:
    """The delta rule's inputs have beta, a diagonal gate has a decay for each channel."""
    return OPERATORS[("beta" in inputs) + 2 * (inputs["log_decay"].dim() == 4)]


def make(B, T, G, H, K, V, L, dtype, *, seed=0, device="cuda", float32_scales=False, delta=False, diagonal=False):
    """Heads from one that never forgets to one that forgets within ten tokens; lambdas over three orders of magnitude,
    in float32 as the layers make them or in the others' dtype."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape):
        return torch.randn(B, T, *shape, generator=generator, device=device)

    def uniform(*shape):
        return torch.rand(B, T, *shape, generator=generator, device=device)

    rate = torch.logspace(-5, -0.5, H, device=device) * (torch.arange(H, device=device) > 0)
    inputs = {
        "q": normal(G, K) / K**0.5,
        "k": torch.nn.functional.normalize(normal(G, K), dim=-1),
        "v": normal(H, V),
        "log_decay": -rate[:, None] * uniform(H, K) * 2 if diagonal else -rate * uniform(H) * 2,
        **({"beta": 1.9 * uniform(H)} if delta else {}),
        "level_scales": 10 ** (3 * uniform(H, L) - 2),
    }
    kept = {"log_decay", "level_scales"} if float32_scales else {"log_decay"}
    return {n: (x if n in kept else x.to(dtype)).requires_grad_() for n, x in inputs.items()}


def repeat_keys(inputs: dict[str, Tensor], keys: str, decay: float) -> dict[str, Tensor]:
    """The same with "one" key all the time, "eight" in turn, or 64 "orthogonal" ones, and beta near 1: nearly all of
    what a key has written is erased when it comes again."""
    k, T = inputs["k"], inputs["k"].shape[1]
    few = torch.randn(8, k.shape[3], generator=torch.Generator().manual_seed(3))
    few = torch.eye(k.shape[3]) if keys == "orthogonal" else torch.nn.functional.normalize(few, dim=-1)
    number = torch.arange(T) % {"one": 1, "eight": 8, "orthogonal": 64}[keys]
    with torch.no_grad():
        k.copy_(few[number][None, :, None, :])
        inputs["beta"].mul_(0.01).add_(0.98)
        inputs["log_decay"].mul_(decay)
    return inputs


def flows(inputs: dict[str, Tensor], dq: Tensor, dk: Tensor) -> float:
    """The size of what the decay's gradient is the difference of."""
    q, k = inputs["q"].detach(), inputs["k"].detach()
    return float((q * dq).sum(-1).norm() + (k * dk).sum(-1).norm())


def teach_rounding(setattr_=setattr):
    """The interpreter multiplies bfloat16's bits as integers and rounds towards zero: it is taught the product of the
    numbers, and rounding to the nearest. Its tf32 products are float32's: it is taught to drop 13 bits of the factors.
    """
    from triton import language as tl
    from triton._C.libtriton.ir import INPUT_PRECISION
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    multiply, cast = builder.create_dot, builder.cast_impl

    def to_float32(x):
        if x.data.dtype != numpy.uint16:
            return x
        bits = x.data.astype(numpy.uint32) << 16
        return interpreter.TensorHandle(bits.view(numpy.float32), tl.float32)

    def cast_impl(self, source, dtype):
        kinds = source.dtype.scalar, dtype.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return to_float32(source)
        if kinds == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(numpy.ascontiguousarray(source.data)).bfloat16()
            return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, source, dtype)

    def to_tf32(x):
        bits = numpy.ascontiguousarray(x.data).view(numpy.uint32) & numpy.uint32(0xFFFFE000)
        return interpreter.TensorHandle(bits.view(numpy.float32), tl.float32)

    def create_dot(self, a, b, c, precision, *rest):
        if a.data.dtype == numpy.float32 and precision == INPUT_PRECISION.TF32:
            a, b = to_tf32(a), to_tf32(b)
        return multiply(self, to_float32(a), to_float32(b), c, precision, *rest)

    setattr_(builder, "create_dot", create_dot)
    setattr_(builder, "cast_impl", cast_impl)


def run_chunks(inputs: dict[str, Tensor], chunk_size: int, partition: Partition = FENWICK) -> Tensor:
    """The kernels' output with chunks of that many tokens; 0: as the plans say."""
    from loglinear.kernels.triton import chunkwise

    x = {"beta": None} | inputs
    tensors = (x[name] for name in OPERATORS[1].names)
    return chunkwise(*tensors, None, None, None, 1.0, chunk_size, False, partition.numbers)[0]


def result_names(inputs: dict[str, Tensor]) -> list[str]:
    return ["output", *(f"gradient of {name}" for name in inputs)]


def differentiate(inputs: dict[str, Tensor], function: Callable[[dict[str, Tensor]], Tensor], weight=None):
    """The output and every gradient, and the weight of the loss."""
    output = function(inputs)
    weight = torch.randn_like(output) if weight is None else weight.to(output.dtype)
    return [output, *torch.autograd.grad(output, list(inputs.values()), weight)], weight


def errors(
    inputs: dict[str, Tensor], chunk_size: int = 0, by_flows: bool = False, partition: Partition = FENWICK
) -> dict[str, float]:
    """Errors of the output and of every gradient, against float64 from the same inputs; by_flows: the decay's as a
    share of `flows` where that is more than its own size."""
    doubles = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    actual, weight = differentiate(inputs, lambda x: run_chunks(x, chunk_size, partition))
    exact, _ = differentiate(doubles, lambda x: operator_of(x)(x, impl="torch", partition=partition).output, weight)
    pairs = zip(result_names(inputs), actual, exact, strict=True)
    found = {name: relative_error(a, e) for name, a, e in pairs}
    if by_flows:
        own = float(exact[4].norm())
        found["gradient of log_decay"] *= own / max(own, flows(doubles, *exact[1:3]))
    return found


def excesses(
    inputs: dict[str, Tensor],
    chunk_size: int = 0,
    clean: dict[str, Tensor] | None = None,
    partition: Partition = FENWICK,
):
    """`excess` over impl="torch" in the same dtype of the output and of every gradient by name; the decay's as by_flows
    in `errors`. clean: what the others compute with, if not with the same inputs."""
    clean = inputs if clean is None else clean
    doubles = {n: x.detach().double().requires_grad_() for n, x in clean.items()}

    def in_torch(x):
        return operator_of(x)(x, impl="torch", chunk_size=chunk_size or 64, partition=partition).output

    actual, weight = differentiate(inputs, lambda x: run_chunks(x, chunk_size, partition))
    twin, exact = (differentiate(x, in_torch, weight)[0] for x in (clean, doubles))
    sizes = {"gradient of log_decay": flows(doubles, *exact[1:3])}
    results = zip(result_names(inputs), actual, twin, exact, strict=True)
    return {name: excess(a, t, e, sizes.get(name, 0.0)) for name, a, t, e in results}


def tokens_before(chunk_size: int) -> int:
    """Tokens of a state that leaves whole chunks and raw tokens."""
    return 3 * chunk_size + 5


def leaf_state(state: FenwickState | None, dtype: torch.dtype = torch.float32) -> FenwickState | None:
    if state is None:
        return None
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in parts(state).items()}
    return state._replace(**leaves)


def measure(
    inputs: dict[str, Tensor],
    *,
    initial_state: FenwickState | None = None,
    final: bool = False,
    by_flows: bool = False,
    before: Callable[[], None] = lambda: None,
    **options: Any,
) -> dict[str, float]:
    """`errors` of impl="triton", with states: theirs and their parts' gradients too. before: runs before each
    direction."""
    operator = operator_of(inputs)

    def run(x, state, impl):
        leaves = list(x.values()) + ([] if state is None else list(parts(state).values()))
        out = operator(x, impl=impl, initial_state=state, output_final_state=final, **options)
        return [out.output] + ([out.final_state.blocks] if final else []), leaves

    doubles = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    exact, leaves_64 = run(doubles, leaf_state(initial_state, torch.float64), "torch")
    output_weight, *weights = random_loss(*exact)
    weights = (output_weight.to(inputs["v"].dtype).double(), *weights)
    before()
    results, leaves = run(inputs, leaf_state(initial_state), "triton")
    measured = {n: relative_error(a, e) for n, a, e in zip(["output", "blocks"], results, exact, strict=False)}
    before()
    grads = gradients(results, tuple(w.to(r.dtype) for w, r in zip(weights, results, strict=True)), leaves)
    exact_grads = gradients(exact, weights, leaves_64)
    names = operator.names + ([] if initial_state is None else [f"state's {n}" for n in parts(initial_state)])
    flow = float(exact_grads[3].norm())
    if by_flows:
        flow = max(flow, flows(doubles, *exact_grads[:2]))
    for name, a, e in zip(names, grads, exact_grads, strict=True):
        if name == "state's blocks":
            # A block that the position has no digit for is 0 by contract, and has no gradient. The others are not 0 in
            # the head that never forgets; in one that does, an old block may be smaller than float32's numbers.
            e = torch.where((initial_state.blocks != 0).any(dim=(2, 3, 4), keepdim=True), e, 0.0)
        error, size = float((a.double() - e).norm()), float(e.norm())
        size = max(size, flow) if "log_decay" in name else size
        measured[f"gradient of {name}"] = error / size if size else error
    return measured


def largest(all_found: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(f"{max(found[name] for found in all_found):.2e}") for name in all_found[0]}


if __name__ == "__main__":
    teach_rounding()
    teach_haste()
    impl_triton.unsupported = lambda problem: None  # bfloat16, now that the interpreter can multiply it
    options = dict(device="cpu", delta=True)
    for chunk_size in (16, 32, 64, 128):
        runs = []
        for heads in STATE_HEADS:
            for seed in range(4):
                torch.manual_seed(seed)
                first = make(1, tokens_before(chunk_size), *heads, 9, torch.bfloat16, seed=2 * seed + 1, **options)
                state = OPERATORS[1](first, impl="triton", chunk_size=chunk_size, output_final_state=True).final_state
                inputs = make(1, 700, *heads, 9, torch.bfloat16, seed=2 * seed, **options)
                runs.append(measure(inputs, initial_state=state, final=True, chunk_size=chunk_size))
        print("states", chunk_size, largest(runs), flush=True)
    for keys in KEYS:
        torch.manual_seed(0)
        for diagonal in (False, True):
            inputs = (make(1, 700, 2, 2, 64, 64, 14, torch.bfloat16, diagonal=diagonal, **options) for _ in range(2))
            runs = [repeat_keys(x, keys, decay) for x, decay in zip(inputs, (0.0, 1.0), strict=True)]
            print(keys, "diagonal" * diagonal, largest([errors(x, by_flows=True) for x in runs]), flush=True)
    for operator in OPERATORS:
        for dtype in (torch.bfloat16, torch.float16):
            all_found = []
            for heads in HEADS + (WIDE if dtype == torch.float16 else []):
                for seed in range(1 if heads in WIDE or operator.diagonal else 4):
                    torch.manual_seed(seed)
                    options = dict(seed=seed, device="cpu", float32_scales=seed % 2 == 1, delta=operator.delta)
                    all_found.append(errors(make(1, 1111, *heads, 12, dtype, diagonal=operator.diagonal, **options)))
                    print(operator.name, dtype, heads, all_found[-1], flush=True)
            print(operator.name, dtype, largest(all_found), flush=True)
