"""bfloat16 and tf32 in Triton's interpreter as on a GPU, and the errors that this rounding makes in the kernels.

TRITON_INTERPRET=1 python -m tests.kernels.emulation          (a few minutes; prints EMULATED below)
"""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

from tests.ops.operators import OPERATORS, Operator, relative_error

# The largest of ||x - float64|| / ||float64|| over the head dims below and four seeds, T = 1,111, 12 levels, inputs as
# on the GPU.
EMULATED = {
    "scalar_gate": {
        torch.bfloat16: {
            "output": 2.96e-3,
            "gradient of q": 3.34e-3,
            "gradient of k": 3.39e-3,
            "gradient of v": 3.3e-3,
            "gradient of log_decay": 5.75e-3,
            "gradient of level_scales": 2.95e-3,
        },
        torch.float16: {
            "output": 1.04e-3,
            "gradient of q": 1.69e-3,
            "gradient of k": 1.31e-3,
            "gradient of v": 1.14e-3,
            "gradient of log_decay": 1.69e-3,
            "gradient of level_scales": 1.02e-3,
        },
    },
    "delta_rule": {
        torch.bfloat16: {
            "output": 6.4e-3,
            "gradient of q": 6.84e-3,
            "gradient of k": 9.04e-3,
            "gradient of v": 6.84e-3,
            "gradient of log_decay": 1.04e-2,
            "gradient of beta": 8.82e-3,
            "gradient of level_scales": 6.88e-3,
        },
        torch.float16: {
            "output": 3.67e-3,
            "gradient of q": 3.44e-3,
            "gradient of k": 5.48e-3,
            "gradient of v": 4.0e-3,
            "gradient of log_decay": 6.25e-3,
            "gradient of beta": 5.19e-3,
            "gradient of level_scales": 3.33e-3,
        },
    },
}
# The same of the delta rule in bfloat16 where keys come again (`repeat_keys`, T = 700), the decay's as a share of
# `flows` where they are larger.
KEYS = {
    "one": {
        "output": 5.31e-3,
        "gradient of q": 1.69e-2,
        "gradient of k": 4.38e-3,
        "gradient of v": 9.38e-3,
        "gradient of log_decay": 3.49e-2,
        "gradient of beta": 1.62e-2,
        "gradient of level_scales": 7.15e-3,
    },
    "eight": {
        "output": 6.25e-3,
        "gradient of q": 1.0e-2,
        "gradient of k": 5.37e-3,
        "gradient of v": 1.02e-2,
        "gradient of log_decay": 3.76e-2,
        "gradient of beta": 1.19e-2,
        "gradient of level_scales": 8.16e-3,
    },
    "orthogonal": {
        "output": 2.98e-3,
        "gradient of q": 3.17e-3,
        "gradient of k": 4.04e-3,
        "gradient of v": 2.48e-3,
        "gradient of log_decay": 3.51e-3,
        "gradient of beta": 2.83e-3,
        "gradient of level_scales": 2.31e-3,
    },
}
# The same where a state prescribes the chunks: those of 16 tokens merge most often (T = 777, 12 levels), and the blocks
# of a final state are read by themselves. The beta of a few raw tokens, as few numbers, varies from seed to seed.
STATES = {
    "output": 7.16e-3,
    "blocks": 7.6e-3,
    "gradient of log_decay": 1.25e-2,
    "gradient of state's beta": 1.56e-2,
}
HEADS = [(1, 4, 128, 64), (4, 4, 128, 128), (2, 4, 64, 64), (1, 2, 80, 48)]
WIDE = [(2, 2, 256, 256)]  # where tf32's error is largest: it cuts digits off, which adds up


def operator_of(inputs: dict[str, Tensor]) -> Operator:
    """The delta rule's inputs have beta."""
    return OPERATORS["beta" in inputs]


def make(B, T, G, H, K, V, L, dtype, *, seed=0, device="cuda", float32_scales=False, delta=False):
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
        "log_decay": -rate * uniform(H) * 2,
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
    return float((inputs["q"] * dq).sum(-1).norm() + (inputs["k"] * dk).sum(-1).norm())


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


def run_chunks(inputs: dict[str, Tensor], chunk_size: int) -> Tensor:
    """The kernels' output with chunks of that many tokens; 0: as the plans say."""
    from loglinear.kernels.triton import chunkwise

    x = {"beta": None} | inputs
    tensors = (x[name] for name in OPERATORS[1].names)
    return chunkwise(*tensors, None, None, None, 1.0, chunk_size, False)[0]


def result_names(inputs: dict[str, Tensor]) -> list[str]:
    return ["output", *(f"gradient of {name}" for name in inputs)]


def errors(inputs: dict[str, Tensor], chunk_size: int = 0, by_flows: bool = False) -> dict[str, float]:
    """Of the output and of every gradient, against float64 from the same inputs; by_flows: the decay's as a share of
    `flows` where that is more than its own size."""
    exact = {n: x.detach().double().requires_grad_() for n, x in inputs.items()}
    output = run_chunks(inputs, chunk_size)
    expected = operator_of(inputs)(exact, impl="torch").output
    weight = torch.randn_like(output)
    grads = torch.autograd.grad(output, list(inputs.values()), weight)
    exact_grads = torch.autograd.grad(expected, list(exact.values()), weight.double())
    pairs = zip([output, *grads], [expected, *exact_grads], strict=True)
    found = {name: relative_error(a, e) for name, (a, e) in zip(result_names(inputs), pairs, strict=True)}
    if by_flows:
        own = float(exact_grads[3].norm())
        found["gradient of log_decay"] *= own / max(own, flows(exact, *exact_grads[:2]))
    return found


def largest(all_found: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(f"{max(found[name] for found in all_found):.2e}") for name in all_found[0]}


if __name__ == "__main__":
    teach_rounding()
    options = dict(device="cpu", delta=True)
    for keys in KEYS:
        torch.manual_seed(0)
        runs = [repeat_keys(make(1, 700, 2, 2, 64, 64, 14, torch.bfloat16, **options), keys, x) for x in (0.0, 1.0)]
        print(keys, largest([errors(inputs, by_flows=True) for inputs in runs]), flush=True)
    for operator in OPERATORS:
        for dtype in (torch.bfloat16, torch.float16):
            all_found = []
            for heads in HEADS + (WIDE if dtype == torch.float16 else []):
                for seed in range(1 if heads in WIDE else 4):
                    torch.manual_seed(seed)
                    options = dict(seed=seed, device="cpu", float32_scales=seed % 2 == 1, delta=operator.delta)
                    all_found.append(errors(make(1, 1111, *heads, 12, dtype, **options)))
                    print(operator.name, dtype, heads, all_found[-1], flush=True)
            print(operator.name, dtype, largest(all_found), flush=True)
