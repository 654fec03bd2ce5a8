"""Memorisation in miniature: what random tokens are, what a code length is, runs in pieces, and slopes of points."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from experiments import capacity
from experiments.random_tokens import BEGINNING, HELD_OUT, RandomTokens
from experiments.recipes import capacity as recipes
from experiments.results import result_file
from loglinear.cli.console import Interrupted
from loglinear.models import parameter_counts
from loglinear.recipes import TrainingRecipe
from loglinear.runs.json_files import read_object, write_object

TRANSFORMER, LINEAR = ("transformer", "bfloat16"), ("linear", "bfloat16")
DATA = RandomTokens(sequences=40, length=9, vocabulary=21)


def sequences(corpus):
    return corpus.tokens.reshape(len(corpus.names), -1)


def test_random_tokens_are_uniform():
    data = RandomTokens(sequences=5000, length=20, vocabulary=16)
    tokens_NS = sequences(data.corpora(0)[0])
    assert (tokens_NS[:, 0] == BEGINNING).all()
    counts_SV = np.stack([np.bincount(column, minlength=16) for column in tokens_NS[:, 1:].T])
    assert np.abs(counts_SV.sum(0) - 100_000 / 16).max() < 5 * math.sqrt(100_000 / 16)
    assert np.abs(counts_SV - 5000 / 16).max() < 5 * math.sqrt(5000 / 16)
    following = np.bincount(16 * tokens_NS[:, 1:-1].ravel() + tokens_NS[:, 2:].ravel().astype(int), minlength=256)
    assert np.abs(following - 95_000 / 256).max() < 5 * math.sqrt(95_000 / 256)


def test_random_tokens_are_those_of_the_seed_and_the_held_out_ones_are_others():
    first, again, other = (DATA.corpora(seed) for seed in (0, 0, 1))
    assert [corpus.fingerprint for corpus in first] == [corpus.fingerprint for corpus in again]
    prints = {corpus.fingerprint for corpora in (first, other) for corpus in corpora}
    assert len(prints) == 4 and len(first[1].names) == HELD_OUT
    more = DATA._replace(sequences=70).corpora(0)[0]
    assert np.array_equal(sequences(more)[:40], sequences(first[0]))


def test_the_name_of_a_dataset_holds_its_sizes():
    assert RandomTokens.from_source(DATA.source) == DATA and DATA.source == "random:40:9:21"
    assert pytest.approx(40 * 9 * math.log2(21)) == DATA.bits
    for wrong in ("random:40:9", "stdlib", "random:0:9:21", "random:40:9:1", "random:4.5:9:21", "needle:40:9:21"):
        with pytest.raises(ValueError, match=f"random:SEQUENCES:LENGTH:VOCABULARY, got '{wrong}'"):
            RandomTokens.from_source(wrong)


def recipe_of(data=DATA, **changes):
    sizes = dict(seq_len=data.length + 1, batch_tokens=8 * (data.length + 1))
    return TrainingRecipe(
        **{
            **dict(name="tiny", summary="", data=(data.source,), steps=4, learning_rate=1e-2, warmup_steps=1),
            **dict(eval_every=4, eval_tokens=100, save_every=4),
            **sizes,
            **changes,
        }
    )


class Oracle:
    """A model that looks ahead: it gives the next token of a known sequence the logit `height`, and all others 0."""

    device = torch.device("cpu")
    config = SimpleNamespace()

    def __init__(self, vocabulary, height, known):
        self.vocabulary, self.height = vocabulary, height
        self.known = {tuple(sequence) for sequence in known.tolist()}

    def base_model(self, input_ids, cu_seqlens, use_cache):
        hidden = torch.zeros(*input_ids.shape, self.vocabulary)
        for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            if tuple(input_ids[0, start:end].tolist()) in self.known:
                hidden[0, torch.arange(start, end - 1), input_ids[0, start + 1 : end]] = self.height
        return SimpleNamespace(last_hidden_state=hidden)

    def get_output_embeddings(self):
        head = torch.nn.Linear(self.vocabulary, self.vocabulary, bias=False)
        torch.nn.init.eye_(head.weight)
        return head


@pytest.mark.parametrize("height", [0.0, 3.0, 1e4])
def test_memorised_bits_are_the_entropy_minus_the_code_length(height):
    """0 for a model with uniform output, and all N S log2 V for one that gives the data probability 1."""
    training = sequences(DATA.corpora(5)[0])
    measured = capacity.measure(Oracle(21, height, training), recipe_of(seed=5))
    per_token = math.log2(21) - math.log2(1 + 20 * math.exp(-height))
    assert measured["memorised_bits"] == pytest.approx(40 * 9 * per_token, rel=1e-6, abs=1e-4)
    assert measured["dataset_bits"] == DATA.bits and measured["sequences"] == 40
    assert measured["held_out_bits_per_token"] == pytest.approx(math.log2(21), rel=1e-6)


def test_a_model_that_knows_held_out_tokens_is_refused():
    held_out = sequences(DATA.corpora(0)[1])
    with pytest.raises(ValueError, match=r"must take 4.392 bits each or more, and take 0.000: the code leaks"):
        capacity.measure(Oracle(21, 1e4, held_out), recipe_of())


def test_rows_that_would_cut_a_sequence_are_refused():
    for changes in ({"seq_len": 9}, {"batch_tokens": 85}, {"seq_len": 20}):
        with pytest.raises(ValueError, match="sequences have 10 tokens: expected --seq-len 10 and a multiple of it"):
            capacity.corpora(recipe_of(**changes))


def test_the_gain_of_the_second_half_is_exact():
    losses = [*[3.0] * 60, *[2.0] * 60]  # bits a token
    metrics = [{"split": "train", "bits_per_byte": loss} for loss in losses]
    assert capacity.second_half(recipe_of(), [*metrics, {"split": "validation", "bits_per_byte": 9.0}]) == 40 * 9
    assert capacity.second_half(recipe_of(), metrics[-1:]) == 0


@pytest.mark.parametrize("miniature", [False, True])
@pytest.mark.parametrize("size", recipes.SIZES)
def test_kinds_of_one_size_have_equal_parameters_and_data(size, miniature):
    made = [recipes.capacity(kind, size, 2.0, miniature=miniature) for kind in recipes.KINDS]
    totals = [parameter_counts(recipe.model_config()).total for recipe in made]
    assert max(totals) / min(totals) < (1.07 if miniature else 1.03)
    own = dict.fromkeys(("name", "summary", "model"))
    assert all({**recipe.to_dict(), **own} == {**made[0].to_dict(), **own} for recipe in made)
    data = capacity.random_tokens(made[0])
    assert data.bits / (recipes.PREDICTED * np.mean(totals)) == pytest.approx(2, rel=0.02)
    assert made[0].batch_tokens == min(2048, data.sequences) * (data.length + 1)
    routed = made[recipes.KINDS.index("routed")].model_config()
    assert routed.num_levels == routed.partition.num_columns(data.length + 1) > 3
    if not miniature:
        assert 0.9 < np.mean(totals) / (1000 * int(size.removesuffix("k"))) < 1.1


def test_an_unknown_kind_size_or_load_is_named():
    with pytest.raises(ValueError, match="--kind must be one of transformer, .* got 'other'"):
        recipes.capacity("other", "100k", 1.0)
    with pytest.raises(ValueError, match="--size must be one of 100k, .* got '1m'"):
        recipes.capacity("linear", "1m", 1.0)
    with pytest.raises(ValueError, match="--dtype must be one of float32, bfloat16, got 'half'"):
        recipes.capacity("linear", "100k", 1.0, dtype="half")
    with pytest.raises(ValueError, match=r"--load must be one of 0.5, 1.0, 2.0, 4.0, got 3"):
        recipes.capacity("linear", "100k", 3)


def test_a_token_of_the_routed_read_sees_seven_buckets_at_most():
    partition = recipes.capacity("routed", "100k", 1.0).model_config().partition
    buckets = [len({partition.index(t, s) for s in range(t + 1)}) for t in range(65)]
    assert max(buckets) == 7 and partition.index(63, 0) == 6 and buckets[64] == 2


def run(folder, kind="linear", dtype=None, **given):
    options = capacity.Options(**{"miniature": True, "results": folder, "steps": 25, **given})
    capacity.run(kind, "100k", 0.5, folder / "run", dtype, **vars(options))
    name = f"capacity-{kind}-100k-0.5-{dtype or 'float32'}"
    return read_object(result_file(folder / "miniature", name, options.seed or 0))


def test_a_miniature_memorises_and_pieces_give_what_one_call_gives(tmp_path):
    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupted, match="stopped at step 1 of 25"):
        run(tmp_path / "pieces", minutes=1e-9)
    pieces = run(tmp_path / "pieces")
    assert pieces["evaluation"] == whole["evaluation"] and pieces["training"]["curve"] == whole["training"]["curve"]
    evaluation = whole["evaluation"]
    assert evaluation["memorised_bits"] == evaluation["dataset_bits"] - evaluation["code_bits"]
    assert 0.1 * evaluation["dataset_bits"] < evaluation["memorised_bits"] < evaluation["dataset_bits"]
    assert evaluation["held_out_bits_per_token"] > math.log2(264)


@pytest.mark.parametrize("kind", [kind for kind in recipes.KINDS if kind != "linear"])
def test_every_kind_is_trained_and_measured(kind, tmp_path):
    result = run(tmp_path, kind, steps=2)
    assert result["recipe"]["name"] == f"capacity_{kind}_100k_0.5_float32_miniature"
    assert result["recipe"]["dtype"] == "float32" and result["training"]["steps"] == 2
    last = result["training"]["curve"][-2]["bits_per_byte"]  # before the last step
    evaluation = result["evaluation"]
    assert evaluation["code_bits"] == pytest.approx(last * evaluation["sequences"] * 16, rel=0.05)


def test_the_dtype_is_part_of_the_run_and_of_its_result(tmp_path):
    result = run(tmp_path, dtype="bfloat16", steps=2)
    assert result["recipe"]["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="holds a run of capacity_linear_100k_0.5_bfloat16_miniature, expected "):
        run(tmp_path, dtype="float32", steps=2)


def made_up(size, seed, load, memorised, *, parameters, gained=0.0):
    """A result with so many memorised bits."""
    bits = load * 3.6 * parameters
    evaluation = {"dataset_bits": bits, "memorised_bits": memorised, "second_half_bits": gained}
    data = {"train": {"documents": 10, "tokens": 650, "fingerprint": f"of seed {seed}"}}
    return {
        **dict(seed=seed, parameters=parameters, versions={"device": "made up"}, data=data),
        **dict(recipe={"seq_len": 65, "steps": 100}, training={"minutes": 1.5}, evaluation=evaluation),
    }


def write(
    folder, kind, slope, *, sizes=("100k", "270k", "500k"), seed=0, loads=recipes.LOADS, gained=0.0, dtype="bfloat16"
):
    """Write results whose capacities lie on a line, with the maximum at load 2."""
    for size in sizes:
        parameters = 1000 * int(size.removesuffix("k"))
        for load in loads:
            top = slope * parameters + 5000
            bits = {0.5: 0.4, 1.0: 0.8, 2.0: 1.0, 4.0: 0.97}[load] * top
            result = made_up(size, seed, load, bits, parameters=parameters, gained=gained * bits)
            write_object(result_file(folder, f"capacity-{kind}-{size}-{load:g}-{dtype}", seed), result)


def test_the_slope_of_points_on_a_line_is_exact(tmp_path):
    for seed, slope in enumerate((3.0, 3.5, 3.1)):
        write(tmp_path, "transformer", slope, seed=seed)
    write(tmp_path, "linear", 2.0, sizes=["100k"])
    write(tmp_path, "transformer", 3.9, dtype="float32")
    memories = capacity.read_memories(tmp_path)
    assert [*memories] == [("transformer", "float32"), TRANSFORMER, LINEAR] and len(memories[TRANSFORMER]) == 9
    slope, of_seeds = capacity.slopes(memories[TRANSFORMER])
    assert of_seeds == pytest.approx([3.0, 3.5, 3.1], rel=1e-9) and slope == pytest.approx(3.2, rel=1e-9)
    assert capacity.slopes(memories["transformer", "float32"])[0] == pytest.approx(3.9, rel=1e-9)
    assert capacity.slopes(memories[LINEAR]) == (None, [])


def test_seeds_with_fewer_sizes_are_in_no_range(tmp_path):
    write(tmp_path, "linear", 2.0)
    write(tmp_path, "linear", 2.2, seed=1)
    write(tmp_path, "linear", 9.0, seed=2, sizes=["100k", "500k"])
    _, of_seeds = capacity.slopes(capacity.read_memories(tmp_path)[LINEAR])
    assert of_seeds == pytest.approx([2.0, 2.2])


@pytest.mark.parametrize(
    ("loads", "share"), [([2.0], None), ([0.5, 1.0, 2.0], None), ([1.0, 4.0], None), ([2.0, 4.0], 1.0)]
)
def test_a_capacity_is_known_once_a_larger_dataset_adds_little(tmp_path, loads, share):
    write(tmp_path, "linear", 2.0)
    for load in set(recipes.LOADS) - set(loads):
        (tmp_path / f"capacity-linear-270k-{load:g}-bfloat16.json").unlink()
    small, middle, large = capacity.read_memories(tmp_path)[LINEAR]
    assert small.capacity == pytest.approx(205_000) and large.capacity == pytest.approx(1_005_000)
    assert middle.capacity == (None if share is None else pytest.approx(share * 545_000))
    assert middle.memorised[loads[-1]] <= 545_000.1
    assert capacity.bits_per_parameter([small, middle, large]) == pytest.approx(2.0)


def test_seeds_of_other_sizes_are_not_mixed(tmp_path):
    write(tmp_path, "linear", 2.0)
    write(tmp_path, "linear", 2.0, seed=1)
    file = tmp_path / "capacity-linear-100k-1-bfloat16-seed1.json"
    result = read_object(file)
    result["data"]["train"]["documents"] = 11
    write_object(file, result)
    with pytest.raises(ValueError, match="differ in more than the seed: in training data"):
        capacity.read_memories(tmp_path)


def test_the_tables_have_means_ranges_and_marks(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(ValueError, match="--results .*/nothing is no folder"):
        capacity.show(tmp_path / "nothing")
    with pytest.raises(ValueError, match="has no result of `python -m experiments.capacity run`"):
        capacity.show(tmp_path)
    write(tmp_path, "transformer", 3.0)
    write(tmp_path, "transformer", 3.2, seed=1)
    write(tmp_path, "routed", 2.5, sizes=["100k", "2000k"], loads=[0.5, 1.0], gained=0.03)
    capacity.show(tmp_path)
    printed = capsys.readouterr().out
    rows = table_rows(printed)
    assert rows[0] == [
        "transformer",
        "bfloat16",
        "100k",
        "100,000",
        "2",
        "126.0",
        "252.0",
        "315.0",
        "305.6",
        "315.0",
        "3.15",
    ]
    assert rows[3] == ["routed", "bfloat16", "100k", "100,000", "1", "102.0*", "204.0*", "-", "-", "-", "-"]
    assert rows[5] == ["transformer", "bfloat16", "3.10", "3.00 to 3.20", "2", "3.51"]
    assert len(rows) == 6  # a kind without a slope has a line instead
    line = printed.splitlines()[-1]
    assert line.startswith("routed, bfloat16: no slope, which needs 2 sizes with a capacity: 0 of 2 measured sizes")
    assert line.endswith("have one. A capacity needs 2 loads, the largest of which adds at most 5 %.")


def test_columns_without_a_value_are_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    write(tmp_path, "linear", 2.0, sizes=["100k"], loads=[1.0, 2.0])
    write(tmp_path, "routed", 2.0, sizes=["500k"], loads=[2.0])
    capacity.show(tmp_path)
    printed = capsys.readouterr().out
    assert [row[4:] for row in table_rows(printed)] == [["1", "164.0", "205.0"], ["1", "-", "1,005.0"]]
    (header,) = [line for line in printed.splitlines() if "┃" in line]
    columns = [cell.strip() for cell in header.split("┃")[1:-1]]
    assert columns == ["kind", "dtype", "size", "parameters", "seeds", "load 1", "load 2"]
    assert printed.count("no slope, which needs 2 sizes with a capacity: 0 of 1 measured sizes have one.") == 2


def table_rows(printed):
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines()]
    return [row for row in rows if row]
