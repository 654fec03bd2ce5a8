"""A wrong argument gets one line that names it, what it was and what was expected."""

import subprocess
import sys

import pytest
import torch

from tests.ops.operators import OPERATORS

DELTA = OPERATORS[1]


def call(changes=None, **options):
    inputs = {name: x.detach() for name, x in DELTA.inputs(B=1, T=10).items()}
    return DELTA(inputs | (changes or {}), chunk_size=4, **options)


@pytest.mark.parametrize(
    "changes, options, text",
    [
        ({"q": torch.zeros(1, 10, 5)}, {}, r"q must have shape \[B, T, G, K\], got \[1, 10, 5\]"),
        ({"v": torch.zeros(10, 4, 3)}, {}, r"v must have shape \[B, T, H, V\] = \[1, 10, H, V\], got \[10, 4, 3\]"),
        ({"v": torch.zeros(1, 10, 3, 3)}, {}, r"H = 3 heads must be a multiple of q's G = 2"),
        ({"v": torch.zeros(1, 9, 4, 3)}, {}, r"v must have shape \[B, T, H, V\] = \[1, 10, H, V\], got \[1, 9, 4, 3\]"),
        ({"v": torch.zeros(1, 10, 0, 3)}, {}, r"v must not be empty"),
        (
            {"k": torch.zeros(1, 10, 2, 6)},
            {},
            r"k must have shape \[B, T, G, K\] = \[1, 10, 2, 5\], got \[1, 10, 2, 6\]",
        ),
        ({"log_decay": torch.zeros(1, 10)}, {}, r"log_decay must have shape \[B, T, H\] = \[1, 10, 4\]"),
        ({"beta": torch.zeros(1, 10, 5)}, {}, r"beta must have shape"),
        ({"beta": None}, {}, r"beta must be a tensor, got NoneType"),
        ({"level_scales": torch.zeros(1, 10, 4)}, {}, r"level_scales must have shape \[B, T, H, L\]"),
        ({"level_scales": torch.zeros(1, 10, 4, 0)}, {}, r"level_scales must not be empty, got shape \[1, 10, 4, 0\]"),
        (
            {"q": torch.zeros(1, 10, 2, 5, dtype=torch.int64)},
            {},
            r"q must hold floats of 16, 32 or 64 bits, got torch.int64",
        ),
        ({}, {"impl": "fast"}, r"impl must be one of \['auto', 'triton', 'torch', 'reference'\], got 'fast'"),
        ({}, {"cu_seqlens": torch.tensor([1, 10])}, r"cu_seqlens must start at 0, got 1"),
        ({}, {"cu_seqlens": torch.tensor([0, 9])}, r"cu_seqlens must end at T = 10, got 9"),
        ({}, {"cu_seqlens": torch.tensor([0, 7, 3, 10])}, r"cu_seqlens must not decrease, got \[0, 7, 3, 10\]"),
        ({}, {"cu_seqlens": torch.tensor([0.0, 10.0])}, r"cu_seqlens must hold integers, got torch.float32"),
        ({}, {"cu_seqlens": torch.tensor([[0, 10]])}, r"cu_seqlens must have shape \[N \+ 1\]"),
        ({}, {"cu_seqlens": torch.tensor([0])}, r"cu_seqlens must have shape \[N \+ 1\]"),
        ({}, {"cu_seqlens": [0, 10]}, r"cu_seqlens must be a tensor of integers, got list"),
        ({}, {"scale": None}, r"scale must be a number, got None"),
        ({}, {"initial_state": torch.zeros(3)}, r"initial_state must be a FenwickState, .* got Tensor"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_the_message_names_the_argument(changes, options, text):
    with pytest.raises(ValueError, match=text) as error:
        call(changes, **options)
    assert "\n" not in str(error.value)


def test_cu_seqlens_need_one_row():
    with pytest.raises(ValueError, match="packed batch with B = 1, got B = 2"):
        DELTA(DELTA.inputs(B=2, T=10), cu_seqlens=torch.tensor([0, 10]))


@pytest.mark.parametrize("chunk_size", [0, -4, 48, 64.0])
def test_chunk_size_must_be_a_power_of_two(chunk_size):
    with pytest.raises(ValueError, match=f"chunk_size must be a power of two, got {chunk_size}"):
        OPERATORS[0](OPERATORS[0].inputs(), chunk_size=chunk_size)


@pytest.mark.parametrize(
    "other, options, text",
    [
        (dict(B=2), dict(chunk_size=4), r"initial_state.position must have shape \[N\] = \[1\], got \[2\]"),
        (dict(L=12), dict(chunk_size=4), r"initial_state.blocks must have shape"),
        (dict(H=2), dict(chunk_size=4), r"initial_state.blocks must have shape"),
        (dict(), dict(chunk_size=8), r"initial_state was made with chunk_size 8, got chunk_size 4"),
    ],
)
def test_a_state_of_another_shape(other, options, text):
    state = DELTA(DELTA.inputs(**{"B": 1, **other}), output_final_state=True, **options).final_state
    with pytest.raises(ValueError, match=text):
        call(initial_state=state)


def test_a_state_of_the_other_operator():
    state = OPERATORS[0](OPERATORS[0].inputs(B=1), chunk_size=4, output_final_state=True).final_state
    with pytest.raises(ValueError, match="one of a scalar gate .no beta. and cannot continue the other operator"):
        call(initial_state=state)


def test_a_state_of_another_dtype():
    state = DELTA(DELTA.inputs(B=1), chunk_size=4, output_final_state=True).final_state
    with pytest.raises(ValueError, match="initial_state.position must hold integers, got torch.float32"):
        call(initial_state=state._replace(position=state.position.float()))
    with pytest.raises(ValueError, match="initial_state.blocks must hold float32 or float64, got torch.int64"):
        call(initial_state=state._replace(blocks=state.blocks.long()))


def test_impl_triton_without_triton_is_one_clear_line():
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from loglinear.ops import log_linear_attention as f\n"
        "x = torch.ones(1, 3, 1, 4)\n"
        "f(x, x, x, None, torch.ones(1, 3, 1, 2), impl='triton')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stderr.strip().splitlines()[-1].startswith("ValueError: impl='triton' needs the package triton")
