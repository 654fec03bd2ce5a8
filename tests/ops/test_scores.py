"""The scores of buckets against sums token by token, in float64 and with every gradient."""

import re

import pytest
import torch

from loglinear.ops import DecodeState, bucket_scores, bucket_scores_step, bucket_tokens
from loglinear.ops.problem import unit_length
from loglinear.partition import FENWICK, Partition
from loglinear.reference import dense_bucket_scores, dense_tokens_TL
from tests.ops.operators import random_loss, relative_error

EXACT = 1e-12

PARTITIONS = [
    Partition(2, 16),
    Partition(4, 16),
    Partition(16, 16),
    Partition(4, 4),
    Partition(16, 1),
    FENWICK,
    Partition(2, 4, 16),
    Partition(4, 16, 16),
    Partition(16, 2, 32),
]
every_partition = pytest.mark.parametrize("partition", PARTITIONS, ids=str)
both = pytest.mark.parametrize("impl", ["torch", "reference"])


def inputs(B=2, T=37, G=2, K=5, dtype=torch.float64):
    return [torch.randn(B, T, G, K, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2)]


def dense(q, k, L, partition):
    """[B, T, G, L], row by row."""
    rows = [
        dense_bucket_scores(*(unit_length(x[b]).transpose(0, 1) for x in (q, k)), L, partition) for b in range(len(q))
    ]
    return torch.stack(rows).transpose(1, 2)


