"""Runs with compiled blocks: the names of parameters, exact resume, and one line where there is no compiler."""

import importlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from loglinear.data.packing import pack
from loglinear.models import LogLinearForCausalLM
from loglinear.runs.folder import check_same_recipe, run_recipe, write_run
from loglinear.runs.json_files import read_object, write_object
from loglinear.training.compilation import compile_blocks, in_few_sizes, require_compiler
from tests.models.black_box import replace_kernels
from tests.training.test_train import assert_same_run, curve
from tests.training.tiny import tiny_recipe, write_text

training = importlib.import_module("loglinear.training.train")  # the package has a function of that name


@pytest.fixture
def compiled_recipe(tmp_path, monkeypatch):
    """The backend "eager" needs no compiler: it runs what was traced."""
    torch._dynamo.reset()
    replace_kernels(monkeypatch)
    monkeypatch.setattr(training, "require_compiler", lambda device: None)
    monkeypatch.setattr(training, "compile_blocks", partial(compile_blocks, backend="eager"))
    recipe = tiny_recipe(write_text(tmp_path / "text"), steps=4, compile=True)
    return replace(recipe, model={**recipe.model, "impl": "triton"})


def train_in_two_pieces(recipe, out, monkeypatch):
    """Killed at the third step, and continued."""
    append = training.RunLog._append

    def append_and_stop(log, **record):
        append(log, **record)
        if record["step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training.RunLog, "_append", append_and_stop)
        with pytest.raises(KeyboardInterrupt):
            training.train(recipe, out, progress=False)
    training.train(recipe, out, resume=True, progress=False)


def losses(out):
    return np.array([line["loss"] for line in curve(out)])


def write_short_texts(folder):
    """Beside longer ones: then some rows have few documents and others many."""
    for number in range(100):
        (folder / f"short{number}.txt").write_text("abcdefghij"[: number % 10 + 1])
    return folder


@pytest.mark.interpreter
def test_a_compiled_run_is_recorded_resumes_exactly_and_keeps_names(tmp_path, compiled_recipe, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    training.train(compiled_recipe, whole, progress=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert run_recipe(whole) == compiled_recipe
    weights = load_file(whole / "checkpoint-4" / "model.safetensors")
    model = LogLinearForCausalLM(compiled_recipe.model_config())
    assert weights.keys() == model.state_dict().keys() - {"lm_head.weight"}  # tied

    train_in_two_pieces(compiled_recipe, stopped, monkeypatch)
    assert_same_run(stopped, whole)


LAYERS = {
    "mamba2": dict(variant="mamba2"),
    "gated_delta_net": dict(variant="gated_delta_net"),
    "full_attention": dict(layer_types=["full_attention"]),
    "torch": dict(variant="gated_delta_net", impl="torch"),
    "routed": dict(variant="mamba2", radix=4, finest_block=16, num_levels=8, routing="gram"),
}
PARTS = {"full_attention": 2, "torch": 2, "routed": 2}  # before and behind what no graph takes


@pytest.mark.gpu
@pytest.mark.parametrize("layers", LAYERS)
def test_cuda_graphs_train_as_eager_mode_does_and_resume_exactly(tmp_path, monkeypatch, layers):
    text = write_short_texts(write_text(tmp_path / "text"))  # some rows have 8 documents, others 30
    recipe = tiny_recipe(text, steps=12, batch_tokens=1024, micro_batch_tokens=512)
    recipe = replace(recipe, model={**recipe.model, **LAYERS[layers]})
    trees = importlib.import_module("torch._inductor.cudagraph_trees").CUDAGraphTreeManager
    record, recorded = trees.record_function, []
    monkeypatch.setattr(trees, "record_function", lambda *args: recorded.append(args) or record(*args))
    runs = {}
    for name, compiled in (("eager", False), ("graphs", True)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        training.train(recipe.override(compile=compiled), tmp_path / name, progress=False)
        runs[name] = losses(tmp_path / name)
    np.testing.assert_allclose(runs["graphs"], runs["eager"], rtol=5e-3)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    assert (
        0 < len(recorded) <= 3 * 3 * PARTS.get(layers, 1)
    )  # forward, backward and validation for rows of 8, 16 and 32, and no pairs
    if layers == "full_attention":
        return  # the gradients of flash attention are sums in no fixed order
    train_in_two_pieces(recipe.override(compile=True), tmp_path / "stopped", monkeypatch)
    assert_same_run(tmp_path / "stopped", tmp_path / "graphs")


@pytest.mark.interpreter
def test_what_graphs_need_changes_no_training(tmp_path, compiled_recipe, monkeypatch):
    """All that a GPU's training has for its graphs, without recording: two rows a step, with few documents and many."""
    write_short_texts(tmp_path / "text")
    recipe = replace(compiled_recipe, batch_tokens=256, micro_batch_tokens=128)
    training.train(recipe, tmp_path / "plain", progress=False)
    monkeypatch.setattr(training, "_can_record", lambda device: True)
    training.train(recipe, tmp_path / "graphs", progress=False)
    np.testing.assert_allclose(losses(tmp_path / "graphs"), losses(tmp_path / "plain"), rtol=1e-5)


def test_resuming_without_the_compiler_is_refused(tmp_path, compiled_recipe):
    write_run(tmp_path, compiled_recipe, {}, parameters=1, model=compiled_recipe.model_config())
    with pytest.raises(ValueError, match="compile = True, which cannot resume with False"):
        check_same_recipe(tmp_path, compiled_recipe.override(compile=False))


def test_a_run_of_before_there_was_compile_resumes(tmp_path):
    recipe = tiny_recipe(tmp_path)
    write_run(tmp_path, recipe, {}, parameters=1, model=recipe.model_config())
    written = read_object(tmp_path / "run.json")
    assert written["recipe"].pop("compile") is False
    del written["sha256"]  # those runs had no checksum either
    write_object(tmp_path / "run.json", written)
    check_same_recipe(tmp_path, recipe)


def test_no_compiler_is_one_clear_line(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(ValueError, match="^compile needs a working compiler for cpu; use --no-compile: [^\n]+$"):
        require_compiler(torch.device("cpu"))


@pytest.mark.parametrize("layer", ["linear_attention", "full_attention"])
@pytest.mark.parametrize(("documents", "size"), [(1, 1), (5, 8), (17, 32), (32, 32), (33, 64), (65, 96)])
def test_empty_sequences_behind_a_row_change_nothing(tmp_path, layer, documents, size):
    config = tiny_recipe(tmp_path).model_config()
    config.layer_types = [layer]
    torch.manual_seed(0)
    model = LogLinearForCausalLM(config).double()
    row = {**pack([np.arange(n % 5 + 1) for n in range(documents)]), "initial_position": 7 * torch.arange(documents)}
    padded = in_few_sizes(row)
    assert len(padded["cu_seqlens"]) == 1 + size
    results = []
    for inputs in (row, padded):
        model.zero_grad()
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)  # sums over more rows may round otherwise
