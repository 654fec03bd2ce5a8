"""A run that starts from an upgraded model: it trains the new parameters, and resumes bit for bit."""

import dataclasses
import json
import shutil

import pytest
import torch

import loglinear
from loglinear.convert import convert
from loglinear.models import ByteTokenizer, LogLinearConfig, LogLinearForCausalLM
from loglinear.runs.folder import read_run, run_recipe
from loglinear.runs.loading import load_model
from loglinear.training.train import train
from tests.cli.command_line import assert_one_line, in_process
from tests.training.tiny import assert_same_run, curve, tiny_recipe
from tests.upgrades.tiny import LANGUAGE_MODELS, original, upgraded

FAMILIES = pytest.mark.parametrize("family", LANGUAGE_MODELS)


def folder(family, path, **options):
    upgraded(original(family, torch.float32, vocab_size=264), **options).save_pretrained(path)
    ByteTokenizer().save_pretrained(path)
    return path


def assert_resumes(recipe, tmp_path):
    """A copy of the run in whole/ that lost its last checkpoint, of step 4, ends as it did."""
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoint-4")
    train(recipe, tmp_path / "resumed", resume=True, progress=False)
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")


@FAMILIES
def test_a_run_trains_the_new_parameters_and_resumes(family, data, tmp_path):
    start = folder(family, tmp_path / "start")
    recipe = tiny_recipe(data, start=str(start), steps=4, eval_every=2)
    train(recipe, tmp_path / "whole", progress=False)
    before, after = load_model(start), load_model(tmp_path / "whole")
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert changed == {*loglinear.new_parameters(after)}
    assert_resumes(recipe, tmp_path)


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_next"])
def test_a_run_that_trains_all_parameters_resumes(family, data, tmp_path):
    """Experts too, which transformers stores one by one."""
    recipe = tiny_recipe(data, start=str(folder(family, tmp_path / "start", freeze=False)), steps=4, eval_every=2)
    train(recipe, tmp_path / "whole", progress=False)
    assert_resumes(recipe, tmp_path)


def test_all_parameters_of_a_sixteen_bit_folder_take_small_steps(data, tmp_path):
    """In 16 bits a step that is small beside its weight rounds to nothing."""
    model = upgraded(original("mamba2", torch.bfloat16, vocab_size=264), freeze=False)
    model.save_pretrained(tmp_path / "start")
    ByteTokenizer().save_pretrained(tmp_path / "start")
    recipe = tiny_recipe(data, start=str(tmp_path / "start"), steps=4, eval_every=2, learning_rate=1e-4)
    train(recipe, tmp_path / "whole", progress=False)
    after = load_model(tmp_path / "whole")
    assert all((p != after.get_parameter(name)).any() for name, p in model.named_parameters())
    assert_resumes(recipe, tmp_path)