def columns(partition, T):
    most = partition.num_columns(T)
    return sorted({1, 2, max(1, most // 2), max(1, most - 1), most, most + 3})


def check_equal(leaves, actual, expected):
    torch.testing.assert_close(actual, expected, rtol=EXACT, atol=EXACT)
    check_gradients(leaves, actual, expected)


def check_gradients(leaves, actual, expected):
    weights = random_loss(expected)
    runs = [torch.autograd.grad(y, leaves, weights, retain_graph=True) for y in (actual, expected)]
    for a, e in zip(*runs, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


@every_partition
@pytest.mark.parametrize("T", [1, 2, 16, 17, 65, 130])
def test_torch_matches_the_definition_with_every_gradient(partition, T):
    for L in columns(partition, T):
        leaves = inputs(B=1, T=T, K=3)
        actual = bucket_scores(*leaves, num_columns=L, partition=partition)
        check_equal(leaves, actual.scores, dense(*leaves, L, partition))
        assert torch.equal(actual.tokens, dense_tokens_TL(T, L, partition)[None])


@every_partition
def test_the_recurrence_matches_the_definition_with_every_gradient(partition):
    for L in (1, 2, 5):
        leaves = inputs(T=37, K=3)
        actual = bucket_scores(*leaves, num_columns=L, partition=partition, impl="reference")
        check_equal(leaves, actual.scores, dense(*leaves, L, partition))


@both
@every_partition
@pytest.mark.parametrize("cuts", [[1] * 7, [5, 1, 30, 2], [17, 16, 2, 40]], ids=str)
def test_pieces_equal_the_whole_with_every_gradient(partition, cuts, impl):
    T = sum(cuts)
    for L in (2, partition.num_columns(T)):
        leaves, state, found, start = inputs(T=T, K=3), None, [], 0
        options = dict(num_columns=L, partition=partition, output_final_state=True, impl=impl)
        for cut in cuts:
            result = bucket_scores(*(x[:, start : start + cut] for x in leaves), initial_state=state, **options)
            found.append(result)
            state, start = result.final_state, start + cut
        check_equal(leaves, torch.cat([piece.scores for piece in found], 1), dense(*leaves, L, partition))
        tokens = torch.cat([piece.tokens[:1] for piece in found], 1)
        assert torch.equal(tokens, dense_tokens_TL(T, L, partition)[None])
        whole = bucket_scores(*leaves, **options).final_state
        for a, e in zip(state.tensors, whole.tensors, strict=True):
            torch.testing.assert_close(a, e, rtol=EXACT, atol=EXACT)
        ends = [torch.cat([s.blocks.flatten(), s.k.flatten()]) for s in (state, whole)]
        check_gradients(leaves[1:], *ends)


@both
@every_partition
@pytest.mark.parametrize("ends", [[0, 1, 40], [0, 3, 3, 20, 90], [0, 16, 32, 48], [0, 0, 70, 70]], ids=str)
def test_packed_equals_separate_with_every_gradient(partition, ends, impl):
    leaves, options = inputs(B=1, T=ends[-1], K=3), dict(num_columns=6, partition=partition, impl=impl)
    packed = bucket_scores(*leaves, cu_seqlens=torch.tensor(ends), **options)
    documents = [(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True) if b > a]
    separate = [bucket_scores(*(x[:, a:b] for x in leaves), **options) for a, b in documents]
    check_equal(leaves, packed.scores, torch.cat([one.scores for one in separate], 1))
    assert torch.equal(packed.tokens, torch.cat([one.tokens for one in separate], 1))


@every_partition
@torch.no_grad()
def test_steps_equal_the_whole_at_positions_of_their_own(partition):
    T, starts = 90, (1, 5, 21)
    for L in (1, 2, 6, partition.num_columns(T) + 1):
        q, k = (x.detach() for x in inputs(B=3, T=T, K=3))
        expected, tokens = dense(q, k, L, partition), dense_tokens_TL(T, L, partition)
        options = dict(num_columns=L, partition=partition, output_final_state=True)
        prompts = [
            bucket_scores(*(x[row : row + 1, :n] for x in (q, k)), **options).final_state
            for row, n in enumerate(starts)
        ]
        parts = zip(*(prompt.tensors for prompt in prompts), strict=True)
        state = DecodeState.of(prompts[0].with_tensors(torch.cat(part) for part in parts))
        at = list(starts)
        for turn in range(T):
            active = torch.tensor([at[row] < T and (turn + row) % 5 > 0 for row in range(3)])
            rows, times = torch.arange(3), torch.tensor(at).clamp(max=T - 1)
            scores, counts = bucket_scores_step(q[rows, times], k[rows, times], state, num_columns=L, active=active)
            for row in range(3):
                if active[row]:
                    torch.testing.assert_close(scores[row], expected[row, at[row]], rtol=1e-11, atol=1e-11)
                    assert torch.equal(counts[row], tokens[at[row]])
                    at[row] += 1
        assert min(at) > T // 2


@every_partition
@torch.no_grad()
def test_a_step_by_the_recurrence_is_the_step(partition):
    q, k = (x.detach() for x in inputs(T=40))
    final = bucket_scores(q, k, num_columns=6, partition=partition, output_final_state=True).final_state
    states, more = [DecodeState.of(final) for _ in range(2)], inputs(T=20)
    for t, active in zip(range(20), [None, torch.tensor([True, False])] * 10, strict=True):
        token = [x[:, t].detach() for x in more]
        found = [
            bucket_scores_step(*token, state, num_columns=6, active=active, impl=impl)
            for state, impl in zip(states, ("torch", "reference"), strict=True)
        ]
        rows = slice(None) if active is None else active
        torch.testing.assert_close(found[0][0][rows], found[1][0][rows], rtol=1e-11, atol=1e-11)
        assert torch.equal(found[0][1], found[1][1])
    held = bucket_tokens(states[0].fenwick.position, num_columns=6, partition=partition)[:, 1:] > 0
    a, b = (state.fenwick.blocks[held] for state in states)
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert torch.equal(states[0].fenwick.position, states[1].fenwick.position)


@every_partition
def test_second_derivatives_and_transforms(partition):
    q, k = inputs(B=1, T=11, G=1, K=2)

    def scores(q, k):
        return bucket_scores(q, k, num_columns=4, partition=partition).scores

    assert torch.autograd.gradgradcheck(scores, (q, k))
    weights = torch.randn_like(scores(q, k))
    plain = torch.autograd.grad((scores(q, k) * weights).sum(), (q, k))
    functional = torch.func.grad(lambda q, k: (scores(q, k) * weights).sum(), argnums=(0, 1))(q.detach(), k.detach())
    for a, e in zip(functional, plain, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


def test_one_graph_compiles_with_gradients():
    partition = Partition(4, 16)

    def loss(q, k, ends):
        result = bucket_scores(q, k, num_columns=7, partition=partition, cu_seqlens=ends)
        return (result.scores * (result.tokens > 0)[:, :, None]).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for ends in ([0, 70], [0, 33, 90], [0, 40, 51]):
        leaves = inputs(B=1, T=ends[-1])
        runs = [torch.autograd.grad(f(*leaves, torch.tensor(ends)), leaves) for f in (compiled, loss)]
        for a, e in zip(*runs, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_inputs_are_computed_in_float32(dtype):
    q, k = inputs(T=300, dtype=dtype)
    partition = Partition(16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = bucket_scores(q, k, num_columns=20, partition=partition).scores
    assert scores.dtype == torch.float32
    exact = bucket_scores(q.double(), k.double(), num_columns=20, partition=partition).scores
    assert relative_error(scores, exact) < 2e-6


def test_a_matching_key_raises_its_bucket_alone():
    """Random keys score about 0 however many there are; one equal key adds almost 1."""
    torch.manual_seed(0)
    partition = Partition(16, 16)
    q, k = torch.randn(2, 1, 512, 1, 64).unbind()
    k[0, 300] = q[0, 400]
    scores = bucket_scores(q, k, num_columns=partition.num_columns(512), partition=partition).scores[0, 400, 0]
    column = partition.index(400, 300)
    assert scores[column] > 0.7
    assert torch.cat([scores[:column], scores[column + 1 :]]).abs().max() < 0.5


def test_the_future_does_not_leak():
    q, k = inputs(T=100)
    options = dict(num_columns=9, partition=Partition(4, 4))
    changed = [x.detach().clone() for x in (q, k)]
    for x in changed:
        x[:, 53:] = 7.0
    assert torch.equal(bucket_scores(*changed, **options).scores[:, :53], bucket_scores(q, k, **options).scores[:, :53])


def test_tokens_of_far_positions():
    partition = Partition(16, 64, 1024)
    position = torch.tensor([[0, 63], [64, 2**61 - 5]])
    tokens = bucket_tokens(position, num_columns=40, partition=partition)
    assert torch.equal(tokens.sum(-1), position + 1)
    assert tokens[1, 1, 17] == 1024 and (tokens >= 0).all()


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(k=torch.randn(2, 37, 2, 4)), "k must have shape [B, T, G, K] = [2, 37, 2, 5], got [2, 37, 2, 4]"),
        (dict(q=None), "q must be a tensor, got NoneType"),
        (dict(num_columns=0), "num_columns must be an integer of at least 1, got 0"),
        (dict(partition=16), "partition must be a Partition, got 16"),
        (
            dict(impl="cuda"),
            "impl of bucket_scores must be one of ['auto', 'triton', 'torch', 'reference'], got 'cuda'",
        ),
        (dict(cu_seqlens=torch.tensor([0, 37])), "cu_seqlens needs a packed batch with B = 1, got B = 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_one_line(changes, text):
    q, k = inputs(dtype=torch.float32)
    arguments = dict(q=q, k=k, num_columns=5, partition=Partition(4, 4)) | changes
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        bucket_scores(**arguments)


def test_a_state_of_another_partition_or_size_is_refused():
    leaves = inputs(T=9)
    made = Partition(4, 4)
    state = bucket_scores(*leaves, num_columns=5, partition=made, output_final_state=True).final_state
    with pytest.raises(ValueError, match=re.escape(f"initial_state was made with {made}, got {Partition(2, 4)}")):
        bucket_scores(*leaves, num_columns=5, partition=Partition(2, 4), initial_state=state)
    with pytest.raises(ValueError, match="needs a state of 6 blocks, got one of 4"):
        bucket_scores_step(leaves[0][:, 0].detach(), leaves[1][:, 0].detach(), DecodeState.of(state), num_columns=7)
    plain = [x[:, 0].detach() for x in leaves]
    for number, name in enumerate("qk"):
        operands = [x.clone().requires_grad_(which == number) for which, x in enumerate(plain)]
        with pytest.raises(ValueError, match=f"a step has no derivatives, but {name} would need one"):
            bucket_scores_step(*operands, DecodeState.of(state), num_columns=5)
    with pytest.raises(ValueError, match="state must be a DecodeState .* got FenwickState"):
        bucket_scores_step(*plain, state, num_columns=5)
    with pytest.raises(ValueError, match="state must hold torch.float32, as final_state does for these inputs, got"):
        bucket_scores_step(*(x.float() for x in plain), DecodeState.of(state), num_columns=5)
    with pytest.raises(ValueError, match="active must hold bool, got"):
        bucket_scores_step(*plain, DecodeState.of(state), num_columns=5, active=torch.ones(2))


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(chunk_size=16), "state must have chunk_size 4, the finest_block of its partition, got 16"),
        (dict(value_dim=3), "state.blocks must have shape [N, M, G, K, K] = [2, 4, 2, 5, 5], got [2, 4, 2, 5, 3]"),
        (dict(heads=4), "state.blocks must have shape [N, M, G, K, K] = [2, 4, 2, 5, 5], got [2, 4, 4, 5, 5]"),
    ],
    ids=["chunk_size", "value_dim", "heads"],
)
def test_a_step_refuses_a_state_that_holds_no_sums_of_keys(change, text):
    dims = dict(num_levels=5, chunk_size=4, groups=2, heads=2, key_dim=5, value_dim=5, delta_rule=False)
    state = DecodeState.zeros(2, partition=Partition(4, 4), dtype=torch.float64, **dims | change)
    q, k = (x[:, 0].detach() for x in inputs(T=1))
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        bucket_scores_step(q, k, state, num_columns=5)
    assert state.fenwick.position.tolist() == [0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("ends", [None, [0, 100, 100, 777, 1000]], ids=["dense", "packed"])
@every_partition
def test_gpu_matches_cpu_in_float64(partition, ends):
    leaves = inputs(B=1, T=1000, K=16)
    results, weights = [], None
    for device in ("cpu", "cuda"):
        cu_seqlens = None if ends is None else torch.tensor(ends, device=device)
        own = [x.detach().to(device).requires_grad_() for x in leaves]
        options = dict(num_columns=12, partition=partition, output_final_state=True, cu_seqlens=cu_seqlens)
        found = bucket_scores(*own, **options)
        weights = random_loss(found.scores) if weights is None else tuple(w.to(device) for w in weights)
        grads = torch.autograd.grad(found.scores, own, weights)
        results.append([found.scores, found.tokens, *found.final_state.tensors, *grads])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@torch.no_grad()
def test_gpu_steps_match_cpu_in_float64():
    partition, T = Partition(4, 4), 60
    q, k = (x.detach() for x in inputs(T=T, K=8))
    expected = dense(q, k, 9, partition)
    first = bucket_scores(q[:, :5].cuda(), k[:, :5].cuda(), num_columns=9, partition=partition, output_final_state=True)
    state = DecodeState.of(first.final_state)
    for t in range(5, T):
        scores, _ = bucket_scores_step(q[:, t].cuda(), k[:, t].cuda(), state, num_columns=9)
        torch.testing.assert_close(scores.cpu(), expected[:, t], rtol=1e-10, atol=1e-10)
