"""The command line in processes of their own and in this one: what it prints, and how it ends."""

import dataclasses
import io
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from loglinear.cli import main
from loglinear.models import LogLinearForCausalLM
from loglinear.recipes import RECIPES
from loglinear.training.tokenizer import ByteTokenizer
from loglinear.training.train import train
from loglinear.variants import VARIANTS
from tests.training.tiny import tiny_recipe, write_text

FAST = ["--steps", "2", "--seq-len", "32", "--batch-tokens", "64", "--eval-every", "2", "--save-every", "2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, text):
    """A trained tiny model's folder."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "run"
    train(tiny_recipe(text), out, progress=False)
    return out


def in_process(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


def in_subprocess(*arguments):
    result = subprocess.run(
        [sys.executable, "-m", "loglinear.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return result.returncode, result.stdout, result.stderr


# --- bad input: exit code 2 and one line -----------------------------------------------------------------------------


def binary_data(folder, run, text):
    (folder / "image.txt").write_bytes(b"\x89PNG\0\0\0")
    return ["train", "--recipe", "demo", "--data", folder / "image.txt", "--out", folder / "out"]


def empty_data(folder, run, text):
    (folder / "empty.txt").write_text("")
    return ["train", "--recipe", "demo", "--data", folder / "empty.txt", "--out", folder / "out"]


def missing_data(folder, run, text):
    return ["train", "--recipe", "demo", "--data", folder / "nothing", "--out", folder / "out"]


def too_little_data(folder, run, text):
    (folder / "short.txt").write_text("short")
    return ["train", "--recipe", "demo", "--data", folder / "short.txt", "--out", folder / "out"]


def unknown_recipe(folder, run, text):
    return ["train", "--recipe", "demmo", "--data", text, "--out", folder / "out"]


def unknown_variant(folder, run, text):
    return ["train", "--recipe", "demo", "--variant", "mamba22", "--data", text, "--out", folder / "out"]


def no_recipe(folder, run, text):
    return ["train", "--data", text, "--out", folder / "out"]


def recipe_without_data(folder, run, text):
    return ["train", "--recipe", "small", "--out", folder / "out"]


def recipe_without_tokenizer(folder, run, text):
    return ["train", "--recipe", "paper_mamba2", "--data", text, "--out", folder / "out"]


def impossible_steps(folder, run, text):
    return ["train", "--recipe", "demo", "--steps", "0", "--data", text, "--out", folder / "out"]


def folder_of_another_run(folder, run, text):
    return ["train", "--recipe", "demo", "--data", text, "--out", run]


def resume_of_nothing(folder, run, text):
    return ["train", "--resume", "--out", folder / "out"]


def folder_is_a_file(folder, run, text):
    (folder / "out").write_text("")
    return ["train", "--recipe", "demo", "--data", text, "--out", folder / "out"]


def truncated_checkpoint(folder, run, text):
    shutil.copytree(run / "checkpoint-8", folder / "model")
    file = folder / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    return ["generate", "--model", folder / "model", "--prompt", "a"]


def checkpoint_of_another_model(folder, run, text):
    shutil.copytree(run / "checkpoint-8", folder / "model")
    LogLinearForCausalLM(tiny_recipe(text).override(num_levels=3).model_config()).save_pretrained(folder / "other")
    shutil.copy(folder / "other" / "model.safetensors", folder / "model" / "model.safetensors")
    return ["generate", "--model", folder / "model", "--prompt", "a"]


def missing_checkpoint(folder, run, text):
    return ["info", "--model", folder / "nothing"]


def evaluation_of_missing_data(folder, run, text):
    return ["eval", "perplexity", "--model", run, "--data", folder / "nothing", "--out", folder / "out"]


def unknown_option(folder, run, text):
    return ["train", "--recpie", "demo"]


def missing_option(folder, run, text):
    return ["generate"]


def not_a_number(folder, run, text):
    return ["generate", "--model", run, "--top-p", "many"]


def data_without_its_option(folder, run, text):
    return ["train", "--recipe", "demo", "--out", folder / "out", text]


def negative_micro_batch(folder, run, text):
    return ["train", "--recipe", "demo", "--micro-batch-tokens", "-64", "--data", text, "--out", folder / "out"]


def empty_micro_batch(folder, run, text):
    return ["train", "--recipe", "demo", "--micro-batch-tokens", "0", "--data", text, "--out", folder / "out"]


def batch_of_one_token(folder, run, text):
    return ["train", "--recipe", "demo", "--batch-tokens", "1", "--data", text, "--out", folder / "out"]


def no_minutes(folder, run, text):
    return ["train", "--recipe", "demo", "--minutes", "0", "--data", text, "--out", folder / "out"]


def run_json_of_nothing(folder, run, text):
    (folder / "run.json").write_text("{}")
    return ["train", "--resume", "--out", folder]


def no_tokenizer_and_a_small_vocabulary(folder, run, text):
    recipe = tiny_recipe(text)
    config = dataclasses.replace(recipe, model={**recipe.model, "vocab_size": 50}).model_config()
    LogLinearForCausalLM(config).save_pretrained(folder / "model")
    return ["generate", "--model", folder / "model", "--prompt", "a"]


def evaluation_with_a_small_vocabulary(folder, run, text):
    model = no_tokenizer_and_a_small_vocabulary(folder, run, text)[2]
    return ["eval", "perplexity", "--model", model, "--data", text, "--out", folder / "out"]


def needle_in_text_without_data(folder, run, text):
    return ["eval", "needle", "--model", run, "--task", "single_2", "--out", folder / "out"]


def unknown_needle_task(folder, run, text):
    return ["eval", "needle", "--model", run, "--task", "single_4", "--out", folder / "out"]


def needles_without_room(folder, run, text):
    return ["eval", "needle", "--model", run, "--task", "multiquery", "--length", "512", "--out", folder / "out"]


def needle_documents_without_length(folder, run, text):
    return ["train", "--recipe", "demo", "--data", "needle:100", "--out", folder / "out"]


def short_needle_documents(folder, run, text):
    return ["train", "--recipe", "demo", "--data", "needle:100:201", "--out", folder / "out"]


def prompt_that_is_no_text(folder, run, text):
    return ["generate", "--model", run, "--prompt", "a\udcff"]


BAD = {
    data_without_its_option: "data is named with --data",
    negative_micro_batch: "micro_batch_tokens must be at least 2, got -64",
    empty_micro_batch: "micro_batch_tokens must be at least 2, got 0",
    batch_of_one_token: "batch_tokens must be at least 2, got 1",
    no_minutes: "minutes must be positive, got 0",
    run_json_of_nothing: "has no 'recipe' object",
    no_tokenizer_and_a_small_vocabulary: "has 259 tokens, the model's vocab_size is 50",
    evaluation_with_a_small_vocabulary: "has 259 tokens, the model's vocab_size is 50",
    needle_in_text_without_data: "task single_2 hides its needle in text: give --data",
    unknown_needle_task: "task must be one of single_1, single_2, multikey_1, multivalue, multiquery, got 'single_4'",
    needles_without_room: "tokens are enough, got 512",
    needle_documents_without_length: "data 'needle:100' must be needle:COUNT:LENGTH",
    short_needle_documents: "data 'needle:100:201' must have a LENGTH of at least 202",
    prompt_that_is_no_text: "the prompt is not UTF-8 text",
    binary_data: "is binary, expected UTF-8 text",
    empty_data: "holds no text",
    missing_data: "is neither a file, a folder nor a glob",
    too_little_data: "give more data or lower --batch-tokens",
    unknown_recipe: "did you mean 'demo'",
    unknown_variant: "did you mean 'mamba2'",
    no_recipe: "--recipe is missing",
    recipe_without_data: "give --data",
    recipe_without_tokenizer: "give --tokenizer",
    impossible_steps: "steps must be at least 1, got 0",
    folder_of_another_run: "holds another run: add --resume",
    resume_of_nothing: "holds no run to resume",
    folder_is_a_file: "cannot be written",
    truncated_checkpoint: "model.safetensors is truncated",
    checkpoint_of_another_model: "holds the weights of another model",
    missing_checkpoint: "no checkpoint at",
    evaluation_of_missing_data: "is neither a file",
    unknown_option: "--recpie",
    missing_option: "--model",
    not_a_number: "--top-p",
}
# A process costs seconds of imports, so only these, which fail at different depths, get one of their own.
IN_SUBPROCESS = [unknown_recipe, unknown_option, binary_data, truncated_checkpoint]


def assert_one_line(result, message):
    code, out, errors = result
    assert code == 2, errors
    assert message in errors and errors.count("\n") == 1 and errors.startswith("error: ")
    assert "Traceback" not in errors and out == ""


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.__name__)
def test_bad_input_is_one_line_and_code_2(capsys, tmp_path, run, text, case):
    assert_one_line(in_process(capsys, *case(tmp_path, run, text)), BAD[case])


@pytest.mark.parametrize("case", IN_SUBPROCESS, ids=lambda case: case.__name__)
def test_bad_input_in_a_process_of_its_own(tmp_path, run, text, case):
    assert_one_line(in_subprocess(*case(tmp_path, run, text)), BAD[case])


def test_folder_in_use(capsys, tmp_path, run, text):
    holder = "import sys; from pathlib import Path; from loglinear.training.run_folder import claim\n"
    holder += "with claim(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    try:
        result = in_process(capsys, "train", "--recipe", "demo", "--data", text, "--out", tmp_path)
        assert_one_line(result, f"in use by another process (pid {process.pid})")
    finally:
        process.communicate()


def test_bugs_are_not_dressed_up_as_bad_input(monkeypatch):
    import loglinear.cli.info

    monkeypatch.setattr(loglinear.cli.info, "run", lambda *args: [][1])
    with pytest.raises(IndexError):
        main(["info"])


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_saves_says_how_to_resume_and_resumes(capsys, tmp_path, text):
    out = tmp_path / "run"
    arguments = ["--recipe", "demo", "--data", text, "--out", out, *FAST[2:], "--steps", "400"]
    process = subprocess.Popen(
        [sys.executable, "-m", "loglinear.cli", "train", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").stat().st_size == 0:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    last = errors.strip().splitlines()[-1]
    assert process.returncode == 130 and "Traceback" not in errors
    assert last.startswith("stopped at step ") and last.endswith(f"loglinear train --resume --out {out}")
    done = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert (out / f"checkpoint-{done}").is_dir() and done < 400


def test_ctrl_c_elsewhere_is_one_line(capsys, monkeypatch):
    import loglinear.cli.info

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(loglinear.cli.info, "run", interrupted)
    assert in_process(capsys, "info") == (130, "", "interrupted\n")


# --- what the commands do --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["train"],
        ["generate"],
        ["eval", "perplexity"],
        ["eval", "needle"],
        ["eval", "mqar"],
        ["info"],
        ["demo"],
        ["serve"],
    ],
)
def test_help_has_examples(capsys, command):
    code, out, _ = in_process(capsys, *command, "--help")
    assert code == 0 and ("Example" in out or command == [])


def test_help_is_fast_because_nothing_heavy_is_imported():
    code = "import sys, loglinear.cli; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_train_then_resume_needs_the_folder_alone(capsys, tmp_path, text):
    out = tmp_path / "run"
    command = ["train", "--recipe", "demo", "--data", text, "--out", out, *FAST]
    code, _, errors = in_process(capsys, *command, "--minutes", "1e-9")
    assert code == 130 and errors.endswith(f"continue with: loglinear train --resume --out {out}\n")
    for _ in range(2):  # to the end, and once more
        code, _, errors = in_process(capsys, "train", "--resume", "--out", out)
        assert code == 0 and str(out / "checkpoint-2") in errors


def test_data_takes_all_names_that_follow(capsys, tmp_path, text):
    names = [str(text / f"{index}.txt") for index in range(3)]
    arguments = ["--recipe", "demo", "--data", *names, "--out", tmp_path / "run", *FAST]
    code, _, errors = in_process(capsys, "train", *arguments)
    assert code == 0, errors
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["data"] == names


def test_train_overrides_reach_the_model(capsys, tmp_path, text):
    out = tmp_path / "run"
    options = ["--variant", "gated_delta_net", "--num-levels", "1", "--seed", "3", "--lr", "0.001"]
    code, _, errors = in_process(capsys, "train", "--recipe", "demo", "--data", text, "--out", out, *FAST, *options)
    assert code == 0, errors
    recipe = json.loads((out / "run.json").read_text())["recipe"]
    assert (recipe["model"]["variant"], recipe["model"]["num_levels"]) == ("gated_delta_net", 1)
    assert (recipe["seed"], recipe["learning_rate"], recipe["steps"]) == (3, 0.001, 2)


@pytest.mark.parametrize(("levels", "noted"), [(8, True), (7, False), (1, False)])
def test_levels_that_the_training_cannot_reach_are_named(capsys, tmp_path, text, levels, noted):
    options = ["--recipe", "demo", "--data", text, "--out", tmp_path / "run", *FAST, "--seq-len", "60"]
    code, _, errors = in_process(capsys, "train", *options, "--num-levels", levels)
    note = "note: windows of 60 tokens train 7 of 8 levels, and longer texts would read the others untrained: "
    assert code == 0, errors
    assert (note + "num_levels 7 leaves them out" in errors) == noted


def test_generate_continues_the_prompt_and_reports_speed(capsys, run):
    code, out, errors = in_process(capsys, "generate", "--model", run, "--prompt", "line 1", "--max-new-tokens", "20")
    assert code == 0 and out.startswith("line 1")
    assert "tokens/s" in errors


def test_generate_reads_standard_input(capsys, monkeypatch, run):
    monkeypatch.setattr(sys, "stdin", io.StringIO("line 7"))
    code, out, _ = in_process(capsys, "generate", "--model", run, "--max-new-tokens", "5", "--temperature", "0")
    assert code == 0 and out.startswith("line 7")


def test_eval_perplexity_writes_curve_and_numbers(capsys, tmp_path, run, text):
    arguments = ["--model", run, "--data", text, "--out", tmp_path / "eval", "--length", "128"]
    code, out, errors = in_process(capsys, "eval", "perplexity", *arguments)
    assert code == 0, errors
    result = json.loads((tmp_path / "eval" / "perplexity.json").read_text())
    assert 0 < result["bits_per_byte"] < 8.1 and result["documents"] == 8
    assert len(result["by_position"]["position"]) == len(result["by_position"]["bits_per_byte"]) == 7
    assert (tmp_path / "eval" / "per_position.png").read_bytes().startswith(b"\x89PNG")
    assert f"{result['bits_per_byte']:.4f}" in out


def test_eval_needle_writes_figure_and_numbers(capsys, tmp_path, run, text):
    arguments = ["--model", run, "--length", "1000", "--length", "800", "--examples", "3", "--out", tmp_path / "eval"]
    code, out, errors = in_process(capsys, "eval", "needle", *arguments)
    assert code == 0, errors
    result = json.loads((tmp_path / "eval" / "needle.json").read_text())
    assert list(result["tasks"]) == ["single_1", "multikey_1", "multivalue", "multiquery"] and result["seed"] == 0
    assert all([part["length"] for part in parts] == [800, 1000] for parts in result["tasks"].values())
    assert sum(part["values"] for part in result["tasks"]["multiquery"][0]["by_depth"]) == 12
    assert (tmp_path / "eval" / "needle.png").read_bytes().startswith(b"\x89PNG")
    assert "multivalue" in out and "0.000 ± 0.000" in out


def test_info_lists_everything_there_is(capsys):
    code, out, _ = in_process(capsys, "info")
    assert code == 0
    assert all(name in out for name in [*RECIPES, *VARIANTS, "reference", torch.__version__])


def test_info_of_a_recipe_and_of_a_checkpoint(capsys, run):
    code, out, _ = in_process(capsys, "info", "--recipe", "paper_mamba2")
    assert (
        code == 0 and "825,465,312" in out and "2.8" in out and all(size in out for size in ("4K", "16K", "128K", "1M"))
    )
    code, out, _ = in_process(capsys, "info", "--model", run)
    assert code == 0 and f"{json.loads((run / 'run.json').read_text())['parameters']:,}" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune for")
def test_tune_without_a_gpu_is_one_line(capsys):
    code, _, err = in_process(capsys, "tune", "--length", "4096")
    assert code == 2 and "tune needs a CUDA GPU, and this machine has none" in err


def test_bench_without_the_repository_is_one_line(capsys, monkeypatch, tmp_path):
    import loglinear

    monkeypatch.setattr(loglinear, "__file__", str(tmp_path / "loglinear" / "__init__.py"))
    assert_one_line(in_process(capsys, "bench", "ops"), "benchmarks are part of the repository")


def test_tokenizer_with_too_many_tokens(capsys, tmp_path, text):
    tokenizer = ByteTokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(10)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = ["--recipe", "demo", "--data", text, "--tokenizer", tmp_path / "tokenizer", "--out", tmp_path / "out"]
    assert_one_line(in_process(capsys, "train", *arguments), "has 269 tokens, the model's vocab_size is 264")
