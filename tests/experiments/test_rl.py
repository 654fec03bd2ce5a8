"""Reinforcement learning in miniature: the trained model, rounds in pieces, what is kept of them, and the table."""

import itertools
import json
import math
from importlib.metadata import version

import pytest
import torch

from experiments import grpo, rl
from experiments.countdown import Problem
from experiments.recipes import rl as recipes
from experiments.results import result_file
from loglinear.cli.console import Interrupted
from loglinear.models import ByteTokenizer, LogLinearForCausalLM, parameter_counts
from loglinear.runs.json_files import read_object, write_object
from loglinear.runs.metrics import read_metrics

PROBLEM = Problem((2, 3, 4), 14)
RIGHT, WRONG = "3*4=12 2+12=14", "3+4=7 2*7=15"


@pytest.mark.parametrize("miniature", [False, True])
def test_kinds_have_equal_parameters_and_data(miniature):
    made = [recipes.base_recipe(kind, miniature=miniature) for kind in recipes.KINDS]
    totals = [parameter_counts(recipe.model_config()).total for recipe in made]
    assert max(totals) / min(totals) < (1.1 if miniature else 1.03)
    own = dict.fromkeys(("name", "summary", "model"))
    assert all({**recipe.to_dict(), **own} == {**made[0].to_dict(), **own} for recipe in made)
    assert miniature or all(2e6 < total < 12e6 for total in totals)


def test_a_problem_and_its_longest_answer_fit_into_a_sequence():
    recipe = recipes.reinforcement("linear", recipes.ALL, "")
    documents = itertools.islice(recipes.TASK.documents("0", held_out=False), 2000)
    lengths = [len(document.text) + 2 for document in documents]
    prompt = len(Problem((recipes.TASK.largest,) * 3, 99_999).prompt) + 1
    assert max(lengths) < recipes.LONGEST and prompt + recipe.longest <= recipes.LONGEST
    assert recipe.longest > max(lengths) - 15  # room for more attempts than the answers to learn from have


@pytest.mark.parametrize("changes", [{"kind": "other"}, {"tokens": "some"}])
def test_an_unknown_kind_or_choice_of_tokens_is_named(changes):
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=f"--{name} must be one of .*, got '{value}'"):
        recipes.reinforcement(**{"kind": "linear", "tokens": "all", "start": "", **changes})


@pytest.mark.parametrize(
    "changes, message",
    [({"updates": 3}, "updates must divide 4 x 4"), ({"answers": 1}, "at least 2"), ({"rounds": 0}, "at least 1")],
)
def test_rounds_that_cannot_be_taken_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        recipes.reinforcement("linear", "all", "", miniature=True).override(**changes)


def rewards_of(completion_ids):
    completions = ByteTokenizer().batch_decode(completion_ids, skip_special_tokens=True)  # as TRL calls it
    return grpo.solved([PROBLEM.prompt] * len(completions), completions, completion_ids)


def test_an_answer_without_its_end_has_no_reward():
    end, right, wrong = ByteTokenizer().eos_token_id, [*RIGHT.encode()], [*WRONG.encode()]
    assert rewards_of([[*right, end], [*wrong, end], right, [end]]) == [1.0, 0.0, 0.0, 0.0]


