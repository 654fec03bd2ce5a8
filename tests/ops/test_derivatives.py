"""Derivatives of every order and direction are those of the definition, or refused in one line: no other number."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.utils._pytree import tree_leaves

from loglinear.ops import DecodeState, log_linear_attention_step, log_linear_delta_rule_step
from loglinear.partition import FENWICK, Partition
from tests.kernels.interpreter import teach_interpreter
from tests.ops.operators import OPERATORS, by_kernels, parts, relative_error

SIZES = dict(B=2, T=13, G=1, H=2, K=3, V=2, L=5)


@pytest.fixture(params=OPERATORS, ids=lambda operator: operator.name)
def operator(request):
    return request.param


@pytest.fixture
def interpreted(monkeypatch):
    pytest.importorskip("triton")
    teach_interpreter(monkeypatch.setattr)


def derivatives(operator, inputs, prompt, orders, **options):
    """First, second, ... derivatives of the output and the final state, which continue a prompt."""
    torch.manual_seed(2)
    state = None
    if prompt is not None:
        state = operator(prompt, output_final_state=True, **options).final_state
    output, final = operator(inputs, initial_state=state, output_final_state=True, **options)
    leaves = [*inputs.values(), *([] if prompt is None else prompt.values())]
    tensors, found = [output, *parts(final).values()], []
    for order in range(orders):
        # sums give the backward a constant, squares what depends on the inputs
        weights = [torch.randn(x.shape, dtype=torch.float64).to(x.dtype) for x in tensors]
        value = sum((x * w).sum() + x.square().sum() / 9 for x, w in zip(tensors, weights, strict=True))
        tensors = torch.autograd.grad(
            value, leaves, create_graph=order < orders - 1, allow_unused=True, materialize_grads=True
        )
        found.append([x.detach() for x in tensors])
    return found


def errors(operator, inputs, prompt=None, dtype=torch.float64, impl="torch", orders=3, **options):
    """The largest relative error of each order against the recurrence in float64."""

    def leaves(x):
        return x and {name: t.detach().to(dtype).requires_grad_() for name, t in x.items()}

    exact = derivatives(operator, inputs, prompt, orders, impl="reference", **options)
    actual = derivatives(operator, leaves(inputs), leaves(prompt), orders, impl=impl, **options)
    return [max(map(relative_error, a, e)) for a, e in zip(actual, exact, strict=True)]


@pytest.mark.parametrize("prompt", [None, 7], ids=["alone", "continued"])
@pytest.mark.parametrize("partition", [FENWICK, Partition(4, 2)], ids=str)
def test_three_orders_of_derivatives(operator, prompt, partition):
    inputs = operator.inputs(**SIZES)
    prompt = prompt and operator.inputs(**SIZES | dict(T=prompt))
    assert max(errors(operator, inputs, prompt, chunk_size=4, partition=partition)) < 1e-12


@pytest.mark.parametrize("levels", [1, 3, 7])
def test_three_orders_of_packed_sequences(operator, levels):
    inputs, ends = operator.inputs(**SIZES | dict(B=1, L=levels)), torch.tensor([0, 0, 5, 13], dtype=torch.int32)
    assert max(errors(operator, inputs, chunk_size=2, cu_seqlens=ends)) < 1e-12


@by_kernels
@pytest.mark.interpreter
@pytest.mark.parametrize("prompt", [None, 7], ids=["alone", "continued"])
def test_the_kernels_derivatives_have_derivatives(operator, prompt, interpreted):
    inputs = operator.inputs(**SIZES | dict(T=19))
    prompt = prompt and operator.inputs(**SIZES | dict(T=prompt))
    twin, kernels = (
        errors(operator, inputs, prompt, torch.float32, impl, 2, chunk_size=16) for impl in ("torch", "triton")
    )
    for mine, same_dtype in zip(kernels, twin, strict=True):
        assert mine < 10 * same_dtype


def test_an_input_that_is_given_twice_counts_twice(operator):
    x = operator.inputs(**SIZES)
    gradients = []
    for impl in ("reference", "torch"):
        y = operator(x | {"q": x["k"]}, impl=impl, chunk_size=4).output
        (first,) = torch.autograd.grad(y.square().sum(), x["k"], create_graph=True)
        gradients.append([first, *torch.autograd.grad(first.square().sum(), [x["k"], x["v"]])])
    for one, other in zip(*gradients, strict=True):
        assert relative_error(other, one) < 1e-12


def functions(operator, inputs, partition=FENWICK):
    """The operator and its definition as functions of the inputs in their order."""
    weight = torch.randn(inputs["v"].shape, dtype=torch.float64)

    def of(compute):
        return lambda *x: (compute(dict(zip(operator.names, x, strict=True))) * weight).square().sum()

    fast = of(lambda x: operator(x, impl="torch", chunk_size=4, partition=partition).output)
    return fast, of(lambda x: operator.dense(x, partition))


def gradient_norm(function, count):
    return lambda *x: sum(g.square().sum() for g in torch.func.grad(function, argnums=tuple(range(count)))(*x))


def forward_mode(function, inputs):
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, torch.ones_like(x)) for x in inputs]
        return forward_ad.unpack_dual(function(*duals)).tangent


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f, argnums=tuple(range(len(x))))(*x),
    "grad of grad": lambda f, x: torch.func.grad(gradient_norm(f, len(x)), argnums=tuple(range(len(x))))(*x),
    "jvp": lambda f, x: torch.func.jvp(f, x, tuple(map(torch.ones_like, x))),
    "forward_ad": forward_mode,
    "vmap": lambda f, x: torch.func.vmap(f)(*(torch.stack([t, t / 2]) for t in x)),
    "vmap over q": lambda f, x: torch.func.vmap(lambda q: f(q, *x[1:]))(torch.stack([x[0], x[0] / 2])),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(f))(*(torch.stack([t, t / 2]) for t in x)),
    "hessian": lambda f, x: torch.func.hessian(f, argnums=1)(*x),
    "hvp": lambda f, x: torch.autograd.functional.hvp(f, x, tuple(map(torch.ones_like, x))),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("partition", [FENWICK, Partition(4, 2, 8)], ids=str)
def test_transforms_of_torch_func_are_exact(operator, transform, partition):
    inputs = {name: x.detach() for name, x in operator.inputs(**SIZES | dict(B=1, T=11)).items()}
    actual, exact = (TRANSFORMS[transform](f, tuple(inputs.values())) for f in functions(operator, inputs, partition))
    for one, other in zip(tree_leaves(actual), tree_leaves(exact), strict=True):
        assert relative_error(one, other) < 1e-12 and other.abs().max() > 0


@by_kernels
@pytest.mark.interpreter
def test_the_kernels_refuse_transforms_in_one_line(operator, interpreted):
    inputs = {name: x.detach().float() for name, x in operator.inputs(**SIZES).items()}
    function = lambda q: operator(inputs | {"q": q}, impl="triton").output.sum()  # noqa: E731
    for transform in (torch.func.grad, lambda f: lambda q: torch.func.jvp(f, (q,), (q,))):
        with pytest.raises(ValueError, match="^torch.func transforms and forward-mode .* need impl='torch'$"):
            transform(function)(inputs["q"])


def test_a_step_says_that_it_has_no_derivatives(operator):
    inputs = operator.inputs(**SIZES | dict(T=1))
    token = {name: x[:, 0].detach() for name, x in inputs.items()}
    state = DecodeState.zeros(
        2, num_levels=5, chunk_size=4, groups=1, heads=2, key_dim=3, value_dim=2, **operator.kind,
        dtype=torch.float64,
    )  # fmt: skip
    function = log_linear_delta_rule_step if operator.delta else log_linear_attention_step

    def step(q):
        return function(*(token | {"q": q}).values(), state)

    cases = [
        lambda: step(inputs["q"][:, 0]),
        lambda: torch.func.grad(lambda q: step(q).sum())(token["q"]),
        lambda: torch.func.jvp(step, (token["q"],), (token["q"],)),
    ]
    for case in cases:
        with pytest.raises(ValueError, match="^a step has no derivatives, but .* would need one: use torch.no_grad"):
            case()
    assert not state.fenwick.position.any()  # a refused step changes nothing
    with torch.no_grad():
        step(inputs["q"][:, 0])
    assert state.fenwick.position.tolist() == [1, 1]


@pytest.mark.parametrize("transform", ["grad", "jvp", "forward_ad"])
def test_a_transform_inside_a_graph_is_refused(operator, transform):
    """The function alone is compiled before: its graph must not serve the transform."""
    torch._dynamo.reset()
    inputs = {name: x.detach() for name, x in operator.inputs(**SIZES | dict(B=1, T=11)).items()}
    (function, _), x = functions(operator, inputs), tuple(inputs.values())
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert float(compiled(*x)) == float(function(*x))
    graph = torch.compile(lambda *x: TRANSFORMS[transform](function, x), backend="eager", fullgraph=True)
    with pytest.raises((RuntimeError, ValueError), match="Observed exception|torch.compile|forward"):
        graph(*x)
