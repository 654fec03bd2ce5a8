"""The upgrade experiment in miniature: every continuation, in pieces as if in one, from the linear model's logits."""

import dataclasses
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import loglinear
from experiments import upgrade
from experiments.recipes.needle import needle
from experiments.recipes.upgrade import (
    BASE,
    BASE_SEED,
    CONTINUATIONS,
    FULL,
    MINIATURE,
    base_recipe,
    continuation,
    found_recipe,
)
from experiments.results import read_seeds, result_file
from loglinear.cli.console import Interrupted
from loglinear.runs.checkpoints import checkpoints
from loglinear.runs.json_files import read_object
from loglinear.runs.loading import load_model
from loglinear.runs.provenance import versions

TEXT = "a line of text, and another one of it.\n" * 800  # of which an evaluation reads a part


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The runs and results of one seed in three calls, and of the same and another seed in one."""
    folder = tmp_path_factory.mktemp("upgrade")
    (folder / "text.txt").write_text(TEXT)
    shared = dict(data=[str(folder / "text.txt")], examples=1, miniature=True, tokens=folder / "tokens")
    pieces = dict(out=folder / "pieces", results=folder / "pieces", seed=[0], **shared)
    stops = [f"stopped at step {step} of 4" for step in (1, 2, 3)]
    for stop in (*stops, "stopped before linear of seed 0", "stopped at step 1 of 2"):
        with pytest.raises(Interrupted, match=stop):
            upgrade.run(**pieces, minutes=1e-9)
    upgrade.run(**pieces)
    upgrade.run(out=folder / "whole", results=folder / "whole", seed=[0, 1], **shared)
    with pytest.raises(ValueError, match="of a run that differs in examples"):
        upgrade.run(**{**pieces, "examples": 2})
    return folder


def result(folder, name):
    return read_object(result_file(folder / "miniature", f"upgrade-{name}", BASE_SEED if name == BASE else 0))


@pytest.mark.parametrize("kind", upgrade.KINDS)
def test_pieces_give_what_one_call_gives(folder, kind):
    pieces, whole = result(folder / "pieces", kind), result(folder / "whole", kind)
    assert pieces["training"]["curve"] == whole["training"]["curve"] and pieces["evaluation"] == whole["evaluation"]
    assert pieces["versions"] == versions() and pieces["command"]


def test_every_model_answers_the_same_examples_and_has_its_state(folder):
    runs = read_seeds(folder / "whole/miniature", "upgrade", upgrade.KINDS)
    assert [*runs] == [*upgrade.KINDS] and [len(seeds) for seeds in runs.values()] == [1, 2, 2, 2, 2, 2]
    for seeds in runs.values():
        for one in seeds:
            tasks = one["evaluation"]["tasks"]
            assert {tuple(score["length"] for score in scores) for scores in tasks.values()} == {(1024, 2048)}
            perplexity = one["evaluation"]["perplexity"]
            assert perplexity["bits_per_byte"] > 0 and perplexity["tokens"] < 2 * MINIATURE.text < len(TEXT)
    sizes = {kind: seeds[0]["evaluation"]["state_bytes"] for kind, seeds in runs.items()}
    assert sizes["base"] == sizes["linear"] < sizes["levels_new"] == sizes["levels_all"] < sizes["routed_new"]


@pytest.mark.parametrize("form", ["levels", "routed"])
@torch.no_grad()
def test_the_upgraded_model_starts_with_the_linear_model_s_logits(folder, form):
    linear, new = (load_model(folder / f"whole/{name}").double() for name in ("linear-start", f"{form}-start"))
    ids = torch.randint(0, 256, (1, 300), generator=torch.Generator().manual_seed(0))
    right = linear(ids).logits
    assert torch.allclose(new(ids).logits, right, rtol=0, atol=1e-10 * right.abs().max().item())


@pytest.mark.parametrize("kind", CONTINUATIONS)
def test_a_continuation_trains_what_its_name_says(folder, kind):
    form, new_only = CONTINUATIONS[kind]
    before = load_model(upgrade.start_folder(kind, folder / "whole"))
    after = load_model(folder / "whole/seed0" / kind)
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    new = set() if form == "linear" else {*loglinear.new_parameters(after)}
    every = {name for name, _ in after.named_parameters()}
    assert changed == (new if new_only else every)


def test_the_full_experiment_trains_every_level_of_its_longest_examples():
    sizes = FULL
    assert max(sizes.lengths) == sizes.longest
    count, longest = (int(number) for number in sizes.data[0].split(":")[1:3])
    read = sizes.steps * base_recipe().batch_tokens
    assert longest <= 3 * sizes.window  # bytes; a token has 3.2, so a window holds every document with its questions
    assert count * longest / math.log(longest / 200) / 3.2 > read  # lengths are log-uniform: no document is read twice
    base = base_recipe()
    for kind, (form, new_only) in CONTINUATIONS.items():
        recipe = continuation(base, kind, sizes, Path("start"))
        assert recipe.jitter == (None if form == "linear" else sizes.longest - recipe.seq_len)
        assert recipe.new_only == (new_only or None) and recipe.steps == sizes.steps
        free = dataclasses.replace(recipe, name="", summary="", jitter=None, new_only=None, learning_rate=1.0)
        other = continuation(base, "linear", sizes, Path("start"))
        assert free == dataclasses.replace(other, name="", summary="", learning_rate=1.0)  # as many steps, same text


@pytest.mark.parametrize("kind", CONTINUATIONS)
def test_a_needle_model_goes_on_by_the_same_recipe(kind):
    one, own = (
        continuation(base, kind, FULL, Path("start"))
        for base in (found_recipe(needle("linear_states4")), base_recipe())
    )
    assert one.name == f"upgrade_needle_linear_states4_{kind}"
    assert dataclasses.replace(one, name="", seed=0) == dataclasses.replace(own, name="", seed=0)


def test_the_table_has_a_row_for_each_model(folder, capsys):
    upgrade.show(folder / "whole/miniature")
    lines = capsys.readouterr().out.splitlines()
    assert [kind for kind in upgrade.KINDS for line in lines if f" {kind} " in line] == [*upgrade.KINDS]


def test_another_machine_goes_on_from_the_results_and_the_linear_starts(folder):
    """The kinds run there in calls of their own, and give what one call of everything gives."""
    moved, kinds = folder / "moved", ("levels_all", "routed_new")
    shutil.copytree(folder / "whole/linear-start", moved / "linear-start")
    shutil.copytree(folder / "whole/miniature", moved / "miniature")
    for kind in kinds:
        (moved / f"miniature/upgrade-{kind}.json").unlink()
    for kind in kinds:
        upgrade.run(
            out=moved,
            results=moved,
            seed=[0],
            kind=[kind],
            data=[str(folder / "text.txt")],
            examples=1,
            miniature=True,
            tokens=folder / "tokens",
        )
        ours, whole = result(moved, kind), result(folder / "whole", kind)
        assert ours["training"]["curve"] == whole["training"]["curve"] and ours["evaluation"] == whole["evaluation"]
    assert {path.name for path in (moved / "seed0").iterdir()} == {*kinds} and not (moved / BASE).exists()


def test_no_continuation_starts_from_a_linear_model_that_is_half_trained(folder, tmp_path):
    """Another machine finished it, and its result came back without the run."""
    base = tmp_path / BASE
    shutil.copytree(folder / "whole" / BASE, base)
    shutil.rmtree(base / "checkpoint-4")
    shutil.copytree(folder / "whole/miniature", tmp_path / "miniature")
    (tmp_path / "miniature/upgrade-linear.json").unlink()
    given = dict(out=tmp_path, results=tmp_path, data=[str(folder / "text.txt")], examples=1, miniature=True)
    with pytest.raises(ValueError, match=f"{base} is at step 2 of 4, but its result is there: put the finished"):
        upgrade.run(**given, seed=[0], kind=["base", "linear"], tokens=folder / "tokens")
    assert not (tmp_path / "linear-start").exists()


def test_processes_at_once_share_one_linear_model(folder, tmp_path):
    """Whoever comes second waits for it, and for the upgraded model that both continue."""
    program = [sys.executable, "-m", "experiments.upgrade", "run", "--miniature", "--examples", "1"]
    shared = ["--data", str(folder / "text.txt"), "--tokens", str(folder / "tokens")]
    shared += ["--out", str(tmp_path), "--results", str(tmp_path)]
    kinds = ["--kind", "base", "--kind", "levels_new"]
    runs = [subprocess.Popen([*program, *shared, *kinds, "--seed", seed]) for seed in ("0", "1")]
    assert [run.wait() for run in runs] == [0, 0]
    for kind in (BASE, "levels_new"):
        assert result(tmp_path, kind)["training"]["curve"] == result(folder / "whole", kind)["training"]["curve"]
    assert len([*(tmp_path / "miniature").iterdir()]) == 3


def test_continuations_start_from_the_linear_model_in_bfloat16(folder):
    start, base = (load_model(folder / f"whole/{name}") for name in ("linear-start", BASE))
    rounded = {name: tensor.bfloat16().float() for name, tensor in base.state_dict().items()}
    assert {name: tensor.float() for name, tensor in start.state_dict().items()}.keys() == rounded.keys()
    assert all(torch.equal(tensor.float(), rounded[name]) for name, tensor in start.state_dict().items())
    size = sum(file.stat().st_size for file in (folder / "whole/linear-start").glob("*.safetensors"))
    assert size < 0.6 * 4 * sum(tensor.numel() for tensor in rounded.values())


def test_a_continuation_without_its_linear_model_is_refused(tmp_path):
    options = dict(out=tmp_path / "run", miniature=True, tokens=tmp_path / "tokens", seed=[0])
    with pytest.raises(ValueError, match="there is no trained linear model .*linear-start: run --kind base"):
        upgrade.run(**options, kind=["linear"])
    with pytest.raises(ValueError, match="--kind must be one of base, linear, .* got 'other'"):
        upgrade.run(**options, kind=["other"])
    assert not (tmp_path / "tokens").exists() and not (tmp_path / "run").exists()


def test_a_tokenizer_that_is_missing_is_known_before_training(tmp_path):
    with pytest.raises(ValueError, match="there is no tokenizer .*: run `python -m experiments.needle prepare` first"):
        upgrade.run(tmp_path / "run", tokenizer=tmp_path / "none")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def found(folder):
    """The results of continuations of a finished run, which another experiment might have trained."""
    out, kinds = folder / "found", ["base", "linear", "levels_new"]
    upgrade.run(out, base=folder / "whole" / BASE, results=out, kind=kinds, **of_found(folder))
    return out


def of_found(folder):
    return dict(data=[str(folder / "text.txt")], examples=1, miniature=True, tokens=folder / "tokens")


def test_a_finished_run_is_continued_as_the_experiment_s_own_base_is(folder, found):
    """The seed is that of the run. Without training the run itself gets the result that it has in the experiment."""
    name = f"{base_recipe(miniature=True).name}-{BASE_SEED}"
    assert {path.name for path in (found / name).iterdir() if path.is_dir()} == {
        "linear-start",
        "levels-start",
        f"seed{BASE_SEED}",
    }
    one, own = (
        read_object(result_file(folder / path, name, BASE_SEED))
        for path, name in (("found/miniature", "upgrade-needle-base"), ("whole/miniature", "upgrade-base"))
    )
    assert one["evaluation"] == own["evaluation"] and one["training"] == own["training"]
    upgrade.run(folder / "whole", results=folder / "other", seed=[BASE_SEED], kind=["levels_new"], **of_found(folder))
    again = result_file(folder / "other/miniature", "upgrade-levels_new", BASE_SEED)
    there = result_file(found / "miniature", "upgrade-needle-levels_new", BASE_SEED)
    assert read_object(again)["training"]["curve"] == read_object(there)["training"]["curve"]


def test_a_second_call_trains_nothing_and_shows_the_same_table(folder, found, capsys):
    files = {file: file.read_bytes() for file in (found / "miniature").iterdir()}
    capsys.readouterr()
    kinds = ["base", "linear", "levels_new"]
    upgrade.run(found, base=folder / "whole" / BASE, results=found, kind=kinds, **of_found(folder))
    lines = capsys.readouterr().out.splitlines()
    assert [kind for kind in kinds for line in lines if f" {kind} " in line] == kinds
    assert {file: file.read_bytes() for file in (found / "miniature").iterdir()} == files


def test_a_base_that_does_not_fit_is_refused(folder, found, tmp_path):
    base, shared = folder / "whole" / BASE, of_found(folder)
    with pytest.raises(ValueError, match=f"--seed must be {BASE_SEED}, the seed of --base .*, or left out, got .0,."):
        upgrade.run(tmp_path, base=base, seed=[0], results=tmp_path, **shared)
    with pytest.raises(ValueError, match="--base-steps goes with a linear model that is trained here"):
        upgrade.run(tmp_path, base=base, base_steps=3, results=tmp_path, **shared)
    with pytest.raises(ValueError, match="must hold a model of linear layers with 1 level, got .* with 13 levels"):
        upgrade.run(tmp_path, base=folder / "whole/seed0/levels_all", results=tmp_path, **shared)
    shutil.copytree(base, tmp_path / "unfinished")
    for checkpoint in checkpoints(tmp_path / "unfinished")[1:]:
        shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match="unfinished is not finished: step 2 of 4"):
        upgrade.run(tmp_path, base=tmp_path / "unfinished", results=tmp_path, **shared)
    with pytest.raises(ValueError, match=r"--base \S+ holds no training run \(no run.json\)"):
        upgrade.run(tmp_path, base=tmp_path, results=tmp_path, **shared)
    with pytest.raises(ValueError, match="--base .*/nothing does not exist, expected the folder of a training run"):
        upgrade.run(tmp_path, base=tmp_path / "nothing", results=tmp_path, **shared)


def test_another_model_in_the_place_of_the_start_is_refused(folder, found, tmp_path):
    base, name = folder / "whole" / BASE, f"{base_recipe(miniature=True).name}-{BASE_SEED}"
    start = tmp_path / name / "linear-start"
    upgrade.write_upgraded(folder / "whole/seed0/linear", start, {"num_levels": 1})
    with pytest.raises(ValueError, match="linear-start is not the model of .*base: choose another --out"):
        upgrade.run(tmp_path, base=base, kind=["base"], results=found, **of_found(folder))


def test_a_learning_rate_makes_another_result(folder, found):
    rate = dict(kind=["levels_new"], learning_rate=1e-2, base=folder / "whole" / BASE, **of_found(folder))
    with pytest.raises(ValueError, match="of a run that differs in learning_rate"):
        upgrade.run(found, results=found, **rate)
    upgrade.run(found / "fast", results=found / "fast", **{**rate, "kind": ["base", "levels_new"]})
    fast, slow = (
        read_object(result_file(path / "miniature", "upgrade-needle-levels_new", BASE_SEED))
        for path in (found / "fast", found)
    )
    assert fast["recipe"]["learning_rate"] == 1e-2 and fast["training"]["curve"] != slow["training"]["curve"]
