"""A run that starts from an upgraded model: it trains the new parameters, and resumes bit for bit."""

import shutil

import pytest
import torch

import loglinear
from loglinear.models import ByteTokenizer
from loglinear.runs.folder import run_recipe
from loglinear.runs.loading import load_model
from loglinear.training.train import train
from tests.cli.command_line import assert_one_line, in_process
from tests.training.tiny import assert_same_run, tiny_recipe
from tests.upgrades.tiny import MODELS, original, upgraded

FAMILIES = pytest.mark.parametrize("family", MODELS)


def folder(family, path, **options):
    upgraded(original(family, torch.float32, vocab_size=264), **options).save_pretrained(path)
    ByteTokenizer().save_pretrained(path)
    return path


@FAMILIES
def test_a_run_trains_the_new_parameters_and_resumes(family, data, tmp_path):
    start = folder(family, tmp_path / "start")
    recipe = tiny_recipe(data, start=str(start), steps=4, eval_every=2)
    train(recipe, tmp_path / "whole", progress=False)
    before, after = load_model(start), load_model(tmp_path / "whole")
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert changed == {*loglinear.new_parameters(after)}
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoint-4")
    train(recipe, tmp_path / "resumed", resume=True, progress=False)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next"])
def test_a_run_that_trains_all_parameters_resumes(family, data, tmp_path):
    """Experts too, which transformers stores one by one."""
    recipe = tiny_recipe(data, start=str(folder(family, tmp_path / "start", freeze=False)), steps=4, eval_every=2)
    train(recipe, tmp_path / "whole", progress=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoint-4")
    train(recipe, tmp_path / "resumed", resume=True, progress=False)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_all_parameters_of_a_sixteen_bit_folder_take_small_steps(data, tmp_path):
    """In 16 bits a step that is small beside its weight rounds to nothing."""
    model = upgraded(original("mamba2", torch.bfloat16, vocab_size=264), freeze=False)
    model.save_pretrained(tmp_path / "start")
    ByteTokenizer().save_pretrained(tmp_path / "start")
    recipe = tiny_recipe(data, start=str(tmp_path / "start"), steps=4, eval_every=2, learning_rate=1e-4)
    train(recipe, tmp_path / "whole", progress=False)
    after = load_model(tmp_path / "whole")
    assert all((p != after.get_parameter(name)).any() for name, p in model.named_parameters())
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoint-4")
    train(recipe, tmp_path / "resumed", resume=True, progress=False)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


def test_the_command_trains_a_folder(data, tmp_path, capsys):
    start, out = folder("qwen3_5", tmp_path / "start"), tmp_path / "out"
    capsys.readouterr()  # transformers' progress bar

    def run(*options):
        sizes = ["--steps", 2, "--seq-len", 32, "--batch-tokens", 64, "--eval-every", 2, "--save-every", 2]
        return in_process(capsys, "train", "--recipe", "demo", "--data", data, "--out", out, *sizes, *options)

    assert_one_line(run("--model", tmp_path), "it has neither config.json nor a folder checkpoint-STEP")
    assert_one_line(run("--model", start, "--num-levels", 3), "--num-levels and --model exclude each other")
    assert_one_line(
        run("--model", start, "--compile"), "compile needs a new model, and this run starts from an upgraded"
    )
    code, _, errors = run("--model", start)
    assert code == 0, errors
    assert loglinear.new_parameters(load_model(out))
    code, _, errors = in_process(capsys, "train", "--resume", "--out", out)
    assert code == 0 and "had finished" in errors
    code, _, errors = run("--model", out, "--out", tmp_path / "further")  # a run, whose last checkpoint has it all
    assert code == 0, errors
    recipe = run_recipe(tmp_path / "further")
    assert recipe.start == recipe.tokenizer == str(out / "checkpoint-2")


def test_a_folder_of_another_model_is_refused(whole, data, tmp_path):
    with pytest.raises(ValueError, match="a run starts from an upgraded model, and .* holds none: upgrade it first"):
        train(tiny_recipe(data, start=str(whole)), tmp_path / "run", progress=False)
