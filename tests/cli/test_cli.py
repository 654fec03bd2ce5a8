"""The command line in processes of their own and in this one: what it prints, and how it ends."""

import io
import json
import signal
import subprocess
import sys

import pytest
import torch

from loglinear.cli.console import count
from loglinear.models import ByteTokenizer, LogLinearConfig, LogLinearForCausalLM
from loglinear.recipes import RECIPES
from loglinear.variants import VARIANTS
from tests.cli.command_line import FAST, assert_one_line, in_process
from tests.training.tiny import tiny_recipe

# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_ctrl_c_saves_says_how_to_resume_and_resumes(capsys, tmp_path, text):
    out = tmp_path / "run"
    arguments = ["--recipe", "demo", "--data", text, "--out", out, *FAST[2:], "--steps", "400"]
    process = subprocess.Popen(
        [sys.executable, "-m", "loglinear.cli", "train", *map(str, arguments)], stderr=subprocess.PIPE, text=True
    )
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").stat().st_size == 0:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
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
        ["convert"],
        ["generate"],
        ["eval", "perplexity"],
        ["eval", "needle"],
        ["eval", "membership"],
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
    last = out / "checkpoint-2"
    for text in (
        f"trained demo for 2 steps: {last}",
        f"demo had finished its 2 steps before, nothing was trained: {last}",
    ):
        code, _, errors = in_process(capsys, "train", "--resume", "--out", out)
        assert code == 0 and errors.splitlines()[-1] == text


@pytest.mark.parametrize("number, text", [(0, "0 files"), (1, "1 file"), (2, "2 files"), (12345, "12,345 files")])
def test_one_thing_is_no_plural(number, text):
    assert count(number, "file") == text


def test_sums_of_one_have_no_plural(capsys, tmp_path, text, run):
    """The commands that print steps, examples and tokens."""
    steps = ["--steps", "1", "--eval-every", "1", "--save-every", "1"]
    calls = {
        "trained demo for 1 step:": ["train", "--recipe", "demo", "--data", text, "--out", tmp_path, *FAST, *steps],
        "share of values found, 1 example ": [
            "eval",
            "needle",
            "--model",
            run,
            "--length",
            "800",
            "--examples",
            "1",
            "--out",
            tmp_path / "eval",
        ],
        "1 token in": ["generate", "--model", run, "--prompt", "line", "--max-new-tokens", "1"],
    }
    for message, arguments in calls.items():
        code, out, errors = in_process(capsys, *arguments)
        words = " ".join((out + errors).split())  # a title breaks where the path of the folder is long
        assert code == 0 and message in words, errors


def test_data_takes_all_names_that_follow(capsys, tmp_path, text):
    names = [str(text / f"{index}.txt") for index in range(3)]
    arguments = ["--recipe", "demo", "--data", *names, "--out", tmp_path / "run", *FAST]
    code, _, errors = in_process(capsys, "train", *arguments)
    assert code == 0, errors
    assert json.loads((tmp_path / "run" / "run.json").read_text())["recipe"]["data"] == names


def test_train_overrides_reach_the_model(capsys, tmp_path, text):
    out = tmp_path / "run"
    options = ["--variant", "gated_delta_net", "--num-levels", "2", "--seed", "3", "--lr", "0.001", "--jitter", "100"]
    code, _, errors = in_process(capsys, "train", "--recipe", "demo", "--data", text, "--out", out, *FAST, *options)
    assert code == 0, errors
    recipe = json.loads((out / "run.json").read_text())["recipe"]
    assert (recipe["model"]["variant"], recipe["model"]["num_levels"]) == ("gated_delta_net", 2)
    assert [recipe[name] for name in ("seed", "learning_rate", "jitter", "steps")] == [3, 0.001, 100, 2]


@pytest.mark.parametrize(("levels", "noted"), [(8, True), (7, False), (1, False)])
def test_levels_that_the_training_cannot_reach_are_named(capsys, tmp_path, text, levels, noted):
    options = ["--recipe", "demo", "--data", text, "--out", tmp_path / "run", *FAST, "--seq-len", "60"]
    code, _, errors = in_process(capsys, "train", *options, "--num-levels", levels)
    note = "note: sequences of 60 tokens train 7 of 8 levels; longer ones would read the others untrained. "
    assert code == 0, errors
    assert (note + "Set num_levels to 7 to leave them out." in errors) == noted


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


def test_eval_needle_decodes_with_few_buckets(capsys, tmp_path):
    """A routed model reads the number of buckets that the option names, or its own; other models refuse the option."""
    sizes = {**tiny_recipe(tmp_path).model, "routing": "gram", "finest_block": 16}
    found = {}
    for name, own, arguments in (
        ("pass", None, []),
        ("few", None, ["--decode-top-k", "1"]),
        ("own", 1, []),
        ("all", 1, ["--decode-top-k", "99"]),
    ):
        torch.manual_seed(0)
        model = LogLinearForCausalLM(LogLinearConfig(**sizes, decode_top_k=own))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(tmp_path / name)
        ByteTokenizer().save_pretrained(tmp_path / name)
        words = [
            "--model",
            tmp_path / name,
            "--length",
            "800",
            "--examples",
            "2",
            "--out",
            tmp_path / "eval",
            *arguments,
        ]
        assert in_process(capsys, "eval", "needle", *words)[0] == 0
        found[name] = json.loads((tmp_path / "eval" / "needle.json").read_text())
    assert [result["decode_top_k"] for result in found.values()] == [None, 1, 1, 99]
    assert found["few"]["tasks"] == found["own"]["tasks"] and found["pass"]["tasks"] == found["all"]["tasks"]
    code, out, _ = in_process(capsys, "info", "--model", tmp_path / "own")
    assert code == 0 and "gram, a step reads its own block and 1 other bucket" in out


