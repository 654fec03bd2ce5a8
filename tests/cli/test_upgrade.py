"""`loglinear upgrade`, and the commands that take an upgraded folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import loglinear
from loglinear.cli.console import human_bytes
from loglinear.cli.serve import prepare
from loglinear.models import ByteTokenizer, LogLinearConfig, LogLinearForCausalLM
from loglinear.runs.loading import load_checkpoint
from tests.cli.command_line import FAST, assert_one_line, in_process
from tests.upgrades.tiny import MODELS, original

TEXT = "def main():\n    return 1\n" * 40


def make_folders(family, base) -> tuple[Path, Path]:
    """Return the folders of a tiny model for bytes, as transformers saves it, and of its upgrade."""
    from loglinear.cli.upgrade import run

    original(family, torch.float32, vocab_size=264).save_pretrained(base / "original")
    ByteTokenizer().save_pretrained(base / "original")
    run(base / "original", base / "upgraded", dict(num_levels=6, chunk_size=4))
    return base / "original", base / "upgraded"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return make_folders("qwen3_5", tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def folder(qwen):
    return qwen[0]


@pytest.fixture(scope="module")
def upgraded_folder(qwen):
    return qwen[1]


@pytest.fixture(scope="module", params=["qwen3_5", "kimi_linear", "mamba2", "granitemoehybrid", "falcon_h1"])
def folders(request, tmp_path_factory):
    """The two folders of families that differ in their cache, their modules or the factor of their logits."""
    return make_folders(request.param, tmp_path_factory.mktemp(request.param))


@torch.no_grad()
def test_upgrade_writes_a_folder_with_the_same_logits(capsys, folder, tmp_path):
    code, out, errors = in_process(
        capsys, "upgrade", "--model", folder, "--out", tmp_path / "new", "--num-levels", 7, "--routing", "gram"
    )
    assert code == 0, errors
    assert "Qwen3_5GatedDeltaNet" in out and "new parameters" in out
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "new"), torch.arange(3, 80)[None]
    assert loaded.config.loglinear_upgrade["num_levels"] == 7 and loglinear.new_parameters(loaded)
    right = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    assert torch.allclose(loaded(ids).logits, right, atol=1e-4 * right.abs().max().item())
    assert "note:" not in errors


def test_a_folder_without_a_tokenizer_is_upgraded_with_a_note(capsys, folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    code, _, errors = in_process(capsys, "upgrade", "--model", tmp_path, "--out", tmp_path / "new")
    files = "tokenizer.json and tokenizer_config.json"
    assert code == 0 and errors == f"note: {tmp_path} has no tokenizer files: copy {files} into {tmp_path / 'new'}\n"
    result = in_process(capsys, "generate", "--model", tmp_path / "new", "--prompt", "a")
    assert_one_line(result, f"{tmp_path / 'new'} has no tokenizer files: copy {files} into it")


UNUSED = "which transformers' `generate` uses and the commands of loglinear do not"
SETTINGS = {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.3, "of_another_version": 2}


@pytest.fixture
def with_settings(folder, tmp_path):
    """A folder whose generation_config.json has settings that the commands do not use."""
    shutil.copytree(folder, tmp_path / "original")
    (tmp_path / "original" / "generation_config.json").write_text(json.dumps(SETTINGS))
    return tmp_path / "original"


def unused(path) -> str:
    settings = "of_another_version = 2, repetition_penalty = 1.3"
    return f"note: {path / 'generation_config.json'} sets {settings}, {UNUSED}\n"


def settings_of(path) -> dict:
    found = json.loads((path / "generation_config.json").read_text())
    return {name: found.get(name) for name in SETTINGS}


@pytest.mark.parametrize("command", [("upgrade", "--model"), ("convert", "--from", "transformers")])
def test_settings_of_generation_travel_and_the_commands_say_which_they_do_not_use(
    capsys, caplog, with_settings, tmp_path, command
):
    new, trained, prompt = tmp_path / "new", tmp_path / "trained", ("--prompt", "a", "--max-new-tokens", 2)
    if command[0] == "convert":
        original("mamba2", torch.float32, vocab_size=264).save_pretrained(with_settings)
        (with_settings / "generation_config.json").write_text(json.dumps(SETTINGS))
    out = (new,) if command[0] == "convert" else ("--out", new)
    code, _, errors = in_process(capsys, *command, with_settings, *out)
    assert code == 0 and unused(new) in errors and errors.count("repetition_penalty") == 1
    assert settings_of(new) == SETTINGS
    caplog.clear()
    code, _, errors = in_process(capsys, "generate", "--model", new, *prompt)
    assert code == 0 and unused(new) == f"{caplog.messages[0]}\n", errors
    (tmp_path / "text.txt").write_text(TEXT)
    sizes = ["--steps", 1, "--seq-len", 32, "--batch-tokens", 64, "--eval-every", 1, "--save-every", 1]
    start = ["--recipe", "demo", "--model", new, "--data", tmp_path / "text.txt"]
    code, _, errors = in_process(capsys, "train", *start, "--out", trained, *sizes)
    assert code == 0, errors
    assert settings_of(trained / "checkpoint-1") == SETTINGS
    caplog.clear()
    code, _, errors = in_process(capsys, "generate", "--model", trained, *prompt)
    assert code == 0 and unused(trained / "checkpoint-1") == f"{caplog.messages[0]}\n", errors


@pytest.mark.parametrize("settings", [{"watermarking_config": 3}, {"max_new_tokens": -1}, 5], ids=str)
def test_settings_that_transformers_cannot_read_end_in_one_line(capsys, with_settings, tmp_path, settings):
    (with_settings / "generation_config.json").write_text(json.dumps(settings))
    result = in_process(capsys, "upgrade", "--model", with_settings, "--out", tmp_path / "new")
    assert_one_line(result, f"{with_settings / 'generation_config.json'}")


def test_upgrade_refuses_a_folder_that_lacks_a_weight_and_names_one_too_many(capsys, folder, tmp_path):
    weights, name = load_file(folder / "model.safetensors"), "model.layers.0.linear_attn.A_log"
    for path, changed in (
        ("few", {n: w for n, w in weights.items() if n != name}),
        ("many", {**weights, "x": torch.zeros(1)}),
    ):
        shutil.copytree(folder, tmp_path / path)
        save_file(changed, tmp_path / path / "model.safetensors", metadata={"format": "pt"})
    few, many = (
        in_process(capsys, "upgrade", "--model", tmp_path / path, "--out", tmp_path / "new", "--num-levels", 7)
        for path in ("few", "many")
    )
    assert_one_line(few, f"lacks a weight of Qwen3_5ForCausalLM: {name}")
    assert many[0] == 0 and "note: Qwen3_5ForCausalLM has no place for x, so it is left out" in many[2]


def test_a_model_of_images_and_text_is_upgraded_in_python_alone(capsys, tmp_path):
    original("glm5_next", torch.float32).save_pretrained(tmp_path / "in")
    capsys.readouterr()
    result = in_process(capsys, "upgrade", "--model", tmp_path / "in", "--out", tmp_path / "out")
    assert_one_line(result, "'glm5_next' is no language model: loglinear.upgrade takes it in Python")


def test_the_commands_take_an_upgraded_folder(capsys, folders, tmp_path, monkeypatch):
    upgraded_folder = folders[1]
    (tmp_path / "text.txt").write_text(TEXT)
    made = []
    for path in folders:
        model = AutoModelForCausalLM.from_pretrained(path)
        ids = torch.tensor([[1, *b"def ma"]])
        made.append(model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=2))
    assert torch.equal(*made)
    arguments = ["--model", upgraded_folder, "--prompt", "def ma", "--temperature", 0, "--max-new-tokens", 8]
    code, out, errors = in_process(capsys, "generate", *arguments)
    assert code == 0 and out.startswith("def ma"), errors
    arguments = ["--model", upgraded_folder, "--data", tmp_path / "text.txt", "--out", tmp_path / "eval"]
    code, out, errors = in_process(capsys, "eval", "perplexity", *arguments, "--length", 64)
    assert code == 0 and "bits per byte" in out, errors
    monkeypatch.setenv("COLUMNS", "200")
    code, out, errors = in_process(capsys, "info", "--model", upgraded_folder)
    words = out.split()  # the cell may wrap
    assert code == 0 and {type(model).__name__, "transformers,", "upgraded"} <= set(words), errors
    made = model.generate(torch.ones(1, 150, dtype=torch.long), max_new_tokens=9, return_dict_in_generate=True)
    size = human_bytes(sum(getattr(layer, "nbytes", 0) for layer in made.past_key_values.layers))
    row = next(line for line in out.splitlines() if "decode state of one sequence, log-linear layers" in line)
    assert size in row and not size.startswith("0 ")


def test_training_an_upgraded_kimi_linear_changes_its_new_weights_alone(capsys, tmp_path):
    from fastapi.testclient import TestClient

    from loglinear.cli.serving.app import application
    from loglinear.cli.serving.turns import Limits

    _, start = make_folders("kimi_linear", tmp_path)
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT)
    train = ["--recipe", "demo", "--model", start, "--data", text, "--out", run, *FAST]
    code, _, errors = in_process(capsys, "train", *train)
    assert code == 0, errors
    old, (model, tokenizer) = AutoModelForCausalLM.from_pretrained(start), load_checkpoint(run)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, old.get_parameter(name))}
    assert changed == {*loglinear.new_parameters(model)}
    ids = torch.tensor([[tokenizer.bos_token_id, *b"def ma"]])
    made = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    right = tokenizer.decode(made[0], skip_special_tokens=True)
    code, out, errors = in_process(
        capsys, "generate", "--model", run, "--prompt", "def ma", "--temperature", 0, "--max-new-tokens", 6
    )
    assert code == 0 and out.strip() == right.strip(), errors
    code, out, errors = in_process(
        capsys, "eval", "perplexity", "--model", run, "--data", text, "--out", tmp_path / "eval", "--length", 64
    )
    assert code == 0 and "bits per byte" in out, errors
    prepare(model, tokenizer)
    with TestClient(application("tiny", model, tokenizer, Limits(tokens=32, prompt_tokens=99, seconds=60))) as client:
        answer = client.post("/v1/completions", json=dict(model="tiny", prompt="def ma", max_tokens=6, temperature=0))
    assert f"def ma{answer.json()['choices'][0]['text']}".strip() == right.strip()


@torch.no_grad()
def test_perplexity_is_that_of_the_original_model(folders, tmp_path):
    """Packed windows leak nothing: each document counts as it does alone in the original model."""
    from loglinear.data.corpus import read_corpus
    from loglinear.evaluation import evaluate_perplexity

    folder, upgraded_folder = folders
    model, tokenizer = load_checkpoint(upgraded_folder)
    for name, text in (("a", TEXT[:300]), ("b", TEXT[100:350])):
        (tmp_path / f"{name}.txt").write_text(text)
    corpus = read_corpus((str(tmp_path),), tokenizer)
    found = evaluate_perplexity(model, corpus, length=400, max_tokens=10_000, progress=False)
    theirs, nats = AutoModelForCausalLM.from_pretrained(folder), 0.0
    for name in ("a", "b"):
        ids = torch.tensor([tokenizer((tmp_path / f"{name}.txt").read_text()).input_ids])
        ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids, torch.tensor([[tokenizer.eos_token_id]])], 1)
        nats += theirs(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    assert found.nats_D.sum() == pytest.approx(nats, rel=1e-5)


def test_the_server_answers_for_an_upgraded_folder(folders):
    from fastapi.testclient import TestClient

    from loglinear.cli.serving.app import application
    from loglinear.cli.serving.turns import Limits

    model, tokenizer = load_checkpoint(folders[1])
    prepare(model, tokenizer)
    with TestClient(application("tiny", model, tokenizer, Limits(tokens=32, prompt_tokens=99, seconds=60))) as client:
        body = {"model": "tiny", "prompt": "def ma", "max_tokens": 5, "temperature": 0}
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 5


def test_what_cannot_be_upgraded_ends_in_one_line(capsys, folder, upgraded_folder, tmp_path):
    def refused(path, *options):
        return in_process(capsys, "upgrade", "--model", path, "--out", tmp_path / "new", *options)

    assert_one_line(refused("nobody/nothing"), "not downloaded: `hf download nobody/nothing --local-dir FOLDER` first")
    assert_one_line(refused(folder, "--routing", "grams"), "'grams'")
    assert_one_line(refused(tmp_path), "--model must be a folder with config.json and the weights")
    assert_one_line(refused(upgraded_folder), "model is already upgraded")
    LogLinearForCausalLM(LogLinearConfig(num_hidden_layers=1, hidden_size=32, vocab_size=9)).save_pretrained(
        tmp_path / "ours"
    )
    capsys.readouterr()  # transformers' progress bar
    assert_one_line(refused(tmp_path / "ours"), "model is a model of this library already")
    assert_one_line(refused(folder, "--num-levels", 1), "'--num-levels': must lie between 2 and 2147483647, got 1")
    llama = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    capsys.readouterr()  # transformers' progress bar
    assert_one_line(refused(tmp_path / "llama"), "LlamaForCausalLM has no linear layer that can be upgraded")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").touch()
    assert_one_line(refused(folder), "is not empty")


@pytest.mark.parametrize(
    ("name", "value"),
    [("attn_implementation", "someone/kernels"), ("quantization_config", {"quant_method": "bitsandbytes"})],
)
def test_fields_that_fetch_code_are_refused(capsys, upgraded_folder, tmp_path, name, value):
    for file in upgraded_folder.iterdir():
        if file.name != "manifest.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
    result = in_process(capsys, "generate", "--model", tmp_path, "--prompt", "a")
    assert_one_line(result, "is not what an upgrade writes, so the folder is not loaded")


@pytest.mark.parametrize("change", [{"num_hidden_layers": 4, "layer_types": None}, {"hidden_size": 16}])
def test_weights_of_another_model_are_refused(capsys, upgraded_folder, tmp_path, change):
    for file in upgraded_folder.iterdir():
        if file.name != "manifest.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    result = in_process(capsys, "generate", "--model", tmp_path, "--prompt", "a")
    assert_one_line((result[0], result[1], result[2].splitlines()[-1] + "\n"), "holds other weights than config.json")


def test_every_family_of_language_models_can_be_upgraded_from_a_folder(tmp_path):
    from loglinear.cli.upgrade import run

    for family in MODELS.keys() - {"glm5_next"}:
        original(family, torch.float32).save_pretrained(tmp_path / family)
        run(tmp_path / family, tmp_path / f"{family}-new", dict(num_levels=4))
        assert loglinear.new_parameters(AutoModelForCausalLM.from_pretrained(tmp_path / f"{family}-new"))
