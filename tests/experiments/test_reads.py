"""The candidates of `experiments.reads` against the token-by-token definition and against the linear model."""

import copy
from pathlib import Path

import pytest
import torch

from experiments.reads import Read, adapt, compare
from experiments.reads.random_keys import share_found
from loglinear.evaluation.mqar.cells import RecallCell
from loglinear.evaluation.mqar.models import ALL_MODELS
from loglinear.models import LogLinearForCausalLM
from loglinear.ops.problem import unit_length
from tests.experiments.dense_reads import DenseMixer, absorbed, block_coefficients, linear_coefficients

CANDIDATES = [
    *("r16-f16-none", "r16-f16-keys", "r2-f16-keys", "r16-f64-keys", "r16-f1-gram", "r4-f4-qk", "r4-f16-energy"),
    *("r16-f16-keys-late-unerased", "r16-f16-keys-residual", "r4-f16-gram-eta"),
]

PAIRS = [
    *((base, read) for base in ("mamba2", "gated_delta_net") for read in CANDIDATES),
    ("gated_delta_net", "r16-f16-absorbed"),
]


def model(base: str, seed: int = 0) -> LogLinearForCausalLM:
    torch.manual_seed(seed)
    cell = RecallCell(model=base, dim=32, learning_rate=1e-2, seed=0)
    return LogLinearForCausalLM(cell.model_config()).double()


def routed(linear: LogLinearForCausalLM, read: str, length: int = 96) -> LogLinearForCausalLM:
    changed = copy.deepcopy(linear)
    adapt(changed, Read.parse(read), length)
    return changed.double()


def operands(T: int, delta: bool):
    torch.manual_seed(1)
    q, k = (torch.nn.functional.normalize(torch.randn(1, 2, T, 8, dtype=torch.float64), dim=-1) for _ in range(2))
    beta = torch.rand(1, 2, T, dtype=torch.float64) if delta else None
    return q, k, torch.randn(1, 2, T, 4, dtype=torch.float64), beta


def state(k, v, beta, start: int, stop: int):
    """Return S [B, H, K, V] after the tokens from start to stop, token by token, and the product P of transitions."""
    K = k.shape[-1]
    S, P = k.new_zeros(*k.shape[:2], K, v.shape[-1]), torch.eye(K, dtype=k.dtype).expand(*k.shape[:2], K, K)
    for s in range(start, stop):
        outer = k[:, :, s, :, None] * (1 if beta is None else beta[:, :, s, None, None])
        transition = torch.eye(K, dtype=k.dtype) - (0 if beta is None else outer * k[:, :, s, None, :])
        S, P = transition @ S + outer * v[:, :, s, None, :], transition @ P
    return S, P


