"""The kernels of the routed read's weights on a GPU: against float64, with every gradient."""

import pytest
import torch

from loglinear.kernels.triton import limits
from loglinear.layers import Mixer, Routing
from loglinear.ops import routed_weights
from loglinear.ops.announcement import announced
from loglinear.partition import Partition
from loglinear.variants import HeadSizes
from tests.kernels.routed_weights import NAMES, SIZES, Sizes, check, make, packed, results_of
from tests.kernels.test_triton_gpu import poison
from tests.ops.operators import relative_error
from tests.waiting import waiting_is_an_error

pytestmark = pytest.mark.gpu

# The paper's heads with radix 4 and 8, one group for each head, and more tokens than one launch has programs at once.
LARGE = [Sizes(1, 16384, 1, 48, 13), Sizes(2, 4097, 1, 48, 18), Sizes(1, 8191, 24, 1, 13), Sizes(1, 131072, 2, 8, 25)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", SIZES + LARGE, ids=lambda s: "-".join(map(str, s)))
def test_every_size(sizes, dtype):
    x = make(sizes, dtype, device="cuda")
    poison()
    check(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_packed_sequences_and_empty_buckets(dtype):
    sizes = Sizes(T=5001, G=2, R=6, L=19)
    check(make(sizes, dtype, device="cuda") | dict(tokens=packed(sizes, "cuda")))


def test_rows_with_counts_of_their_own():
    sizes = Sizes(3, 700, 2, 3, 7)
    x = make(sizes, device="cuda")
    check(x | dict(tokens=torch.stack([packed(sizes._replace(T=700 + n), "cuda")[0, n:] for n in range(3)])))


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_huge_logits(size):
    assert not check(make(Sizes(T=1111, G=2, R=6, L=19), size=size, device="cuda"))["weights"].isnan().any()


@pytest.mark.parametrize("columns", [2, 3, 7, 13, 19, 41, 47, 49, 60, 100, 1000])
def test_equal_numbers_give_exactly_1(columns):
    """For every number of buckets up to this many: a division that is not rounded correctly fails for some."""
    x = make(Sizes(T=columns, G=2, R=3, L=columns), device="cuda")
    x["tokens"] = torch.ones(columns, columns, dtype=torch.int64, device="cuda").tril()[None]
    x["logits"] = x["logits"][..., :1].expand_as(x["logits"])
    x["tau"] = torch.zeros(6, device="cuda")
    w = routed_weights(**x, sharpness=4.0, impl="triton")
    assert torch.equal(w, (x["tokens"] > 0).float()[:, :, None].expand_as(w))


def test_two_runs_give_the_same_bits():
    x = make(Sizes(2, 3001, 2, 12, 19), torch.bfloat16, device="cuda")
    dweights = torch.randn(x["logits"].shape, device="cuda")
    runs = []
    for _ in range(2):
        poison()
        runs.append(results_of(x, "triton", None, dweights))
    assert all(torch.equal(a, runs[1][name]) for name, a in runs[0].items())


def test_a_call_compiles_as_one_graph_and_never_waits():
    x = make(Sizes(2, 2001, 2, 6, 19), torch.bfloat16, device="cuda")
    leaves = {name: x[name].requires_grad_() for name in NAMES}
    dweights = torch.randn(x["logits"].shape, device="cuda")

    def call(x):
        return routed_weights(**x, sharpness=4.0, impl="triton")

    def run(function):
        w = function(x)
        return [w, *torch.autograd.grad(w, list(leaves.values()), dweights.to(w.dtype))]

    expected = run(call)
    with waiting_is_an_error():
        run(call)
    compiled = run(torch.compile(call, fullgraph=True))
    assert all(torch.equal(a, b) for a, b in zip(compiled, expected, strict=True))


def test_a_cuda_graph_repeats_a_call():
    x = make(Sizes(1, 999, 1, 12, 13), torch.bfloat16, device="cuda")
    dweights = torch.randn(x["logits"].shape, device="cuda")
    results_of(x, "triton", None, dweights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = results_of(x, "triton", None, dweights)
    x["logits"].mul_(-0.5)
    graph.replay()
    expected = results_of(x, "triton", None, dweights)
    assert all(torch.equal(e, found[name]) for name, e in expected.items())


def test_auto_takes_the_kernels_and_says_why_not(monkeypatch):
    monkeypatch.setattr(limits, "WEIGHTS_PASSED_ON_A_GPU", True)
    x = make(Sizes(T=100), torch.bfloat16, device="cuda")
    with announced() as lines:
        routed_weights(**x)
        routed_weights(**x | dict(tau=x["tau"].double()))
    assert lines == [
        "routed_weights runs with impl='torch': float64 needs impl='torch'",
        "routed_weights runs with impl='triton'",
    ]


def test_a_mixer_takes_them_in_training_and_in_packed_prefill(monkeypatch):
    monkeypatch.setattr(limits, "WEIGHTS_PASSED_ON_A_GPU", True)
    torch.manual_seed(0)
    choices = dict(variant="mamba2", num_levels=9, partition=Partition(4, 16), routing=Routing(), chunk_size=16)
    mixer = Mixer(32, HeadSizes(num_heads=4, num_groups=2, key_dim=16, head_dim=16), **choices).cuda()
    for p in mixer.bucket_weights.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x, runs = torch.randn(1, 300, 32, device="cuda"), []
    with announced() as lines:
        for impl in ("auto", "torch"):
            mixer.impl = impl
            y = mixer(x)[0]
            runs.append([y, *torch.autograd.grad(y.square().sum(), list(mixer.parameters()))])
    assert "routed_weights runs with impl='triton'" in lines
    for a, b in zip(*runs, strict=True):
        assert relative_error(a, b) < 1e-3
