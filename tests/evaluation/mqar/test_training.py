"""One cell: it learns, stops where that is good enough, and continues exactly after any kind of end."""

import dataclasses
import json
import shutil
import threading

import pytest
import torch
import torch._dynamo.utils

from loglinear.evaluation.mqar import run_cell, training
from loglinear.evaluation.mqar.folder import read_results
from loglinear.evaluation.mqar.training import initialise_as_torch
from loglinear.models import LogLinearForCausalLM
from tests.evaluation.mqar.tiny import TASK, AfterSteps, tiny_cell

NEVER = threading.Event()
SHORT = dataclasses.replace(TASK, examples=256, epochs=3)  # 8 steps an epoch


def exact(result):
    """Everything that does not measure time."""
    return {name: value for name, value in result.items() if name != "seconds"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("uninterrupted")


@pytest.fixture(scope="module")
def uninterrupted(folder):
    return run_cell(tiny_cell(task=SHORT), folder, NEVER)


def test_cell_learns_and_stops_at_the_first_validation_that_is_good_enough(tmp_path):
    task = dataclasses.replace(TASK, good_enough=0.95)
    cell = tiny_cell(model="log_linear_gated_delta_net", task=task)
    result = run_cell(cell, tmp_path, NEVER)
    accuracies = [record["accuracy"] for record in result["course"]]
    assert result["epochs"] == len(accuracies) < task.epochs and result["steps"] == 40 * len(accuracies)
    assert accuracies[-1] == result["validation_accuracy"] > 0.95 >= max([0, *accuracies[:-1]])
    assert result["test_accuracy"] > 0.9 and set(result["test_accuracy_by_pairs"]) == {"1", "2"}


def test_result_says_all_that_it_depends_on_and_checkpoints_are_gone(folder, uninterrupted):
    cell = tiny_cell(task=SHORT)
    assert read_results(folder, SHORT) == {cell.name: uninterrupted}
    assert [path.name for path in folder.rglob("*") if path.is_file()] == [f"{cell.name}.json"]
    precision = "bfloat16 autocast" if torch.cuda.is_available() else "float32"
    assert uninterrupted["cell"] == cell.to_dict() and uninterrupted["precision"] == precision
    assert (uninterrupted["epochs"], uninterrupted["steps"]) == (3, 24) and uninterrupted["seconds"] > 0
    assert {"torch", "device"} <= set(uninterrupted["versions"]) and uninterrupted["command"]


def test_damage_to_a_result_is_named_and_a_file_without_checksum_is_read(tmp_path, folder, uninterrupted):
    """One digit of a number, which is JSON as before."""
    (file,) = (shutil.copytree(folder, tmp_path / "copy") / "cells").iterdir()
    text, seconds = file.read_text(), json.loads(file.read_text())["seconds"]
    file.write_text(text.replace(f'"seconds": {seconds}', f'"seconds": {seconds + 1}'))
    with pytest.raises(ValueError, match=f"{file.name} is damaged: it differs from its checksum"):
        read_results(tmp_path / "copy", SHORT)
    file.write_text(json.dumps(uninterrupted))  # as earlier versions wrote it
    assert read_results(tmp_path / "copy", SHORT) == {tiny_cell(task=SHORT).name: uninterrupted}


def test_seed_changes_the_result(tmp_path, uninterrupted):
    assert run_cell(tiny_cell(seed=1, task=SHORT), tmp_path, NEVER)["course"] != uninterrupted["course"]


@pytest.mark.parametrize("steps", [8, 11], ids="stopped every {} steps".format)
def test_stopped_cell_continues_bit_for_bit(tmp_path, uninterrupted, steps):
    """8 is an epoch: the flag is set at the step that is validated."""
    cell, stops, result = tiny_cell(task=SHORT), 0, None
    while result is None:
        result = run_cell(cell, tmp_path, AfterSteps(steps) if stops < 2 else NEVER)
        stops += result is None
    assert stops == 2 and exact(result) == exact(uninterrupted)


def test_jittered_cell_learns_and_continues_bit_for_bit(tmp_path):
    cell = tiny_cell(model="log_linear_gated_delta_net", task=dataclasses.replace(TASK, jitter=True, epochs=2))
    whole = run_cell(cell, tmp_path / "whole", NEVER)
    assert whole["cell"]["task"]["jitter"] and whole["test_accuracy"] > 0.8
    assert run_cell(cell, tmp_path, AfterSteps(50)) is None
    assert exact(run_cell(cell, tmp_path, NEVER)) == exact(whole)


def test_flag_that_is_set_already_starts_nothing(tmp_path):
    assert run_cell(tiny_cell(), tmp_path, AfterSteps(0)) is None and not any(tmp_path.iterdir())


def test_killed_cell_continues_from_its_last_epoch(tmp_path, uninterrupted):
    cell = tiny_cell(task=SHORT)
    with pytest.raises(MemoryError):
        run_cell(cell, tmp_path, AfterSteps(21, kill=True))
    assert [path.name for path in (tmp_path / "unfinished" / cell.name).glob("checkpoint-*")] == ["checkpoint-16"]
    assert exact(run_cell(cell, tmp_path, NEVER)) == exact(uninterrupted)


@pytest.mark.parametrize(("good_enough", "epochs"), [(0.01, 1), (1.0, 2)])
def test_cell_that_was_killed_behind_its_training_trains_no_further(tmp_path, monkeypatch, good_enough, epochs):
    cell = tiny_cell(task=dataclasses.replace(SHORT, good_enough=good_enough, epochs=2))
    reference = run_cell(cell, tmp_path / "reference", NEVER)

    def killed(*arguments):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("loglinear.evaluation.mqar.training.finish", killed)
        run_cell(cell, tmp_path / "killed", NEVER)
    assert exact(run_cell(cell, tmp_path / "killed", NEVER)) == exact(reference) and reference["epochs"] == epochs


def test_checkpoints_of_another_task_are_refused(tmp_path):
    assert run_cell(tiny_cell(task=SHORT), tmp_path, AfterSteps(1)) is None
    with pytest.raises(ValueError, match="cell.json was made with examples = 256, got 1280: choose another --out"):
        run_cell(tiny_cell(), tmp_path, NEVER)


@pytest.mark.gpu
def test_cell_learns_in_bfloat16_on_a_gpu_and_continues(tmp_path):
    cell = tiny_cell(model="log_linear_gated_delta_net")
    assert run_cell(cell, tmp_path, AfterSteps(50)) is None
    result = run_cell(cell, tmp_path, NEVER)
    assert result["precision"] == "bfloat16 autocast" and result["test_accuracy"] > 0.9


def test_zoology_trains_as_the_tasks_authors_do(tmp_path, monkeypatch):
    """PyTorch's start values, outputs divided by the root of two layers, everything decayed, no clipping, float32, and
    a learning rate that falls once an epoch."""
    task = dataclasses.replace(SHORT, protocol="zoology", length=32)
    seen = []
    step = torch.optim.AdamW.step

    def record(self, *args, **kwargs):
        seen.append([(group["lr"], group["weight_decay"], len(group["params"])) for group in self.param_groups])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    result = run_cell(tiny_cell(model="log_linear_mamba2", task=task), tmp_path, NEVER)
    assert result["precision"] == "float32" and len(seen) == task.epochs * task.steps_per_epoch
    rates = [max(rate for rate, _, _ in groups) for groups in seen]
    epochs = [rates[task.steps_per_epoch * epoch] for epoch in range(task.epochs)]
    assert len(set(rates)) == task.epochs and epochs == pytest.approx([1e-2, 0.75e-2, 0.25e-2])
    assert all(decay == task.weight_decay for groups in seen for _, decay, size in groups if size)


def test_initialise_as_torch_leaves_what_starts_at_zero():
    def linear_maps(name):
        model = LogLinearForCausalLM(tiny_cell(model=name, dim=64).model_config())
        initialise_as_torch(model)
        return dict(model.model.layers.named_modules())

    layers = linear_maps("log_linear_mamba2_unit")
    assert not layers["0.mixer.level_scales.proj"].weight.any()
    bound = 64**-0.5  # of PyTorch's uniform start values
    weight = layers["0.mixer.in_proj"].weight
    assert 0.9 * bound < weight.abs().max() <= bound
    out = layers["0.mixer.out_proj"].weight
    bound = out.shape[1] ** -0.5 / 2**0.5
    assert 0.9 * bound < out.abs().max() <= bound * 1.0001
    published = linear_maps("log_linear_mamba2")["0.mixer.level_scales.proj"].weight
    assert published.abs().max() > 0.9 * 64**-0.5


def test_compiled_blocks_train_as_eager_ones_and_other_cells_of_the_model_compile_nothing_again(tmp_path):
    task = dataclasses.replace(SHORT, examples=256, epochs=1, length=16)
    compiled = {}
    torch._dynamo.utils.counters.clear()
    for seed in (0, 1):
        cell = tiny_cell(model="log_linear_mamba2", seed=seed, task=task)
        compiled[seed] = run_cell(cell, tmp_path / "compiled", NEVER, compile=True)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "one length of examples"
    eager = run_cell(tiny_cell(model="log_linear_mamba2", task=task), tmp_path / "eager", NEVER)
    assert compiled[0]["compiled"] and not eager["compiled"]
    assert compiled[0]["course"][-1]["loss"] == pytest.approx(eager["course"][-1]["loss"], rel=1e-5)
    assert compiled[0]["course"] != compiled[1]["course"]


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("model", ["mamba2", "routed_mamba2", "attention"])
@pytest.mark.parametrize("protocol", ["zoology", "loglinear"])
def test_recorded_steps_train_as_the_trainer_does(tmp_path, monkeypatch, model, protocol, compile):
    task = dataclasses.replace(SHORT, protocol=protocol, length=64, pairs=(4, 6), vocab_size=32, good_enough=1.0)
    cell = tiny_cell(model=model, task=task)
    recorded = run_cell(cell, tmp_path / "recorded", NEVER, compile=compile)
    monkeypatch.setattr(training.RecallTrainer, "record_graphs", lambda self: None)
    eager = run_cell(cell, tmp_path / "eager", NEVER)
    for ours, expected in zip(recorded["course"], eager["course"], strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=2e-2)
