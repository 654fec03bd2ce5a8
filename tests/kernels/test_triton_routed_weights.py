"""The kernels of the routed read's weights under the interpreter: against float64, with every gradient."""

import pytest
import torch

from loglinear.layers import BucketWeights, Routing
from loglinear.ops import routed_weights
from loglinear.variants import HeadSizes
from tests.kernels.interpreter import teach_interpreter
from tests.kernels.routed_weights import NAMES, SIZES, Sizes, check, make, packed, results_of
from tests.ops.operators import relative_error

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch):
    teach_interpreter(monkeypatch.setattr)


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "-".join(map(str, s)))
def test_every_size(sizes):
    check(make(sizes))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_logits_are_those_numbers(dtype):
    check(make(Sizes(2, 63, 2, 3, 19), dtype))


def test_packed_sequences_and_empty_buckets():
    sizes = Sizes(T=130, G=2, R=3, L=19)
    x = make(sizes) | dict(tokens=packed(sizes))
    assert (x["tokens"] == 0).any() and (x["tokens"][:, :, 0] > 0).all()
    check(x)


def test_rows_with_counts_of_their_own():
    sizes = Sizes(3, 40, 2, 3, 7)
    x = make(sizes)
    own = torch.stack([packed(sizes._replace(T=40 + n))[0, n:] for n in range(3)])
    together = check(x | dict(tokens=own))["weights"]
    for row in range(3):
        alone = {name: t if name == "tau" else t[row : row + 1] for name, t in (x | dict(tokens=own)).items()}
        assert torch.equal(routed_weights(**alone, sharpness=4.0, impl="triton"), together[row : row + 1])


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits(size):
    """The largest has all the weight."""
    x = make(Sizes(T=63, G=2, R=2, L=19), size=size)
    assert not check(x)["weights"].isnan().any()


@pytest.mark.parametrize("columns", [2, 3, 19, 49, 60, 100])
def test_equal_numbers_give_exactly_1(columns):
    """Also 49 of them, for which 49 (1 / 49) is not 1 in float32."""
    x = make(Sizes(T=columns, G=2, R=3, L=columns))
    x["tokens"] = torch.ones(columns, columns, dtype=torch.int64).tril()[None]
    x["logits"] = x["logits"][..., :1].expand_as(x["logits"])
    x["tau"] = torch.zeros(6)
    w = routed_weights(**x, sharpness=4.0, impl="triton")
    assert torch.equal(w, (x["tokens"] > 0).float()[:, :, None].expand_as(w))


def test_two_runs_give_the_same_bits():
    x = make(Sizes(2, 130, 2, 7, 19))
    dweights = torch.randn_like(x["logits"])
    first, second = (results_of(x, "triton", None, dweights) for _ in range(2))
    assert all(torch.equal(a, second[name]) for name, a in first.items())


def test_tensors_that_are_views():
    """Rows with gaps, one gradient for all, and tokens of another integer type."""
    x = make(Sizes(2, 40, 2, 3, 7))
    views = {name: torch.stack([t, t], -1)[..., 0] for name, t in x.items()} | dict(tokens=x["tokens"].int())
    leaves = [views[name].requires_grad_() for name in NAMES]
    grads = torch.autograd.grad(routed_weights(**views, impl="triton").sum(), leaves)
    assert all(g.abs().max() < 1e-5 for g in grads)  # the sum of a token's weights is always n
    assert torch.equal(routed_weights(**views, impl="triton"), routed_weights(**x, impl="triton"))


def test_narrow_scores_and_tau():
    """They are computed in float32, and their gradients are rounded."""
    x = {name: t if name == "tokens" else t.bfloat16() for name, t in make(Sizes(T=63)).items()}
    found = check(x)
    assert found["weights"].dtype == torch.float32
    assert all(found[f"gradient of {name}"].dtype == torch.bfloat16 for name in NAMES)


def test_what_was_not_written_is_not_read(monkeypatch):
    x = make(Sizes(2, 63, 2, 7, 19))
    dweights = torch.randn_like(x["logits"])
    expected = results_of(x, "triton", None, dweights)
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, plain=plain, **options: plain(*args, **options).fill_(torch.nan))
    found = results_of(x, "triton", None, dweights)
    assert all(torch.equal(e, found[name]) for name, e in expected.items())


def test_is_one_node_for_torch():
    from loglinear.kernels.triton import routed_weights as kernel

    x = make(Sizes(2, 9, 2, 2, 5), torch.float16)
    leaves = {name: t if name == "tokens" else t.requires_grad_() for name, t in x.items()}
    torch.library.opcheck(kernel, (*leaves.values(), 4.0))
    graphs = []

    def call(x):
        return routed_weights(**x, sharpness=4.0, impl="triton")

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(call, fullgraph=True, backend=keep)(x)
    assert torch.equal(compiled, call(x))
    (graph,) = graphs
    assert [node.target for node in graph.graph.nodes if "routed_weights" in str(node.target)]
    aot = torch.compile(call, fullgraph=True, backend="aot_eager")
    found = [
        torch.autograd.grad(f(leaves).sin().sum(), [leaves[n] for n in leaves if n != "tokens"]) for f in (aot, call)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_second_derivatives_are_those_of_torch():
    x = make(Sizes(2, 20, 2, 3, 5))
    found = []
    for impl, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        leaves = {name: x[name].to(dtype).requires_grad_() for name in NAMES}
        w = routed_weights(**x | leaves, sharpness=4.0, impl=impl)
        first = torch.autograd.grad(w.square().sum(), list(leaves.values()), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values())))
    for a, e in zip(*found, strict=True):
        assert relative_error(a, e) < 1e-5


def test_the_layer_takes_the_kernels():
    torch.manual_seed(0)
    layer = BucketWeights(6, HeadSizes(num_heads=4, num_groups=2, key_dim=3, head_dim=3), 5, Routing())
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    x, scores, tokens = torch.randn(2, 30, 6), torch.randn(2, 30, 2, 5), packed(Sizes(T=30))
    runs = [layer(x, scores, tokens, impl) for impl in ("triton", "torch")]
    assert runs[0].grad_fn.name() != runs[1].grad_fn.name()
    names, leaves = zip(*layer.named_parameters(), strict=True)
    weights = torch.randn_like(runs[0])
    grads = [torch.autograd.grad(w, leaves, weights) for w in runs]
    assert relative_error(*runs) < 1e-6
    for name, a, b in zip(names, *grads, strict=True):
        assert relative_error(a, b) < 1e-5, name


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(logits=torch.zeros(1, 4, 2, 5000)), "L = 5000 columns need impl='torch': the weights of impl='triton'"),
        (dict(logits=torch.zeros(1, 4, 2, 5000).double()), "float64 needs impl='torch'"),
    ],
    ids=["columns", "float64"],
)
def test_says_which_calls_it_does_not_take(change, text):
    x = make(Sizes(T=4, R=2, L=5000)) | change
    with pytest.raises(ValueError, match=text):
        routed_weights(**x, impl="triton")
    assert routed_weights(**x).shape == x["logits"].shape
