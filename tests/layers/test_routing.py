"""The routed read in a mixer: against its dense definition, and in packed, continued and decoded sequences."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from loglinear.layers import BucketWeights, Mixer, MixerDecodeState, MixerState, Packing, Routing
from loglinear.layers.routing import SHARPNESS, keep_largest
from loglinear.ops import DecodeState
from loglinear.ops.problem import unit_length
from loglinear.partition import Partition
from loglinear.reference import (
    dense_bucket_scores,
    dense_delta_rule,
    dense_routed_weights,
    dense_scalar_gate,
    dense_top_k,
)
from loglinear.variants import HeadSizes

HIDDEN, HEADS = 12, HeadSizes(num_heads=4, num_groups=2, key_dim=5, head_dim=3)
TWO_HEADS = HeadSizes(num_heads=2, num_groups=1, key_dim=5, head_dim=3)
PARTITIONS = [Partition(2, 16), Partition(4, 16), Partition(16, 16), Partition(4, 4), Partition(4, 4, 16)]
every_partition = pytest.mark.parametrize("partition", PARTITIONS, ids=str)
SELECTIVE = ", selective"  # after a variant: the score "selective_gram"
FAMILIES = ["mamba2", "gated_delta_net", f"mamba2{SELECTIVE}"]
both_families = pytest.mark.parametrize("variant", FAMILIES)
both_gates = pytest.mark.parametrize("variant", [*FAMILIES, "gla", f"kimi_delta_attention{SELECTIVE}"])
"""Also the diagonal gates, whose scores are those of the same keys."""


def routed(variant: str, partition: Partition, num_levels: int = 6, **options) -> Mixer:
    torch.manual_seed(0)
    routing = options.pop("routing", Routing())
    if variant.endswith(SELECTIVE):
        routing = routing._replace(score="selective_gram")
    choices = dict(variant=variant.removesuffix(SELECTIVE), num_levels=num_levels, partition=partition, chunk_size=16)
    mixer = Mixer(HIDDEN, HEADS, routing=routing, **choices | options).double()
    for p in mixer.bucket_weights.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return mixer


def hidden(T: int, B: int = 1) -> Tensor:
    return torch.randn(B, T, HIDDEN, dtype=torch.float64, requires_grad=True)


def check_equal(mixer: Mixer, x: Tensor, actual: Tensor, expected: Tensor) -> None:
    """Outputs and every gradient."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)
    names, leaves = zip(*mixer.named_parameters(), strict=True)
    weights = torch.randn_like(expected)
    runs = [torch.autograd.grad(y, [x, *leaves], weights, retain_graph=True) for y in (actual, expected)]
    for name, a, e in zip(["x", *names], *runs, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


def dense_output(mixer: Mixer, x: Tensor, top_k: int | None = None, start: int = 0) -> Tensor:
    """The mixer's output for one sequence, with the definition in place of the scores and of the operator.

    With top_k every token reads as a decode step does. The first token is at position `start`.
    """
    z, qkv, _ = mixer._project(x)
    qkv, _ = mixer.conv(qkv, None, None)
    tensors, v = mixer._operands(x, qkv)
    q, k, values, log_decay, *beta = (t[0].transpose(0, 1) for t in tensors)
    weights_of_keys = None
    if mixer.bucket_weights.key_weights is not None:
        weights_of_keys = (mixer.bucket_weights.key_weights.proj(x)[0].T + 2).sigmoid()
    scores = dense_bucket_scores(
        unit_length(q), unit_length(k), mixer.num_levels, mixer.partition, start, weights_of_keys
    )
    R, layer = HEADS.num_heads // HEADS.num_groups, mixer.bucket_weights
    logits, sharpness = layer.proj(x)[0].unflatten(-1, layer.shape).transpose(0, 1), SHARPNESS * layer.score_bias.tau
    weights = dense_routed_weights(logits, scores, sharpness, mixer.partition, start)
    if top_k is not None:
        weights = dense_top_k(weights, top_k)
    if mixer.variant.l2_normalize:
        q, k = unit_length(q), unit_length(k)
    q, k = (t.repeat_interleave(R, 0) for t in (mixer.variant.scale * q, k))
    dense = dense_delta_rule if beta else dense_scalar_gate
    read = dense(q, k, values, log_decay, *beta, weights, mixer.partition, start)
    return mixer._output(read.transpose(0, 1)[None], v, z)


@both_gates
@every_partition
def test_the_mixer_is_the_definition_with_every_gradient(variant: str, partition: Partition) -> None:
    for T, L in ((1, 2), (17, 3), (70, 6), (70, 40)):
        mixer, x = routed(variant, partition, L), hidden(T)
        for impl in ("auto", "reference") if T == 17 else ("auto",):
            mixer.impl = impl
            check_equal(mixer, x, mixer(x)[0], dense_output(mixer, x))


@both_gates
def test_without_weights_it_is_the_linear_model(variant: str) -> None:
    mixer, linear = (
        routed(variant, Partition(16, 16), 20),
        Mixer(HIDDEN, HEADS, variant=variant.removesuffix(SELECTIVE), num_levels=1).double(),
    )
    for p in mixer.bucket_weights.parameters():
        torch.nn.init.zeros_(p)
    own = {name: value for name, value in mixer.state_dict().items() if not name.startswith("bucket_weights")}
    linear.load_state_dict(own)
    x = hidden(300, B=2)
    torch.testing.assert_close(mixer(x)[0], linear(x)[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("tokens", [[1, 0, 0, 0], [16, 16, 16, 0], [3, 16, 0, 256], [7] * 4], ids=str)
def test_equal_numbers_give_exactly_one(tokens: list[int]) -> None:
    weights = BucketWeights(6, TWO_HEADS, 4, Routing(tau=0.0))
    scores = 100 * torch.randn(1, 5, 1, 4)
    w = weights(torch.randn(1, 5, 6), scores, torch.tensor(tokens).expand(1, 5, 4))
    assert torch.equal(w, (torch.tensor(tokens) > 0).float().expand(1, 5, 2, 4))


def test_the_start() -> None:
    weights = BucketWeights(6, TWO_HEADS, 4, Routing())
    assert (
        weights.score_bias.tau.tolist() == [1.0, 1.0] and not weights.proj.weight.any() and not weights.proj.bias.any()
    )
    assert BucketWeights(6, TWO_HEADS, 4, Routing(tau=0.5)).score_bias.initial_values()["tau"].tolist() == [0.5, 0.5]
    narrow = BucketWeights(6, TWO_HEADS, 4, Routing()).bfloat16()
    w = narrow(torch.randn(1, 3, 6).bfloat16(), torch.randn(1, 3, 1, 4), torch.ones(1, 3, 4, dtype=torch.long))
    assert w.dtype == torch.float32


@both_gates
@every_partition
@pytest.mark.parametrize("cuts", [[0, 1, 10, 10, 13, 90], [0, 40, 70]], ids=str)
def test_packed_is_separate_with_every_gradient(variant: str, partition: Partition, cuts: list[int]) -> None:
    mixer, x = routed(variant, partition), hidden(cuts[-1])
    packed, _ = mixer(x, Packing.from_cu_seqlens(torch.tensor(cuts), cuts[-1], 4))
    separate = [mixer(x[:, a:b])[0] for a, b in zip(cuts[:-1], cuts[1:], strict=True) if b > a]
    check_equal(mixer, x, packed, torch.cat(separate, 1))


@both_gates
def test_padded_is_separate(variant: str) -> None:
    mixer, x = routed(variant, Partition(4, 4)), hidden(50, B=3)
    mask = torch.ones(3, 50, dtype=torch.bool)
    mask[0, :20] = mask[1, 7:11] = mask[2, 45:] = False
    padded, state = mixer(x, Packing.from_mask(mask, 4), return_state=True)
    for row in range(3):
        alone, own = mixer(x[row : row + 1, mask[row]], return_state=True)
        torch.testing.assert_close(padded[row, mask[row]], alone[0], rtol=1e-10, atol=1e-11)
        for a, e in zip(state.sums.tensors, own.sums.tensors, strict=True):
            torch.testing.assert_close(a[row : row + 1], e, rtol=1e-10, atol=1e-11)


@both_gates
@every_partition
def test_pieces_are_the_whole_with_every_gradient(variant: str, partition: Partition) -> None:
    mixer, x = routed(variant, partition), hidden(90, B=2)
    state, outputs, start = None, [], 0
    for piece in (1, 20, 3, 1, 65):
        y, state = mixer(x[:, start : start + piece], state=state, return_state=True)
        outputs.append(y)
        start += piece
    check_equal(mixer, x, torch.cat(outputs, 1), mixer(x)[0])


@both_gates
@every_partition
@pytest.mark.parametrize("prompt", [1, 15, 16, 37])
def test_steps_are_the_whole(variant: str, partition: Partition, prompt: int) -> None:
    mixer, x = routed(variant, partition), hidden(90, B=2).detach()
    expected, state = mixer(x)[0], MixerDecodeState.of(mixer(x[:, :prompt], return_state=True)[1])
    skipped = torch.tensor([True, False])
    for t in range(prompt, 90):
        if t == 40:  # a row that is not active keeps its state, whatever it is given
            mixer.step(torch.full_like(x[:, :1], torch.nan), state, ~torch.ones(2, dtype=torch.bool))
            copy = MixerDecodeState.of(state.state())
            mixer.step(x[:, t : t + 1], copy, skipped)
            for own, other in ((state.decode.fenwick, copy.decode.fenwick), (state.sums.fenwick, copy.sums.fenwick)):
                assert all(torch.equal(a[1], b[1]) for a, b in zip(own.tensors, other.tensors, strict=True))
        y = mixer.step(x[:, t : t + 1], state)
        torch.testing.assert_close(y[:, 0], expected[:, t], rtol=1e-9, atol=1e-10)


@both_gates
@pytest.mark.parametrize("fault", ["another state", "log decay", "triton in float64"])
def test_a_step_that_raises_changes_no_state(variant: str, fault: str) -> None:
    mixer, x = routed(variant, Partition(4, 4)), hidden(8).detach()
    state = MixerDecodeState.of(mixer(x[:, :7], return_state=True)[1])
    text = "state.blocks|v must have shape"
    if fault == "another state":
        own = state.decode.fenwick
        sizes = dict(
            num_levels=mixer.num_levels, chunk_size=own.chunk_size, groups=own.k.shape[2], partition=own.partition
        )
        heads = dict(heads=own.v.shape[2], key_dim=own.k.shape[3], value_dim=own.v.shape[3] + 1)
        start = dict(delta_rule=own.beta is not None, dtype=torch.float64)
        state = state._replace(decode=DecodeState.zeros(1, **sizes, **heads, **start))
    elif fault == "log decay":
        text = "log_decay must be at most 0"
        operands = mixer._operands

        def with_growth(source: Any, qkv: torch.Tensor) -> Any:
            tensors, v = operands(source, qkv)
            return [*tensors[:3], torch.ones_like(tensors[3]), *tensors[4:]], v

        mixer._operands = with_growth
    else:
        text = "impl='torch'"
        mixer.impl = "triton"
    before = [part.clone() for part in state.tensors]
    with pytest.raises(ValueError, match=text):
        mixer.step(x[:, 7:], state)
    assert all(torch.equal(*pair) for pair in zip(state.tensors, before, strict=True))


@both_families
@every_partition
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_steps_read_the_buckets_of_the_largest_weights(variant: str, partition: Partition, top_k: int) -> None:
    """The prompt reads all buckets, every step those of the definition."""
    mixer, x = routed(variant, partition, 9, routing=Routing(top_k=top_k)).eval(), hidden(120).detach()
    few, full = dense_output(mixer, x, top_k), dense_output(mixer, x)
    for prompt in (1, 37):
        y, state = mixer(x[:, :prompt], return_state=True)
        torch.testing.assert_close(y, full[:, :prompt], rtol=1e-9, atol=1e-10)
        state = MixerDecodeState.of(state)
        for t in range(prompt, 120):
            torch.testing.assert_close(mixer.step(x[:, t : t + 1], state)[:, 0], few[:, t], rtol=1e-9, atol=1e-10)
    assert top_k > 2 or not torch.allclose(few, full)


@both_gates
def test_a_step_that_may_read_every_bucket_is_bit_for_bit_the_full_one(variant: str) -> None:
    mixer, x = routed(variant, Partition(4, 4), 9).eval(), hidden(100, B=2).detach()
    states = [MixerDecodeState.of(mixer(x[:, :5], return_state=True)[1]) for _ in range(3)]
    for t in range(5, 100):
        outputs = []
        for top_k, state in zip((None, 8, 100), states, strict=True):
            mixer.set_decode_top_k(top_k)
            outputs.append(mixer.step(x[:, t : t + 1], state))
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("top_k", [1, 2, 5, 6, 7])
def test_the_largest_weights_stay_as_they_are(top_k: int) -> None:
    weights = torch.rand(3, 1, 4, 7)
    ties = torch.randint(0, 3, (20, 1, 4, 7)).double()
    for w in (weights, ties, torch.ones(1, 1, 1, 7)):
        assert torch.equal(keep_largest(w, top_k), dense_top_k(w, top_k))
    assert keep_largest(weights, 6) is keep_largest(weights, None) is weights
    compiled = torch.compile(keep_largest, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(weights, top_k), keep_largest(weights, top_k))


@both_gates
@every_partition
@pytest.mark.parametrize("start", [3, 21, 64, 1000])
def test_a_sequence_from_a_start_is_the_definition_with_every_gradient(
    variant: str, partition: Partition, start: int
) -> None:
    """Its own tokens alone count."""
    for T, L in ((1, 2), (41, 3), (41, 9)):
        mixer, x = routed(variant, partition, L), hidden(T)
        for impl in ("auto", "reference") if L == 3 else ("auto",):
            mixer.impl = impl
            state = mixer.starting_at(torch.tensor([start]), x)
            check_equal(mixer, x, mixer(x, state=state)[0], dense_output(mixer, x, start=start))


@both_gates
def test_a_start_at_the_edge_of_every_block_is_a_start_at_0(variant: str) -> None:
    """All tokens of the sequence lie in one block, so nothing of their partition changes."""
    mixer, x = routed(variant, Partition(4, 4), 12), hidden(200, B=2)
    y = mixer(x, state=mixer.starting_at(torch.tensor([256, 3 * 1024]), x))[0]
    torch.testing.assert_close(y, mixer(x)[0], rtol=1e-10, atol=1e-11)


@both_gates
@every_partition
@pytest.mark.parametrize("top_k", [None, 2])
@torch.no_grad()
def test_prompts_and_steps_of_rows_at_starts_of_their_own(
    variant: str, partition: Partition, top_k: int | None
) -> None:
    """Prompts in pieces, then steps, of which not every row takes each; every output is the definition's."""
    starts, T, cuts = [0, 5, 21, 300], 70, (7, 1, 20)
    mixer, x = routed(variant, partition, 7, routing=Routing(top_k=top_k)).eval(), hidden(T, B=4)
    full, few = (
        torch.cat([dense_output(mixer, x[row : row + 1], k, start) for row, start in enumerate(starts)])
        for k in (None, top_k)
    )
    state, at = mixer.starting_at(torch.tensor(starts), x), 0
    for cut in cuts:
        y, state = mixer(x[:, at : at + cut], state=state, return_state=True)
        torch.testing.assert_close(y, full[:, at : at + cut], rtol=1e-9, atol=1e-10)
        at += cut
    decode, times, rows = MixerDecodeState.of(state), torch.full([4], at), torch.arange(4)
    decode.copy_(state)
    for turn in range(T - at):
        active = (rows + turn) % 3 > 0
        y = mixer.step(x[rows, times][:, None], decode, active)[:, 0]
        torch.testing.assert_close(y[active], few[rows, times][active], rtol=1e-9, atol=1e-10)
        times += active
    assert decode.sums.fenwick.first.tolist() == starts


@both_gates
def test_packed_sequences_start_at_positions_of_their_own(variant: str) -> None:
    mixer, starts, ends = routed(variant, Partition(4, 4), 9), [37, 0, 6, 250], torch.tensor([0, 25, 26, 26, 70])
    x = hidden(70)
    packing = Packing.from_cu_seqlens(ends, 70, mixer.conv.kernel)
    y, _ = mixer(x, packing, mixer.starting_at(torch.tensor(starts), x))
    spans = zip(starts, ends[:-1].tolist(), ends[1:].tolist(), strict=True)
    expected = [dense_output(mixer, x[:, a:b], start=start) for start, a, b in spans if b > a]
    check_equal(mixer, x, y, torch.cat(expected, 1))


@both_gates
def test_the_future_does_not_leak(variant: str) -> None:
    mixer, x = routed(variant, Partition(4, 4)), hidden(70)
    changed = x.detach().clone()
    changed[:, 43:] = 5.0
    torch.testing.assert_close(mixer(changed)[0][:, :43], mixer(x)[0][:, :43], rtol=0, atol=1e-13)


def test_mistakes_are_one_line() -> None:
    mixer, x = routed("mamba2", Partition(4, 4)), hidden(20).detach()
    plain = Mixer(HIDDEN, HEADS, variant="mamba2", num_levels=6, partition=Partition(4, 4), chunk_size=16).double()
    with_sums, without = (m(x, return_state=True)[1] for m in (mixer, plain))
    for text, call in (
        ("state must have sums, as a mixer with routing, got none", lambda: mixer(x, state=without)),
        ("state must have no sums, as a mixer without routing, got some", lambda: plain(x, state=with_sums)),
        (
            "state must have no sums, as a mixer without routing, got some",
            lambda: MixerDecodeState.of(without).copy_(MixerState(*with_sums)),
        ),
        (
            "routing must be one of gram, selective_gram or None, got 'keys'",
            lambda: routed("mamba2", Partition(4), routing=Routing("keys")),
        ),
        ("routing_tau must be a finite number of at least 0, got nan", lambda: Routing(tau=float("nan")).checked()),
        ("routing_tau must be a finite number of at least 0, got -0.5", lambda: Routing(tau=-0.5).checked()),
        (
            "decode_top_k must be an integer of at least 1 or None, got 0",
            lambda: routed("mamba2", Partition(4), routing=Routing(top_k=0)),
        ),
        (
            "decode_top_k must be an integer of at least 1 or None, got True",
            lambda: Routing(top_k=True).checked(),
        ),
        (
            "decode_top_k needs a routed read, got 2 without routing",
            lambda: plain.set_decode_top_k(2),
        ),
        (
            "decode_top_k must be None in training, which reads all buckets, got 2: call model.eval() to decode, or "
            "loglinear.models.set_decode_top_k(model, None) to train",
            lambda: routed("mamba2", Partition(4, 4), routing=Routing(top_k=2))(x),
        ),
        (
            "num_columns must be at least 2 (with one bucket its weight is 1), got 1",
            lambda: BucketWeights(6, TWO_HEADS, 1, Routing()),
        ),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            call()
