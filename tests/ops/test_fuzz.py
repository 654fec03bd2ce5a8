"""Random mixtures of lengths, positions, levels, chunk sizes and partitions: the fast path is always the recurrence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loglinear.partition import FENWICK, Partition
from tests.ops.operators import OPERATORS, gradients, parts, random_loss, relative_error


def packed(operator, lengths, levels):
    inputs = operator.inputs(B=1, T=max(1, sum(lengths)), L=levels, H=2, G=1, K=3, V=2)
    return inputs, torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    documents=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 25)), min_size=1, max_size=4).filter(
        lambda pairs: sum(first for first, _ in pairs) and sum(second for _, second in pairs)
    ),
    levels=st.integers(1, 9),
    chunk_size=st.sampled_from([1, 2, 4, 8]),
    partition=st.sampled_from([FENWICK, Partition(2, 2, 8), Partition(4), Partition(4, 2, 2), Partition(8, 2, 16)]),
)
def test_two_packed_pieces_equal_the_recurrence_with_every_gradient(operator, documents, levels, chunk_size, partition):
    pieces = [packed(operator, lengths, levels) for lengths in zip(*documents, strict=True)]
    results, weights = {}, None
    for impl in ("torch", "reference"):
        state, tensors = None, []
        for inputs, cu_seqlens in pieces:
            out = operator(
                inputs,
                cu_seqlens=cu_seqlens,
                chunk_size=chunk_size,
                initial_state=state,
                output_final_state=True,
                impl=impl,
                partition=partition,
            )
            state = out.final_state
            tensors.append(out.output)
        tensors += parts(state).values()
        weights = weights or random_loss(*tensors)
        leaves = [x for inputs, _ in pieces for x in inputs.values()]
        results[impl] = tensors + gradients(tensors, weights, leaves)
    for fast, slow in zip(results["torch"], results["reference"], strict=True):
        assert relative_error(fast, slow) < 1e-10 or float((fast - slow).detach().norm()) < 1e-10
