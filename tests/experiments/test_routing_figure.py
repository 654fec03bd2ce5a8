"""The picture of a routed read: its weights, its marks and its words are those of the model and of the example."""

import json
import re
from itertools import compress
from operator import not_

import numpy as np
import pytest
import torch

import loglinear
from experiments.figures import routing
from experiments.figures.routing import Reading, conclusion, draw_reading, reading
from loglinear import cli
from loglinear.data.tokenizer import encode_document
from loglinear.evaluation.needle import Example, example_sets
from loglinear.inspection import bucket_weights
from loglinear.models import ByteTokenizer, LogLinearForCausalLM
from loglinear.runs.loading import load_model
from loglinear.training.train import train
from tests.training.tiny import tiny_recipe, write_text
from tests.upgrades import tiny

TOKENIZER = ByteTokenizer()
LINEAR, FULL = "linear_attention", "full_attention"
KINDS = {
    "routed": dict(routing="gram", radix=4, finest_block=16, num_levels=10),
    "lambda": {},
    "hybrid": dict(routing="gram", finest_block=64, num_hidden_layers=3, layer_types=[LINEAR, FULL, LINEAR]),
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a routed model after a few steps."""
    folder = tmp_path_factory.mktemp("routing")
    recipe = tiny_recipe(write_text(folder / "text"), steps=4)
    train(
        tiny_recipe(folder / "text", steps=4, model={**recipe.model, **KINDS["routed"]}), folder / "run", progress=False
    )
    return folder / "run"


def example_of(task: str = "multikey_1", length: int = 900) -> Example:
    return example_sets(TOKENIZER, (), lengths=[length], count=1, tasks=[task])[task, length][0]


def model_of(tmp_path, options: dict) -> LogLinearForCausalLM:
    torch.manual_seed(0)
    recipe = tiny_recipe(tmp_path)
    model = LogLinearForCausalLM(tiny_recipe(tmp_path, model={**recipe.model, **options}).model_config()).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@every_kind
@pytest.mark.parametrize("task", ["single_1", "multikey_1", "multiquery"])
def test_a_reading_is_of_the_last_token_before_the_digits(tmp_path, options, task):
    model, example = model_of(tmp_path, options), example_of(task)
    read = reading(model, TOKENIZER, example)
    ids = encode_document(TOKENIZER, example.prompt + " ")[:-1].astype(np.int64)
    assert read.position == len(ids) - 1 and example.answer[0][0] == " " and example.answer[0][1].isdigit()
    assert [place for bucket in read.buckets for place in bucket] == list(range(len(ids)))  # oldest first, each once
    layers = bucket_weights(model, torch.from_numpy(ids)[None])
    assert list(read.layers) == ([0, 2] if "layer_types" in options else [0])
    for layer, weights in zip(layers, read.layers.values(), strict=True):
        shown = {bucket: layer.weights[0, -1, :, column] for column, bucket in enumerate(layer.buckets(read.position))}
        assert all(np.allclose(weights[:, n], shown[bucket].numpy()) for n, bucket in enumerate(read.buckets))


def test_upgraded_models_are_read_too():
    torch.manual_seed(0)
    model = tiny.mamba2(vocab_size=264).eval()
    loglinear.upgrade(model, num_levels=10, finest_block=4, radix=4, routing="gram", chunk_size=4)
    read = reading(model, TOKENIZER, example_of())
    assert list(read.layers) == [0, 1, 2] and conclusion(read).startswith("No layer gives the needle's bucket")
    assert all((weights == 1).all() for weights in read.layers.values())  # an upgrade starts neutral


@every_kind
def test_the_marked_buckets_hold_the_needle(tmp_path, options):
    model, example = model_of(tmp_path, options), example_of()
    read = reading(model, TOKENIZER, example)
    ids = encode_document(TOKENIZER, example.prompt + " ")
    held, others = (
        "".join(TOKENIZER.decode(ids[bucket.start : bucket.stop]) for bucket in buckets)
        for buckets in (compress(read.buckets, read.holds_needle), compress(read.buckets, map(not_, read.holds_needle)))
    )
    assert example.sentences[0] in held and example.sentences[0].split()[-1] not in others


def test_shares_are_those_of_the_weights():
    weights = {0: np.array([[1.0, 1, 2, 4], [0, 3, 1, 0]]), 3: np.array([[0.0, 0, 0, 0], [2, 0, 6, 0]])}
    buckets = [range(0, 16), range(16, 20), range(20, 21), range(21, 22)]
    read = Reading(21, buckets, [False, True, True, False], weights, found=False)
    np.testing.assert_allclose(read.shares(), [[1 / 16, 7 / 16, 1 / 4, 1 / 4], [1 / 8, 0, 3 / 8, 0]])
    np.testing.assert_allclose(read.needle_shares(), [[3 / 8, 1], [0, 3 / 4]])
    assert read.even == 0.5
    assert conclusion(read) == (
        "Layer 0 gives the needle's buckets 68.8 % of its weight; even is 50.0 %\n"
        "Mean over layers: 53.1 %; the model does not find the number"
    )


@pytest.mark.parametrize("weight", [1.0, 0.2])
def test_a_model_that_does_not_route_is_said_not_to(weight):
    weights = {layer: np.array([[1.0, weight, 1.0]]) for layer in range(2)}
    read = Reading(9, [range(0, 8), range(8, 9), range(9, 10)], [False, True, False], weights, found=True)
    first, second = conclusion(read).splitlines()
    assert first == "No layer gives the needle's bucket more than an even share of the weight, 33.3 %"
    assert second.endswith("the model finds the number")


def test_pictures_are_the_same_bytes_each_time(tmp_path):
    many = [range(16 * n, 16 * n + 16) for n in range(60)]
    read = Reading(959, many, [n in (17, 18) for n in range(60)], {0: np.random.rand(3, 60)}, found=True)
    files = [draw_reading(tmp_path / name, read) for name in ("a.svg", "b.svg")]
    assert [file.name for file in files[0]] == ["a.svg", "a-dark.svg"]
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(*files, strict=True))


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        cli.execute(routing.app, "python -m experiments.figures.routing", list(words))
    return int(exit_.value.code or 0)


def test_the_command_draws_a_trained_model(run, tmp_path, capsys):
    file = tmp_path / "new" / "picture.svg"
    assert call("--model", str(run), "--out", str(file), "--length", "700", "--seed", "3") == 0
    printed = capsys.readouterr().out
    assert {path.name for path in file.parent.iterdir()} == {"picture.svg", "picture-dark.svg", "picture.json"}
    found = json.loads(file.with_suffix(".json").read_text())
    weights = np.array(found["layers"][0]["weights"])
    np.testing.assert_allclose(weights.sum(1), len(found["buckets"]), rtol=1e-5)  # a routed read has mean one
    needle = [bucket["holds_needle"] for bucket in found["buckets"]]
    share = (weights / weights.sum(1, keepdims=True))[:, needle].sum(1).mean()
    assert found["layers"][0]["needle_share"] == pytest.approx(share)
    assert re.search(r"Mean over layers: (\S+) %", printed)[1] == f"{100 * share:.1f}"
    assert found["buckets"][-1]["tokens"][1] == found["position"] + 1 and load_model(run).config.routing == "gram"


def test_mistakes_are_one_line(run, tmp_path, capsys):
    for words, text in (
        (["--out", str(tmp_path / "a.png")], f"--out must end in .svg, got {tmp_path / 'a.png'}"),
        (["--out", str(tmp_path / "a.svg"), "--task", "cwe"], "task must be one of single_1, single_2"),
        (
            ["--out", str(tmp_path / "a.svg"), "--task", "single_2"],
            "task single_2 hides its needle in text: give --data",
        ),
    ):
        assert call("--model", str(run), *words) == 2
        assert text in capsys.readouterr().err
