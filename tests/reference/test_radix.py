"""The definitions agree for every partition: token by token, in one matrix, and as a walk over one array of states."""

import pytest
import torch

from loglinear.partition import FENWICK, Partition
from loglinear.reference import chunked_scalar_gate, dense_delta_rule, dense_scalar_gate, recurrent

LENGTHS = (1, 2, 3, 17, 63, 65, 130, 257)
PARTITIONS = [Partition(radix, finest) for radix in (2, 4, 8, 16) for finest in (1, 4, 16)]
PARTITIONS += [Partition(2, 4, 4), Partition(4, 4, 16), Partition(8, 1, 64), Partition(16, 1, 16)]  # old blocks apart

both_families = pytest.mark.parametrize("delta_rule", [False, True], ids=["scalar_gate", "delta_rule"])
both_gates = pytest.mark.parametrize("diagonal", [False, True], ids=["scalar", "diagonal"])
every_partition = pytest.mark.parametrize("partition", PARTITIONS, ids=str)


def operands(T, L, delta_rule, H=2, K=3, V=2, diagonal=False):
    """Leaves, heads first: keys of length 1, beta up to 1.8."""
    x = {
        "q": torch.randn(H, T, K, dtype=torch.float64),
        "k": torch.nn.functional.normalize(torch.randn(H, T, K, dtype=torch.float64), dim=-1),
        "v": torch.randn(H, T, V, dtype=torch.float64),
        "log_decay": -0.3 * torch.rand(H, T, *([K] if diagonal else []), dtype=torch.float64),
    }
    if delta_rule:
        x["beta"] = 1.8 * torch.rand(H, T, dtype=torch.float64)
    x["level_scales"] = torch.rand(H, T, L, dtype=torch.float64)
    return {name: tensor.requires_grad_() for name, tensor in x.items()}


def dense(x, partition):
    return (dense_delta_rule if "beta" in x else dense_scalar_gate)(*x.values(), partition)


def token_by_token(x, partition):
    (H, _, K), V, L = x["q"].shape, x["v"].shape[2], x["level_scales"].shape[2]
    q, k, v, log_decay, scales = (x[name].transpose(0, 1) for name in ("q", "k", "v", "log_decay", "level_scales"))
    beta = x["beta"].transpose(0, 1) if "beta" in x else None
    states = torch.zeros(L, H, K, V, dtype=torch.float64)
    return recurrent(q, k, v, log_decay, beta, scales, states, 0, partition)[0].transpose(0, 1)


def check_equal(x, actual, expected):
    """Outputs and every gradient."""
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    grads = [torch.autograd.grad((y * weights).sum(), list(x.values())) for y in (actual, expected)]
    for name, a, e in zip(x, *grads, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def columns(partition, T):
    """All columns, one too few, and one: the last column takes what has none of its own."""
    most = partition.num_columns(T)
    return sorted({1, max(1, most - 1), most, most + 3})


@both_gates
@both_families
@every_partition
def test_recurrent_matches_dense_with_every_gradient(partition, delta_rule, diagonal):
    for T in LENGTHS:
        for L in columns(partition, T) if T < 65 else [max(1, partition.num_columns(T) - T % 2)]:
            x = operands(T, L, delta_rule, H=1, diagonal=diagonal)
            check_equal(x, token_by_token(x, partition), dense(x, partition))


@both_gates
@every_partition
@pytest.mark.parametrize("T", [16, 48, 272])
def test_chunked_matches_dense_with_every_gradient(partition, T, diagonal):
    sizes = {partition.finest_block, 16} if T < 272 else {16}
    for C in {partition.chunk_near(size, most=16) for size in sizes}:
        for L in columns(partition, T) if T < 272 else [partition.num_columns(T) - 1]:
            x = operands(T, L, delta_rule=False, H=1, diagonal=diagonal)
            q, k, v, log_decay, scales = (tensor[0] for tensor in x.values())
            log_decay = log_decay if diagonal else log_decay[:, None]
            actual = chunked_scalar_gate(q, k, v, log_decay, scales, C, partition)[None]
            check_equal(x, actual, dense(x, partition))


@both_families
@every_partition
def test_lambda_of_one_is_the_linear_model(partition, delta_rule):
    x = operands(65, partition.num_columns(65), delta_rule)
    x["level_scales"] = torch.ones_like(x["level_scales"])
    linear = {**x, "level_scales": torch.ones(2, 65, 1, dtype=torch.float64)}
    torch.testing.assert_close(dense(x, partition), dense(linear, FENWICK), rtol=1e-12, atol=1e-12)


@both_families
def test_a_finest_block_joins_the_lowest_levels(delta_rule):
    """Radix 2 with a finest block of 4 is the published partition whose three lowest levels share one lambda."""
    x = operands(65, 6, delta_rule)
    shared = x["level_scales"][..., :1].expand(2, 65, 2)
    published = {**x, "level_scales": torch.cat([shared, x["level_scales"]], -1)}
    check_equal(x, dense(x, Partition(2, 4)), dense(published, FENWICK))
