"""The operators in graphs of torch.compile, torch.export and torch.jit.trace: one node, the same numbers."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from loglinear.kernels.torch import fenwick_array
from loglinear.ops import DecodeState, FenwickState, log_linear_attention_step, log_linear_delta_rule_step
from loglinear.partition import Partition
from tests.ops.operators import OPERATORS, gradients, parts, random_loss, relative_error

SIZES = dict(B=2, G=1, H=2, K=3, V=2, L=5)
WHOLE = dict(backend="aot_eager", fullgraph=True)  # a graph break raises


@pytest.fixture(params=OPERATORS, ids=lambda operator: operator.name)
def operator(request):
    return request.param


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


class Call(torch.nn.Module):
    """(inputs in their order, then the initial state's parts or cu_seqlens) -> output and final state, flat."""

    def __init__(self, operator, impl="torch", packed=False):
        super().__init__()
        self.operator, self.impl, self.packed = operator, impl, packed
        absent = ["partition"] if operator.delta else ["partition", "beta"]
        self.parts = [name for name in FenwickState._fields if name not in absent]

    def forward(self, *tensors):
        names, options = self.operator.names, dict(chunk_size=4, impl=self.impl, output_final_state=True)
        rest = tensors[len(names) :]
        if self.packed:
            options["cu_seqlens"] = rest[0]
        elif rest:
            options["initial_state"] = FenwickState(**dict(beta=None) | dict(zip(self.parts, rest, strict=True)))
        output, state = self.operator(dict(zip(names, tensors, strict=False)), **options)
        return output, *(part for part in state if part is not None)


def arguments(operator, kind, T=13):
    inputs = operator.inputs(**SIZES | dict(T=T) | (dict(B=1) if kind == "packed" else {}))
    tensors = [x.detach() for x in inputs.values()]
    if kind == "packed":
        return *tensors, torch.tensor([0, 3, 3, T])
    if kind == "continued":
        before = {name: x.detach() for name, x in operator.inputs(**SIZES | dict(T=7)).items()}
        return *tensors, *Call(operator)(*before.values())[1:]
    return tuple(tensors)


def exported(call, x, **options):
    return torch.export.export(call, x, strict=False, **options).module()


TRACERS = {
    "compile": lambda call, x: torch.compile(call, **WHOLE),
    "export": exported,
    "strict export": lambda call, x: torch.export.export(call, x, strict=True).module(),
    "jit.trace": lambda call, x: torch.jit.trace(call, x),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["alone", "packed", "continued"])
@pytest.mark.parametrize("tracer", TRACERS)
def test_a_traced_operator_gives_the_same_numbers_for_other_values(operator, kind, tracer):
    """The packed lengths and the positions are values too."""
    call = Call(operator, packed=kind == "packed")
    first, other = arguments(operator, kind), list(arguments(operator, kind))
    traced = TRACERS[tracer](call, first)
    if kind == "packed":
        other[-1] = torch.tensor([0, 6, 12, 13])
    elif kind == "continued":
        other[len(operator.names)] = torch.tensor([3, 6])  # other positions; what is too new in the buffers is not read
    for x in (first, other):
        for mine, expected in zip(traced(*x), call(*x), strict=True):
            assert torch.equal(mine, expected)


WITHOUT_VALUES = {
    "vmap": lambda f, x: torch.func.vmap(f)(*(torch.stack([t, t]) for t in x)),
    "grad": lambda f, x: torch.func.grad(lambda *x: f(*x).sum())(*x),
    "make_fx": lambda f, x: make_fx(f)(*x),
    "FakeTensor": lambda f, x: f(*map(FakeTensorMode().from_tensor, x)),
    "compile": lambda f, x: torch.compile(f, **WHOLE)(*x),
    "export": lambda f, x: exported(Call(f.operator), x),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning", "error::torch.jit.TracerWarning")
@pytest.mark.parametrize("where", WITHOUT_VALUES)
def test_no_value_of_log_decay_is_read_where_none_is_known(operator, where):
    """The check of the CPU, which would refuse this log decay, asks nothing of a traced or transformed tensor."""
    inputs = {name: x.detach() for name, x in operator.inputs(**SIZES | dict(T=7)).items()}
    inputs["log_decay"] = inputs["log_decay"].neg()

    def function(*x):
        return operator(dict(zip(operator.names, x, strict=True)), chunk_size=4).output

    function.operator = operator
    WITHOUT_VALUES[where](function, tuple(inputs.values()))
    with pytest.raises(ValueError, match="^log_decay must be at most 0"):
        function(*inputs.values())


AFTER_A_TRANSFORM = """
import sys, torch
from torch.fx.experimental.proxy_tensor import make_fx
from loglinear.ops import bucket_scores
from loglinear.partition import Partition
from tests.ops.operators import OPERATORS

def scores(x):
    return bucket_scores(x["q"], x["k"], num_columns=3, partition=Partition(4, 2)).scores

torch.manual_seed(0)
for call in (OPERATORS[0], OPERATORS[1], scores):
    inputs = {name: x.detach() for name, x in OPERATORS[1].inputs(B=1, T=5, G=1, H=2, K=3, V=2, L=5).items()}
    q = inputs["q"]

    def function(q):
        found = call(inputs | {"q": q})
        return getattr(found, "output", found).square().sum()

    transforms = {
        "grad": lambda: torch.func.grad(function)(q),
        "jvp": lambda: torch.func.jvp(function, (q,), (q,)),
        "make_fx": lambda: make_fx(torch.func.grad(function))(q),
    }
    transforms[sys.argv[1]]()
    torch._dynamo.reset()
    compiled, leaf = torch.compile(function, backend="aot_eager"), q.clone().requires_grad_()
    runs = [f(leaf) for f in (compiled, make_fx(function)(q), function)]
    assert all(torch.equal(run, runs[-1]) for run in runs)
    grads = [torch.autograd.grad(f(leaf), leaf)[0] for f in (compiled, function)]
    assert torch.equal(*grads)
"""


@pytest.mark.parametrize("transform", ["grad", "jvp", "make_fx"])
def test_a_graph_after_a_transform_takes_up_nothing_of_it(transform):
    """In a process of its own, which a dead tensor of the transform would end."""
    out = subprocess.run([sys.executable, "-c", AFTER_A_TRANSFORM, transform], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def test_an_exported_length_is_free(operator):
    x = arguments(operator, "alone")
    shapes = ((({1: torch.export.Dim("T", min=2, max=4096)},) * len(x)),)
    program = exported(Call(operator), x, dynamic_shapes=shapes)
    for T in (2, 13, 100):
        x = arguments(operator, "alone", T)
        for mine, expected in zip(program(*x), Call(operator)(*x), strict=True):
            assert torch.equal(mine, expected)


def test_the_recurrence_exports_and_names_what_it_cannot(operator):
    x = arguments(operator, "alone")
    for mine, expected in zip(exported(Call(operator, "reference"), x)(*x), Call(operator)(*x), strict=True):
        assert relative_error(mine, expected) < 1e-12
    for kind in ("packed", "continued"):
        with pytest.raises(ValueError, match="^impl='reference' reads positions and lengths, .* use impl='torch'$"):
            exported(Call(operator, "reference", kind == "packed"), arguments(operator, kind))


def test_a_compiled_operator_has_the_same_gradients(operator):
    inputs = operator.inputs(**SIZES | dict(T=13))
    call = Call(operator)
    results = []
    for function in (call, torch.compile(call, **WHOLE)):
        output, _, *state = function(*inputs.values())
        torch.manual_seed(3)
        tensors = [output, *(x for x in state if x.is_floating_point())]
        results.append(gradients(tensors, random_loss(*tensors), list(inputs.values())))
    for mine, expected in zip(*results, strict=True):
        assert torch.equal(mine, expected)


@torch.no_grad()
def test_steps_are_one_graph_for_rows_at_any_position(operator):
    function = log_linear_delta_rule_step if operator.delta else log_linear_attention_step
    compiled = torch.compile(function, **WHOLE)
    inputs = operator.inputs(**SIZES | dict(T=20))
    prompt = {name: x[:, :5].detach() for name, x in inputs.items()}
    state = operator(prompt, chunk_size=4, output_final_state=True).final_state
    state.position[1] = 4  # one row is a token behind: chunks are full at different steps
    states = [DecodeState.of(state) for _ in range(2)]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for t in range(5, 20):
        token = [x[:, t] for x in inputs.values()]
        outputs = [step(*token, held) for step, held in zip((compiled, function), states, strict=True)]
        assert relative_error(*outputs) < 1e-14
    for mine, expected in zip(*(parts(held.fenwick).values() for held in states), strict=True):
        assert relative_error(mine, expected) < 1e-14
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


@pytest.mark.parametrize("final", [False, True])
def test_the_registered_operator_keeps_torchs_rules(operator, final):
    """Also with a gradient for the blocks that it was not asked for."""
    tensors = [
        x.flatten(0, 1).float().detach().requires_grad_() for x in operator.inputs(**(SIZES | dict(B=1, T=7))).values()
    ]
    q, k, v, log_decay, *beta, level_scales = tensors
    options = (torch.tensor([0, 3, 7]), 1, 4, final, Partition(4, 4).numbers)
    arguments = (q, k, v, log_decay, *(beta or [None]), level_scales, None, None, *options)
    torch.library.opcheck(fenwick_array, arguments)


def test_another_partition_compiles_for_every_length(operator):
    partition = Partition(4, 4)

    def run(*tensors):
        return operator(dict(zip(operator.names, tensors, strict=True)), partition=partition).output

    compiled = torch.compile(run, dynamic=True, **WHOLE)
    for T in (13, 45):
        tensors = [x.detach() for x in operator.inputs(**SIZES | dict(T=T)).values()]
        assert torch.equal(compiled(*tensors), run(*tensors))


@pytest.mark.parametrize("name", ["fenwick_array", "bucket_energies"])
def test_plain_torch_stays_outside_of_cuda_graphs(name):
    """It reads lengths on the host, and its schedule would be kept in memory that every replay writes again."""
    for operator in (name, f"{name}_backward"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.loglinear, operator).default.tags


def test_a_graph_searches_whole_boundaries():
    """On a GPU torch.compile of torch 2.11 searches a slice from the beginning of the tensor that it is a part of."""
    from loglinear.ops import bucket_scores

    graphs = []
    ends, q = torch.tensor([0, 3, 3, 9]), torch.randn(1, 9, 1, 4)

    def scores(q, k, ends):
        return bucket_scores(q, k, num_columns=3, partition=Partition(2, 2), cu_seqlens=ends).scores

    compiled = torch.compile(scores, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
    assert torch.equal(compiled(q, q, ends), scores(q, q, ends))
    searches = [node for node in graphs[0].graph.nodes if node.target is torch.bucketize]
    assert searches
    for node in searches:
        boundaries = node.args[1] if len(node.args) > 1 else node.kwargs["boundaries"]
        while boundaries.op == "call_method":  # a conversion
            boundaries = boundaries.args[0]
        assert boundaries.op == "placeholder"
