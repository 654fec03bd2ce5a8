"""A block is one graph for torch.compile, whatever documents its rows pack, and computes what it does without."""

import copy

import pytest
import torch
from black_box import replace_kernels
from tiny_models import FULL, tiny_config

from loglinear.models import LogLinearForCausalLM
from loglinear.models.inputs import TokenLayout, token_layout
from loglinear.models.places import TokenPlaces
from loglinear.ops import impl_triton
from loglinear.training.compilation import compile_blocks
from loglinear.variants import VARIANTS
from tests.ops.operators import excess

WHOLE = dict(backend="aot_eager", fullgraph=True)  # a graph break raises


@pytest.fixture(autouse=True)
def _operator(monkeypatch):
    replace_kernels(monkeypatch)
    monkeypatch.setattr(impl_triton, "unsupported", lambda problem: None)  # float64, without the kernels
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def blocks(**options) -> tuple[LogLinearForCausalLM, LogLinearForCausalLM]:
    """The same model twice; the second one's blocks are compiled."""
    options = {"num_hidden_layers": 1, "num_heads": 2, "chunk_size": 16, "impl": "triton", **options}
    models = [LogLinearForCausalLM(tiny_config(**options)).train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    compile_blocks(models[1], **WHOLE)
    return models[0], models[1]


def packed_layout(model, x: torch.Tensor, ends: list[int] | None) -> TokenLayout:
    cu_seqlens = None if ends is None else torch.tensor(ends, dtype=torch.int32)
    return token_layout(model.config, TokenPlaces.of(x, cu_seqlens=cu_seqlens), x.device)


def output_and_gradients(model, ends: list[int] | None, layer: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(1)
    block, x = model.model.layers[layer], torch.randn(1, 21, 16).to(model.dtype).requires_grad_()
    y, _ = block(x, packed_layout(model, x, ends))
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])]


def compare(models, ends: list[int] | None, layer: int = 0) -> None:
    """The compiled block is as near to float64 as the eager one is, within a factor of 6."""
    exact = copy.deepcopy(models[0]).double()
    for e, a, c in zip(*(output_and_gradients(model, ends, layer) for model in (exact, *models)), strict=True):
        assert excess(c, a, e, size=1.0) <= 6  # that of the numbers whose differences small gradients are


@pytest.mark.interpreter
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_is_one_graph_of_the_same_function(variant):
    is_packed = variant in ("linear_attention", "mamba2", "gated_delta_net")
    impl = "torch" if VARIANTS[variant].diagonal_gate else "triton"  # whose kernels take no diagonal gate
    compare(blocks(variant=variant, impl=impl), [0, 2, 2, 21] if is_packed else None)
    assert graphs() == 1


@pytest.mark.interpreter
def test_blocks_share_a_graph_that_takes_any_number_of_documents():
    models = blocks(num_hidden_layers=2)
    for layer, ends in enumerate(([0, 5, 21], [0, 1, 3, 3, 21], [0, 21], [0, 0, 2, 4, 20, 21])):
        compare(models, ends, layer % 2)
    assert graphs() == 2  # of any number of documents, of one


@pytest.mark.interpreter
def test_blocks_of_a_hybrid_stay_within_the_compilers_limit():
    models = blocks(num_hidden_layers=2, layer_types=[FULL, "linear_attention"])
    compile_blocks(models[1], backend="eager")
    for ends in ([0, 5, 21], [0, 21], [0, 1, 3, 3, 21]):
        for is_training in (True, False):
            with torch.set_grad_enabled(is_training):
                for block in models[1].train(is_training).model.layers:
                    x = torch.randn(1, 21, 16)
                    block(x, packed_layout(models[1], x, ends))
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] == frames["total"] > 8  # the default limit, after which blocks would run as they are


def test_a_softmax_block_is_one_graph_around_its_documents():
    models = blocks(layer_types=[FULL])
    compare(models, None)
    compile_blocks(models[1], backend="aot_eager")
    compare(models, [0, 5, 21])
    compare(models, [0, 1, 3, 3, 21])
    before = graphs()
    compare(models, [0, 0, 2, 4, 20, 21])
    assert graphs() == before