def test_a_model_that_decodes_with_few_buckets_is_refused_before_the_data_is_read(tmp_path):
    """In the recipe or in a folder, also in one of an upgraded model."""
    recipe = tiny_recipe(tmp_path / "none")
    few = {**recipe.model, "routing": "gram", "finest_block": 16, "decode_top_k": 2}
    LogLinearForCausalLM(LogLinearConfig(**few)).save_pretrained(tmp_path / "own")
    upgraded(original("mamba2", torch.float32, vocab_size=264), routing="gram").save_pretrained(tmp_path / "upgraded")
    file = tmp_path / "upgraded" / "config.json"
    config = json.loads(file.read_text())
    config["loglinear_upgrade"]["decode_top_k"] = 2
    file.write_text(json.dumps(config))
    starts = [tiny_recipe(tmp_path / "none", start=str(tmp_path / name)) for name in ("own", "upgraded")]
    text = (
        "decode_top_k must be null in the configuration of a model that is trained, which reads all buckets, got 2: "
        "change it in config.json"
    )
    for bad in (dataclasses.replace(recipe, model=few), *starts):
        with pytest.raises(ValueError, match=f"^{text}$"):
            train(bad, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_the_command_trains_a_folder(data, tmp_path, capsys):
    start, out = folder("qwen3_5", tmp_path / "start"), tmp_path / "out"
    capsys.readouterr()  # transformers' progress bar

    def run(*options):
        sizes = ["--steps", 2, "--seq-len", 32, "--batch-tokens", 64, "--eval-every", 2, "--save-every", 2]
        return in_process(capsys, "train", "--recipe", "demo", "--data", data, "--out", out, *sizes, *options)

    assert_one_line(run("--model", tmp_path), "it has neither config.json nor a folder checkpoint-STEP")
    assert_one_line(run("--model", start, "--num-levels", 3), "--num-levels and --model exclude each other")
    assert_one_line(
        run("--model", start, "--compile"),
        "compile needs a model of this library, and this run starts from an upgraded",
    )
    code, _, errors = run("--model", start)
    assert code == 0, errors
    model = load_model(out)
    new = sum(parameter.numel() for parameter in loglinear.new_parameters(model).values())
    assert f"only the new weights are trained, {new:,} of {model.num_parameters():,} parameters" in errors
    stored = read_run(out)
    assert stored["recipe"]["model"] == {} and stored["model"]["hidden_size"] == model.config.hidden_size
    assert stored["parameters"] == model.num_parameters()
    code, _, errors = in_process(capsys, "train", "--resume", "--out", out)
    assert code == 0 and "had finished" in errors
    code, _, errors = run("--model", out, "--out", tmp_path / "further")  # a run, whose last checkpoint has it all
    assert code == 0, errors
    recipe = run_recipe(tmp_path / "further")
    assert recipe.start == recipe.tokenizer == str(out / "checkpoint-2")


def test_a_folder_of_another_model_is_refused(data, tmp_path):
    original("mamba2", torch.float32).save_pretrained(tmp_path / "mamba2")
    with pytest.raises(ValueError, match="'mamba2' model of transformers: use `loglinear upgrade` or `loglinear conv"):
        train(tiny_recipe(data, start=str(tmp_path / "mamba2")), tmp_path / "run", progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_trains_a_converted_model_and_resumes(data, tmp_path, dtype):
    """All of its parameters, in float32."""
    original("mamba2", dtype, vocab_size=264).save_pretrained(tmp_path / "mamba2")
    ByteTokenizer().save_pretrained(tmp_path / "mamba2")
    convert(tmp_path / "mamba2", tmp_path / "start", source="transformers", num_levels=5)
    recipe = tiny_recipe(data, start=str(tmp_path / "start"), steps=4, eval_every=2)
    train(recipe, tmp_path / "whole", progress=False)
    before, after = load_model(tmp_path / "start"), load_model(tmp_path / "whole")
    assert after.config.num_levels == 5 and after.dtype == torch.float32
    assert all((p != after.get_parameter(name)).any() for name, p in before.named_parameters())
    assert_resumes(recipe, tmp_path)


@pytest.mark.parametrize("levels", [dict(num_levels=5), dict(num_levels=8, finest_block=4, radix=4, routing="gram")])
def test_a_run_trains_the_new_weights_of_a_converted_model_at_random_positions(data, tmp_path, levels):
    original("mamba2", torch.float32, vocab_size=264).save_pretrained(tmp_path / "mamba2")
    ByteTokenizer().save_pretrained(tmp_path / "mamba2")
    convert(tmp_path / "mamba2", tmp_path / "start", source="transformers", **levels)
    recipe = tiny_recipe(data, start=str(tmp_path / "start"), steps=4, eval_every=2, jitter=500, new_only=True)
    train(recipe, tmp_path / "whole", progress=False)
    before, after = load_model(tmp_path / "start"), load_model(tmp_path / "whole")
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert changed == {*loglinear.new_parameters(after)}
    assert_resumes(recipe, tmp_path)
    train(tiny_recipe(data, start=str(tmp_path / "start"), steps=4, eval_every=2, new_only=True), tmp_path / "aligned")
    assert curve(tmp_path / "aligned") != curve(tmp_path / "whole")


def test_new_weights_of_a_sixteen_bit_folder_take_small_steps(data, tmp_path):
    original("mamba2", torch.bfloat16, vocab_size=264).save_pretrained(tmp_path / "mamba2")
    ByteTokenizer().save_pretrained(tmp_path / "mamba2")
    convert(tmp_path / "mamba2", tmp_path / "start", source="transformers", num_levels=5)
    model = load_model(tmp_path / "start")
    with torch.no_grad():
        for parameter in loglinear.new_parameters(model).values():
            parameter.fill_(0.5)
    model.save_pretrained(tmp_path / "half")
    ByteTokenizer().save_pretrained(tmp_path / "half")
    recipe = tiny_recipe(data, start=str(tmp_path / "half"), steps=2, eval_every=2, learning_rate=1e-5, new_only=True)
    train(recipe, tmp_path / "run", progress=False)
    assert all((p != 0.5).float().mean() > 0.5 for p in loglinear.new_parameters(load_model(tmp_path / "run")).values())


def test_random_positions_and_new_weights_need_a_model_that_has_them(data, tmp_path):
    start = str(folder("qwen3_5", tmp_path / "start"))
    with pytest.raises(ValueError, match="jitter needs a model of this library, and this run starts from an upgr"):
        train(tiny_recipe(data, start=start, jitter=9), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="new_only needs a start from a folder"):
        tiny_recipe(data, new_only=True)
    model, attention = tiny_recipe(data).model, dict(layer_types=["full_attention"], num_attention_heads=2)
    for changes, got in ((dict(num_levels=1), "one level"), (attention, "softmax attention alone")):
        recipe = tiny_recipe(data, model={**model, **changes}, jitter=9)
        with pytest.raises(ValueError, match=f"jitter needs linear layers with 2 levels or more, got {got}"):
            train(recipe, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="jitter must be at least 1, got 0"):
        tiny_recipe(data, jitter=0)


@pytest.mark.parametrize(("jitter", "trained"), [(None, 7), (1, 7), (2, 8), (65, 8), (66, 9)])
def test_the_levels_that_random_starts_train_are_counted(data, tmp_path, capsys, jitter, trained):
    """With a jitter of J a sequence of 64 tokens ends at J + 62 at most."""
    model = {**tiny_recipe(data).model, "num_levels": 9}
    train(tiny_recipe(data, model=model, steps=1, jitter=jitter), tmp_path / "run")
    starts = f" that start below {jitter}" if jitter else ""
    assert (f"sequences of 64 tokens{starts} train {trained} of 9 levels" in capsys.readouterr().err) == (trained < 9)


def test_a_run_goes_on_from_the_end_of_another(whole, data, tmp_path):
    train(tiny_recipe(data, start=str(whole), steps=2, save_every=2), tmp_path / "run", progress=False)
    configs = [load_model(path).config.to_dict() for path in (tmp_path / "run", whole)]
    assert [config.pop("_name_or_path") for config in configs] and configs[0] == configs[1]