def test_eval_membership_writes_figure_and_numbers(capsys, tmp_path, run, text):
    rows = [json.dumps({"text": f"another text, number {number * number}"}) for number in range(4)]
    (tmp_path / "others.jsonl").write_text("\n".join(rows))
    arguments = ["--model", run, "--members", text, "--others", tmp_path / "others.jsonl", "--max-tokens", 40]
    code, printed, errors = in_process(capsys, "eval", "membership", *arguments)
    assert code == 0 and "8 members, 4 others" in printed and "reference" not in printed, errors
    more = ["--reference", run, "--min-k", 50, "--seed", 3, "--out", tmp_path / "eval"]
    code, out, errors = in_process(capsys, "eval", "membership", *arguments, *more)
    assert code == 0, errors
    result = json.loads((tmp_path / "eval" / "membership.json").read_text())
    assert (tmp_path / "eval" / "membership.png").read_bytes().startswith(b"\x89PNG")
    assert list(result["scores"]) == ["loss", "zlib_ratio", "min_k", "reference"]
    assert result["members"] == [str(text)] and (result["max_tokens"], result["min_k"]) == (40, 50)
    assert result["bootstrap"]["seed"] == 3 and result["versions"]["torch"] == torch.__version__
    assert [document["name"] for document in result["documents"]][7:9] == ["7.txt", "others.jsonl:1"]
    assert result["scores"]["reference"]["auc"] == 0.5  # the model is its own reference
    assert f"{result['scores']['loss']['auc']:.3f}" in out and str(tmp_path / "eval") in out


@pytest.mark.parametrize("evaluation", ["perplexity", "membership"])
def test_evaluations_say_that_they_read_all_buckets(capsys, tmp_path, text, evaluation):
    sizes = {**tiny_recipe(tmp_path).model, "routing": "gram", "finest_block": 16}
    (tmp_path / "other.txt").write_text("other text")
    data = {"perplexity": ["--data", text], "membership": ["--members", text, "--others", tmp_path / "other.txt"]}
    told = f"note: {evaluation} reads all buckets; decode_top_k = 2 is for decode steps\n"
    for own, note in ((2, told), (None, "")):
        torch.manual_seed(0)
        LogLinearForCausalLM(LogLinearConfig(**sizes, decode_top_k=own)).save_pretrained(tmp_path / "model")
        ByteTokenizer().save_pretrained(tmp_path / "model")
        words = ["--model", tmp_path / "model", *data[evaluation], "--out", tmp_path / "eval"]
        code, _, errors = in_process(capsys, "eval", evaluation, *words)
        assert code == 0 and "".join(line for line in errors.splitlines(True) if "note" in line) == note


def test_info_lists_everything_there_is(capsys):
    code, out, _ = in_process(capsys, "info")
    assert code == 0
    assert all(name in out for name in [*RECIPES, *VARIANTS, "reference", torch.__version__])
    assert out.endswith("demo: runs as it is\nsmall: needs --data\npaper_*: needs --tokenizer --data\n")


def test_info_of_a_recipe_and_of_a_checkpoint(capsys, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = in_process(capsys, "info", "--recipe", "paper_mamba2")
    assert (
        code == 0 and "825,465,312" in out and "2.8" in out and all(size in out for size in ("4K", "16K", "128K", "1M"))
    )
    heading, columns = "Memory to decode one sequence, all layers (float32 states, all else bfloat16)", out.split("┃")
    assert heading in out and {"state, 15 levels", "KV cache of a Transformer (24 heads of 64)"} <= {
        column.strip() for column in columns
    }
    code, out, _ = in_process(capsys, "info", "--model", run)
    assert code == 0 and f"{json.loads((run / 'run.json').read_text())['parameters']:,}" in out


@pytest.mark.parametrize("variant", ["gla", "kimi_delta_attention"])
def test_a_recipe_trains_a_variant_with_a_decay_for_each_channel(capsys, tmp_path, text, monkeypatch, variant):
    monkeypatch.setenv("COLUMNS", "200")
    run = tmp_path / "run"
    code, _, errors = in_process(
        capsys, "train", "--recipe", "demo", "--variant", variant, "--data", text, "--out", run, *FAST
    )
    assert code == 0, errors
    code, out, errors = in_process(capsys, "info", "--model", run)
    config = json.loads((run / "run.json").read_text())
    assert code == 0 and variant in out and f"{config['parameters']:,}" in out, errors
    code, out, errors = in_process(capsys, "generate", "--model", run, "--prompt", "a", "--max-new-tokens", 3)
    assert code == 0 and out.startswith("a"), errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune for")
def test_tune_without_a_gpu_is_one_line(capsys):
    code, _, err = in_process(capsys, "tune", "--length", "4096")
    assert code == 2 and "tune needs a CUDA GPU, and this machine has none" in err


def test_bench_without_the_repository_is_one_line(capsys, monkeypatch, tmp_path):
    import loglinear

    monkeypatch.setattr(loglinear, "__file__", str(tmp_path / "loglinear" / "__init__.py"))
    assert_one_line(in_process(capsys, "bench", "ops"), "benchmarks are part of the repository")