@pytest.mark.parametrize("delta", [False, True])
def test_coefficients_are_those_of_the_recurrence(delta: bool) -> None:
    T, f = 24, 8
    q, k, v, beta = operands(T, delta)
    whole = linear_coefficients(q @ k.mT, k @ k.mT, beta) @ v
    parts = block_coefficients(q @ k.mT, k @ k.mT, beta, f).unflatten(3, (-1, f))
    for t in (0, 7, 8, 19, 23):
        S, _ = state(k, v, beta, 0, t + 1)
        torch.testing.assert_close(whole[:, :, t], torch.einsum("bhk,bhkv->bhv", q[:, :, t], S))
        for c in range(t // f + 1):
            S, _ = state(k, v, beta, c * f, min(t + 1, c * f + f))
            expected = torch.einsum("bhk,bhkv->bhv", q[:, :, t], S)
            torch.testing.assert_close(
                parts[:, :, t, c].unsqueeze(2) @ v[:, :, c * f : c * f + f], expected[:, :, None]
            )


def test_absorbed_is_the_length_that_a_block_takes() -> None:
    q, k, v, beta = operands(24, True)
    share = absorbed(q @ k.mT, k @ k.mT, beta, 8)
    for c in (0, 1):
        _, P = state(k, v, beta, c * 8, c * 8 + 8)
        left = torch.einsum("bhk,bhkj->bhj", q[:, :, 23], P).square().sum(-1)
        torch.testing.assert_close(share[:, :, 23, c], 1 - left)


@pytest.mark.parametrize(("base", "read"), PAIRS)
def test_chunks_give_the_definition_with_every_gradient(base: str, read: str) -> None:
    chunked = routed(model(base), read)
    for name, value in chunked.named_parameters():
        if ".routed." in name:
            torch.nn.init.normal_(value, std=0.5)
    dense = copy.deepcopy(chunked)
    for block in dense.model.layers:
        block.mixer.__class__ = DenseMixer
    tokens = torch.randint(8192, (2, 80))
    losses = [each(tokens, labels=tokens).loss for each in (chunked, dense)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, value), other in zip(chunked.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(
            value.grad, other.grad, rtol=1e-8, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("base", ["mamba2", "gated_delta_net"])
@pytest.mark.parametrize("read", CANDIDATES)
def test_neutral_weights_are_the_linear_model(base: str, read: str) -> None:
    linear = model(base)
    changed = routed(linear, read)
    for block in changed.model.layers:
        for name in ("temperature", "rho", "eta"):
            if hasattr(block.mixer.routed, name):
                getattr(block.mixer.routed, name).bias.data.fill_(name == "eta")
        if block.mixer.routed.read.unerased:
            object.__setattr__(block.mixer.routed.read, "unerased", False)
    tokens = torch.randint(8192, (2, 80))
    torch.testing.assert_close(changed(tokens).logits, linear(tokens).logits)


def test_absorbed_needs_the_delta_rule() -> None:
    with pytest.raises(ValueError, match="score absorbed needs the delta rule"):
        routed(model("mamba2"), "r16-f16-absorbed")(torch.randint(8192, (2, 80)))


@pytest.mark.parametrize(("base", "read"), PAIRS)
def test_candidates_are_causal_and_every_parameter_learns(base: str, read: str) -> None:
    changed = routed(model(base), read)
    tokens = torch.randint(8192, (2, 80))
    changed.eval()
    whole = changed(tokens).logits
    later = tokens.clone()
    later[:, 37:] = 5
    torch.testing.assert_close(changed(later).logits[:, :37], whole[:, :37])
    changed(tokens, labels=tokens).loss.backward()
    idle = [name for name, value in changed.named_parameters() if value.grad is None or not value.grad.any()]
    # Half of a residual's and of a late candidate's parameters wait for the other half.
    waiting = {"late": ("proj.weight", "conv.weight", "conv.bias"), "keys": ("conv.bias",)}
    allowed = next((names for option, names in waiting.items() if option in read), ())
    assert [name for name in idle if not name.endswith(allowed)] == []


def test_names() -> None:
    for name in CANDIDATES:
        assert Read.parse(Read.parse(name).name) == Read.parse(name)
        assert sorted(Read.parse(name).name.split("-")) == sorted(name.split("-"))
    for wrong in ("r16", "r16-f16-cats", "r3-f16-keys", "r16-f16-keys-soon"):
        with pytest.raises(ValueError):
            Read.parse(wrong)


def test_the_command_knows_its_grid_and_refuses_other_reads() -> None:
    assert all(f"{base}_{read}" in ALL_MODELS for base in ("mamba2", "gated_delta_net") for read in compare.GRID)
    for wrong, message in (("gram", "a read is named like"), ("r32-f16-gram", "read must have a radix of 2 to 16")):
        with pytest.raises(ValueError, match=message):
            compare.main(out=Path("nowhere"), read=[wrong])


@pytest.mark.parametrize("base", ["mamba2", "gated_delta_net"])
def test_the_chosen_read_is_that_of_the_library(base: str, monkeypatch) -> None:
    """The same weights give the same logits if the prototype scales q and k to length 1 once, as the library does."""
    scaled = (lambda x, dim: x) if base == "gated_delta_net" else (lambda x, dim: unit_length(x))
    monkeypatch.setattr("experiments.reads.mixer.F.normalize", scaled)
    prototype = routed(model(base), "r16-f16-gram", 256)
    library = LogLinearForCausalLM(
        RecallCell(model=f"routed_{base}", dim=32, learning_rate=1e-2, seed=0).model_config()
    )
    names = {"routed.bias_proj": "bucket_weights.proj", "routed.temperature.bias": "bucket_weights.score_bias.tau"}
    weights = {}
    for name, value in prototype.state_dict().items():
        torch.nn.init.normal_(value, std=0.3)
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = value
    library.double().load_state_dict(weights)
    ids = torch.randint(8192, (2, 80))
    torch.testing.assert_close(library(ids).logits, prototype(ids).logits, rtol=1e-8, atol=1e-8)


def test_a_score_finds_a_random_key_among_few_others() -> None:
    shares = [share_found(64, tokens, trials=100) for tokens in (64, 256, 1024)]
    assert shares[0] > 0.95 and shares[0] > shares[1] > shares[2] > 2 / 16