def test_an_answer_with_a_token_that_is_no_text_has_no_reward():
    """TRL leaves such tokens out of the text, and a test on held-out problems does not."""
    tokenizer, right = ByteTokenizer(), [*RIGHT.encode()]
    for token in (tokenizer.bos_token_id, tokenizer.pad_token_id, 200):
        for place in (0, 4, len(right)):
            assert rewards_of([[*right[:place], token, *right[place:], tokenizer.eos_token_id]]) == [0.0]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A trained model: six steps are enough for one that ends its answers now and then."""
    folder = tmp_path_factory.mktemp("rl")
    rl.pretrain("log_linear", folder / "base", miniature=True, steps=6, learning_rate=2e-2, results=folder)
    return folder / "base"


def test_the_trained_model_is_tested(base):
    result = read_object(base.parent / "miniature" / "rl-base-log_linear.json")
    assert result["recipe"]["name"] == "rl_base_log_linear_miniature" and result["training"]["steps"] == 6
    assert {"accuracy", "greedy", "any", "length", "ended"} < {*result["evaluation"]}


class Scripted(LogLinearForCausalLM):
    """A model that answers every problem with the same text, whatever it reads."""

    def generate(self, input_ids, max_new_tokens, do_sample, **kwargs):
        text = self.sampled if do_sample else self.likeliest
        ids = [*text.encode(), ByteTokenizer().eos_token_id][:max_new_tokens]
        return torch.cat([input_ids, torch.tensor([ids]).expand(len(input_ids), -1)], 1)


def test_scores_are_shares_of_the_right_answers(base, monkeypatch):
    recipe = recipes.reinforcement("log_linear", "all", "", miniature=True)
    model = Scripted.from_pretrained(base / "checkpoint-6").train()
    model.sampled, model.likeliest = WRONG, RIGHT
    monkeypatch.setattr(rl.Countdown, "test", lambda _, count: [PROBLEM, Problem((1, 1, 1), 3)] * (count // 2))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    scores = rl.measure(model, recipe)
    assert scores == {"accuracy": 0.0, "greedy": 0.5, "any": 0.0, "length": len(WRONG) + 1, "ended": 1.0}
    assert model.training and torch.equal(torch.rand(1), expected)
    model.sampled = RIGHT
    assert rl.measure(model, recipe)["accuracy"] == rl.measure(model, recipe)["any"] == 0.5
    cut = rl.measure(model, recipe.override(longest=len(RIGHT)))  # without its end no answer is right
    assert cut["accuracy"] == cut["greedy"] == cut["ended"] == 0.0 and cut["length"] == len(RIGHT)


def test_the_lowest_tokens_are_those_that_the_highest_leave_out(base, tmp_path):
    masks = []
    entropy_BT, mask_BT = torch.rand(4, 9), torch.arange(9) < torch.tensor([9, 1, 5, 3])[:, None]
    for tokens, kind in ((recipes.TOP, grpo.GroupTrainer), (recipes.LOWEST, grpo.LowestEntropyTrainer)):
        recipe = recipes.reinforcement("log_linear", tokens, str(base), miniature=True)
        trainer = grpo.make_trainer(recipe, tmp_path, [])
        assert type(trainer) is kind and trainer.args.top_entropy_quantile == 0.2
        masks.append(trainer.get_high_entropy_mask(entropy_BT, mask_BT.long(), 0.8))
    highest_BT, lowest_BT = masks
    assert torch.equal(highest_BT ^ lowest_BT, mask_BT) and highest_BT.sum() == 4
    assert entropy_BT[highest_BT].min() > entropy_BT[lowest_BT].max()


def share_of_digits(prompts, completions, **_):
    return [sum(character.isdigit() for character in text) / max(1, len(text)) for text in completions]


def run(base, folder, tokens="top20", **given):
    options = {"miniature": True, "learning_rate": 1e-2, **given}
    rl.run("log_linear", tokens, base, folder / "run", results=folder, **options)
    return read_object(result_file(folder / "miniature", f"rl-log_linear-{tokens}", options.get("seed", 0)))


def course(folder):
    return [{**record, "seconds": None} for record in read_metrics(folder / "run")]


def test_pieces_give_what_one_call_gives(base, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "solved", share_of_digits)  # a reward that differs between any two answers
    whole = run(base, tmp_path / "whole")
    with pytest.raises(Interrupted, match="stopped at round 1 of 2"):
        run(base, tmp_path / "pieces", minutes=1e-9)
    pieces = run(base, tmp_path / "pieces")
    assert course(tmp_path / "pieces") == course(tmp_path / "whole")
    assert whole["versions"]["trl"] == version("trl")  # the objective is TRL's
    assert pieces["evaluation"] == whole["evaluation"] and pieces["training"]["curve"] == whole["training"]["curve"]
    assert [point["round"] for point in whole["evaluation"]["curve"]] == [0, 1, 2]
    assert [point["round"] for point in whole["training"]["curve"]] == [1, 2]
    one, other = (
        LogLinearForCausalLM.from_pretrained(tmp_path / name / "run" / "checkpoint-4").state_dict()
        for name in ("whole", "pieces")
    )
    started = LogLinearForCausalLM.from_pretrained(base / "checkpoint-6").state_dict()
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    assert not all(torch.equal(weight, started[name]) for name, weight in one.items())
    with pytest.raises(ValueError, match="holds a run with name = 'rl_log_linear_top20_miniature', which cannot"):
        run(base, tmp_path / "whole", "all")


def test_a_stop_between_two_tests_saves_its_round(base, tmp_path):
    recipe = recipes.reinforcement("log_linear", "all", str(base), miniature=True).override(evaluate_every=2)

    def reinforce(minutes=None):
        scores = {"accuracy": 0.0, "length": 1.0}
        return grpo.reinforce(recipe, tmp_path / "run", lambda model: scores, minutes=minutes)

    stopped = reinforce(minutes=1e-9)
    assert stopped.interrupted and stopped.step == recipe.updates and stopped.checkpoint.is_dir()
    ended = reinforce()
    assert not ended.interrupted and ended.step == recipe.steps and ended.checkpoint.is_dir()
    steps = [record["step"] for record in read_metrics(tmp_path / "run") if record["split"] == "train"]
    assert steps == [1, 2, 3, 4]


def test_a_start_of_another_run_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="holds rl_base_log_linear_miniature of seed 0, .* of seed 1"):
        run(base, tmp_path, seed=1)
    with pytest.raises(ValueError, match="_miniature of seed 0, expected rl_base_linear_miniature of seed 0"):
        rl.run("linear", "all", base, tmp_path / "run", miniature=True, results=tmp_path)
    with pytest.raises(ValueError, match="there is no trained model .*: run `python -m experiments.rl pretrain` first"):
        run(tmp_path / "nothing", tmp_path)
    with pytest.raises(Interrupted):
        rl.pretrain("linear", tmp_path / "half", miniature=True, steps=3, minutes=1e-9, results=tmp_path)
    with pytest.raises(ValueError, match="is trained for 1 of 3 steps: run `pretrain` to its end first"):
        rl.run("linear", "all", tmp_path / "half", tmp_path / "run", miniature=True, results=tmp_path)


def made_up(kind, tokens, seed, before, after):
    curve = [
        {"round": number, "accuracy": share, "greedy": share + 0.1, "any": 1.0, "length": 20 + number, "ended": 1.0}
        for number, share in ((0, before), (10, after))
    ]
    course = [{"round": number, "entropy": 1 / number, "length": 20 + number, "reward": 0.5} for number in range(1, 11)]
    return {
        **dict(seed=seed, parameters=1000, versions={"device": "made up"}),
        **dict(recipe={"name": f"rl_{kind}_{tokens}", "rounds": 10, "start": f"base of seed {seed}", "seed": seed}),
        **dict(training={"rounds": 10, "minutes": 1.5, "curve": course}, evaluation={"examples": 9, "curve": curve}),
    }


def write(folder, kind, tokens, after, *, seed=0, before=0.25):
    write_object(result_file(folder, f"rl-{kind}-{tokens}", seed), made_up(kind, tokens, seed, before, after))


def test_the_table_has_means_and_deviations(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(ValueError, match="has no result of `python -m experiments.rl run`"):
        rl.show(tmp_path)
    write(tmp_path, "linear", "top20", 0.5)
    write(tmp_path, "linear", "top20", 0.7, seed=1)
    write(tmp_path, "transformer", "lowest80", 0.2)
    rl.show(tmp_path)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    rows = [row for row in rows if row]
    spread = f"60.0 ± {100 * math.sqrt(0.02):.1f}"
    assert rows[0][:5] == ["linear", "top 20 %", "0, 1", "25.0 ± 0.0", spread]
    assert rows[1] == ["transformer", "lowest 80 %", "0", "25.0", "20.0", "35.0", "30.0", "20.0", "30.0"]


def test_seeds_of_other_rounds_are_not_mixed(tmp_path):
    write(tmp_path, "linear", "all", 0.5)
    other = made_up("linear", "all", 1, 0.2, 0.5)
    other["recipe"]["rounds"] = 20
    (tmp_path / "rl-linear-all-seed1.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="differ in more than the seed: in rounds"):
        rl.read_runs(tmp_path)
