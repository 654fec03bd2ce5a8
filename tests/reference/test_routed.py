"""The dense definition of the routed read: scores by hand, weights of mean one, the linear model where all agree."""

import math

import pytest
import torch

from loglinear.partition import Partition
from loglinear.reference import (
    dense_bucket_scores,
    dense_delta_rule,
    dense_routed_read,
    dense_routed_weights,
    dense_scalar_gate,
    dense_tokens_TL,
    dense_top_k,
)

PARTITIONS = [Partition(2, 16), Partition(4), Partition(16, 4), Partition(4, 4, 16)]
every_partition = pytest.mark.parametrize("partition", PARTITIONS, ids=str)


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


@every_partition
@pytest.mark.parametrize("start", [0, 21, 300])
@pytest.mark.parametrize("L", [1, 2, 5, 40])
def test_scores_are_sums_over_the_tokens_of_a_bucket(partition, L, start):
    G, T, K = 2, 70, 3
    q, k = unit(G, T, K), unit(G, T, K)
    scores, tokens = dense_bucket_scores(q, k, L, partition, start), dense_tokens_TL(T, L, partition, start)
    for g in range(G):
        for t in range(0, T, 3):
            expected, count = [0.0] * L, [0] * L
            for s in range(t + 1):
                column = min(partition.index(start + t, start + s), L - 1)
                count[column] += 1
                if column:
                    expected[column] += (
                        math.fsum(float(a * b) for a, b in zip(q[g, t], k[g, s], strict=True)) ** 2 - 1 / K
                    )
            torch.testing.assert_close(
                scores[g, t], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
            )
            assert tokens[t].tolist() == count


@every_partition
def test_weights_have_mean_one_over_the_buckets_that_hold_a_token(partition):
    H, T, L = 4, 70, 7
    logits, scores = torch.randn(H, T, L, dtype=torch.float64), torch.randn(2, T, L, dtype=torch.float64)
    weights = dense_routed_weights(logits, scores, torch.rand(H, dtype=torch.float64), partition)
    live = dense_tokens_TL(T, L, partition) > 0
    assert (weights[:, ~live] == 0).all() and (weights[:, live] > 0).all()
    torch.testing.assert_close(weights.sum(-1), live.sum(-1).double().expand(H, T))


@every_partition
@pytest.mark.parametrize("start", [0, 21, 300])
@pytest.mark.parametrize("delta_rule", [False, True], ids=["scalar_gate", "delta_rule"])
def test_equal_logits_without_scores_are_the_linear_model(partition, delta_rule, start):
    H, T, L = 2, 37, 6
    q, k, v = unit(H, T, 3), unit(H, T, 3), torch.randn(H, T, 2, dtype=torch.float64)
    log_decay = -0.3 * torch.rand(H, T, dtype=torch.float64)
    beta = 1.8 * torch.rand(H, T, dtype=torch.float64) if delta_rule else None
    logits, none = torch.zeros(H, T, L, dtype=torch.float64), torch.zeros(H, dtype=torch.float64)
    routed = dense_routed_read(q, k, v, log_decay, beta, logits, none, partition, start=start)
    ones = torch.ones(H, T, 1, dtype=torch.float64)
    linear = (
        dense_scalar_gate(q, k, v, log_decay, ones)
        if beta is None
        else dense_delta_rule(q, k, v, log_decay, beta, ones)
    )
    torch.testing.assert_close(routed, linear, rtol=1e-12, atol=1e-12)


@every_partition
@pytest.mark.parametrize("start", [0, 21])
def test_the_read_is_the_operator_with_these_weights(partition, start):
    H, T, L = 2, 37, 6
    q, k, v = unit(H, T, 3), unit(H, T, 3), torch.randn(H, T, 2, dtype=torch.float64)
    log_decay, logits = -torch.rand(H, T, dtype=torch.float64), torch.randn(H, T, L, dtype=torch.float64)
    sharpness = torch.tensor([4.0, -1.0], dtype=torch.float64)
    weights = dense_routed_weights(logits, dense_bucket_scores(q, k, L, partition, start), sharpness, partition, start)
    expected = dense_scalar_gate(1e3 * q, 1e3 * k, v, log_decay, weights, partition, start)
    actual = dense_routed_read(1e3 * q, 1e3 * k, v, log_decay, None, logits, sharpness, partition, start=start)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-3)  # of 1e6; the epsilon of length 1 is small here


@every_partition
@pytest.mark.parametrize("delta_rule", [False, True], ids=["scalar_gate", "delta_rule"])
def test_few_buckets_are_the_others_with_weight_zero(partition, delta_rule):
    """The output lacks exactly the reads of the buckets that are left out."""
    T, L = 37, 6
    q, k, v = unit(2, T, 3), unit(2, T, 3), torch.randn(2, T, 2, dtype=torch.float64)
    log_decay = -0.3 * torch.rand(2, T, dtype=torch.float64)
    beta = 1.8 * torch.rand(2, T, dtype=torch.float64) if delta_rule else None
    logits, sharpness = torch.randn(2, T, L, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    full = dense_routed_read(q, k, v, log_decay, beta, logits, sharpness, partition)
    assert torch.equal(dense_routed_read(q, k, v, log_decay, beta, logits, sharpness, partition, top_k=L - 1), full)
    weights = dense_routed_weights(logits, dense_bucket_scores(q, k, L, partition), sharpness, partition)
    for top_k in (1, 2):
        kept = dense_top_k(weights, top_k)
        assert ((kept == weights) | (kept == 0)).all() and torch.equal(kept[..., 0], weights[..., 0])
        assert ((kept[..., 1:] > 0).sum(-1) == (weights[..., 1:] > 0).sum(-1).clamp(max=top_k)).all()
        assert (kept[..., 1:].amin(-1) == 0).all() and torch.equal(kept[..., 1:].amax(-1), weights[..., 1:].amax(-1))
        few = dense_routed_read(q, k, v, log_decay, beta, logits, sharpness, partition, top_k)
        dense = dense_scalar_gate if beta is None else dense_delta_rule
        gates = (log_decay,) if beta is None else (log_decay, beta)
        left_out = dense(q, k, v, *gates, weights - kept, partition)
        torch.testing.assert_close(few + left_out, full, rtol=1e-5, atol=1e-5)  # q, k of length 1 up to 1e-6
