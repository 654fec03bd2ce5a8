"""A user's mistakes: each ends with exit code 2 and one line that names what was wrong."""

import dataclasses
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loglinear.cli import main
from loglinear.models import ByteTokenizer, LogLinearForCausalLM
from tests.cli.command_line import assert_one_line, in_process, in_subprocess
from tests.training.tiny import tiny_recipe

# What is called, and a part of the line. {run} is a trained model, {text} a folder of text, {out} a folder that is not
# there, {bad} the folder of `bad` below.
TRAIN, GENERATE = "train --recipe demo --data {text} --out {out}", "generate --prompt a --model"
NEEDLE = "eval needle --model {run} --out {out}"
MEMBERSHIP = "eval membership --model {run} --members {text}"
MISTAKES = {
    "train --recipe demo --data {bad}/image.txt --out {out}": "is binary, expected UTF-8 text",
    "train --recipe demo --data {bad}/empty.txt --out {out}": "holds no text",
    "train --recipe demo --data {bad}/nothing --out {out}": "is neither a file, a folder nor a glob",
    "train --recipe demo --data {bad}/short.txt --out {out}": "give more data or lower --batch-tokens",
    "train --recipe demo --out {out} {text}": "data is named with --data",
    "train --recipe demo --data needle:100 --out {out}": "data 'needle:100' must be needle:COUNT:LENGTH",
    "train --recipe demo --data needle:100:201 --out {out}": "data 'needle:100:201' must have a LENGTH of at least 202",
    "train --recipe demmo --data {text} --out {out}": "did you mean 'demo'",
    "train --data {text} --out {out}": "--recipe is missing",
    "train --recipe small --out {out}": "names no data: give --data (files, or 'stdlib')",
    "train --recipe paper_mamba2 --data {text} --out {out}": "names no tokenizer: give --tokenizer",
    "train --recipe paper_mamba2 --out {out}": "names no tokenizer and no data: give --tokenizer",
    "train --recipe demo --data= --out {out}": "--data must not be empty",
    "train --recipe demo --data - --out {out}": "data '-': standard input is not read",
    "train --recipe demo --data https://a/b.txt --out {out}": "data 'https://a/b.txt': URLs are not read",
    "train --recipe demo --data {bad}/\udcff.txt --out {out}": "has a name that is not UTF-8: rename it",
    "train --recipe demo --data needle:9999999999:300 --out {out}": "must be needle:COUNT:LENGTH",
    "train --recipe demo --data {text} --out {run}": "holds another run: add --resume",
    "train --recipe demo --data {text} --out {bad}/image.txt": "cannot be written",
    "train --resume --out {out}": "does not exist, expected the folder of a training run",
    "train --resume --out {bad}": "holds no training run (no run.json)",
    "train --resume --out {bad}/image.txt": "must be the folder of a training run, got the file",
    "train --resume --recipe small --out {run}": "--recipe small is not the recipe of the run in {run}",
    "train --resume --recipe demo --out {run}": ", which is tiny: leave out --recipe to continue it",
    "train --resume {run}": "--resume takes no value, got '{run}': continue a run with --resume --out {run}",
    "train --resume {run} --recipe demo": "with --resume --out {run}, without --recipe",
    "train --recipe demo --resume {run} --out {run}": "with --resume --out {run}, without --recipe",
    "train --resume": "Missing option '--out'",
    "train --resume --recipe demmo --out {run}": "did you mean 'demo'",
    "train --resume --steps 9 --data {bad}/nothing --out {run}": "cannot resume with",
    "train --resume --model {run} --out {run}": "holds a run with start = None, which cannot resume with",
    "train --resume --out {bad}/run": "has no 'recipe' object",
    "train --recpie demo": "--recpie",
    f"{TRAIN} --variant mamba22": "did you mean 'mamba2'",
    f"{TRAIN} --steps 0": "'--steps': must lie between 1 and 2147483647, got 0",
    f"{TRAIN} --micro-batch-tokens -64": "'--micro-batch-tokens': must lie between 2 and 2147483647, got -64",
    f"{TRAIN} --micro-batch-tokens 0": "'--micro-batch-tokens': must lie between 2 and 2147483647, got 0",
    f"{TRAIN} --batch-tokens 1": "'--batch-tokens': must lie between 2 and 2147483647, got 1",
    f"{TRAIN} --minutes 0": "'--minutes': must be positive, got 0",
    f"{TRAIN} --minutes nan": "'--minutes': must be positive, got nan",
    f"{TRAIN} --num-levels 100000000": "num_levels must be at most 64, got 100000000",
    f"{TRAIN} --num-levels 0": "'--num-levels': must lie between 1 and 2147483647, got 0",
    f"{TRAIN} --lr 1e38": "'--lr': must be positive and at most 1, got 1e+38",
    f"{TRAIN} --lr nan": "'--lr': must be positive and at most 1, got nan",
    f"{TRAIN} --seed 4294967296": "'--seed': must lie between 0 and 4294967295, got 4294967296",
    f"{TRAIN} --steps 3000000000": "'--steps': must lie between 1 and 2147483647, got 3000000000",
    f"{TRAIN} --tokenizer {{bad}}/tokenizer": "has 269 tokens, the model's vocab_size is 264",
    "generate": "--model",
    "generate --model {run} --top-p many": "--top-p",
    "generate --model {run} --prompt a --top-p nan": "--top-p",
    "generate --model {run} --prompt a --top-p 0": "'--top-p': must be positive and at most 1, got 0",
    "generate --model {run} --prompt a --temperature -1": "'--temperature': must lie between 0 and 100, got -1.0",
    "generate --model {run} --prompt a --temperature inf": "--temperature",
    "generate --model {run} --prompt a --temperature nan": "--temperature",
    "generate --model {run} --prompt a --max-new-tokens 10000000000": "--max-new-tokens",
    "generate --model= --prompt a": "--model must not be empty",
    "serve --model {run} --host a\udcff": "--host must be an address of this machine, got 'a\\udcff'",
    "serve --model {run} --timeout nan": "'--timeout': must be positive and at most 2147483647, got nan",
    "serve --model {run} --max-tokens 0": "--max-tokens",
    "serve --model {run} --engine vllm --slots 0": "--slots must be at least 1 with --engine vllm, got 0",
    "serve --model {run} --engine vllm --timeout 9": "--timeout must be left out with --engine vllm",
    "serve --model {run} --engine vllm --prefix-cache 9": "--prefix-cache must be 0 or left out with --engine vllm",
    "bench ops --rounds 0": "--rounds must lie between 1 and 2147483647, got 0",
    "bench ops --lengths many": "--lengths",
    "bench ops --out {bad}": "--out must be a file, got the folder",
    "bench ops --round 3": "--round",
    "generate --model {run} --prompt a\udcff": "the prompt is not UTF-8 text",
    f"{GENERATE} {{bad}}/truncated": "model.safetensors is truncated",
    f"{GENERATE} {{bad}}/mixed": "holds the weights of another model",
    f"{GENERATE} {{bad}}/small": "has 259 tokens, the model's vocab_size is 50",
    f"{GENERATE} {{bad}}/other": "has no tokenizer files: copy tokenizer.json",
    "info --model {bad}/nothing": "no checkpoint at",
    "eval perplexity --model {run} --data {bad}/nothing --out {out}": "is neither a file",
    "eval perplexity --model {bad}/small --data {text} --out {out}": "has 259 tokens, the model's vocab_size is 50",
    "eval perplexity --model {run} --data {text} --out {bad}/image.txt": "--out must be a folder, got the file",
    "eval needle --model {run} --out {bad}/image.txt": "--out must be a folder, got the file",
    "eval entropy --model {bad}/nothing --prompt a": "no checkpoint at",
    "eval entropy --model {bad}/small --prompt a": "has 259 tokens, the model's vocab_size is 50",
    "eval entropy --model {bad}/other --prompt a": "has no tokenizer files: copy tokenizer.json",
    "eval entropy --model {run} --prompt a --out {bad}/image.txt": "--out must be a folder, got the file",
    "eval entropy --model {run} --prompt a\udcff": "the prompt is not UTF-8 text",
    "eval entropy --model {run} --prompt a --quantile 1.5": "--quantile",
    "eval entropy --model {run} --prompt a --quantile nan": "--quantile",
    "eval entropy --model {run} --prompt a --quantile 0": "'--quantile': must be positive and at most 1, got 0",
    "eval entropy --model {run} --prompt a --temperature -1": "--temperature",
    "eval entropy --model {run} --prompt a --out=": "--out must not be empty",
    "eval membership --model {bad}/nothing --members {text} --others {bad}/short.txt": "no checkpoint at",
    f"{MEMBERSHIP} --others {{bad}}/short.txt --reference {{bad}}/nothing": "no checkpoint at",
    f"{MEMBERSHIP} --others {{bad}}/short.txt --out {{bad}}/image.txt": "--out must be a folder, got the file",
    f"{MEMBERSHIP} --others {{bad}}/nothing": "is neither a file",
    f"{MEMBERSHIP} --others {{bad}}/empty.txt": "holds no text",
    f"{MEMBERSHIP} --others {{bad}}/image.txt": "is binary, expected UTF-8 text",
    f"{MEMBERSHIP} --others {{text}}/3.txt": "1 of the others, as far as they are read, are members too: 3.txt is",
    f"{NEEDLE} --task single_2": "task single_2 hides its needle in text: give --data",
    f"{NEEDLE} --task single_4": "task must be one of single_1, single_2, multikey_1, multivalue, multiquery, got",
    f"{NEEDLE} --task multiquery --length 512": "tokens are enough, got 512",
}
# A process costs seconds of imports, so only these, which fail at different depths, get one of their own.
IN_SUBPROCESS = [call for call in MISTAKES if any(part in call for part in ("demmo", "recpie", "--data {bad}/image"))]
IN_SUBPROCESS += [f"{GENERATE} {{bad}}/truncated"]


@pytest.fixture(scope="module")
def bad(tmp_path_factory, run, text):
    """A folder of what is no text, no model of its configuration, or no run."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "image.txt").write_bytes(b"\x89PNG\0\0\0")
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("short")
    (folder / "\udcff.txt").write_text("named in another encoding")
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text("{}")
    tokenizer = ByteTokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(10)])
    tokenizer.save_pretrained(folder / "tokenizer")
    for name in ("truncated", "mixed"):
        shutil.copytree(run / "checkpoint-8", folder / name)
    (folder / "mixed" / "manifest.json").unlink()
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    recipe = tiny_recipe(text)
    LogLinearForCausalLM(recipe.override(num_levels=3).model_config()).save_pretrained(folder / "other")
    shutil.copy(folder / "other" / "model.safetensors", folder / "mixed" / "model.safetensors")
    small = dataclasses.replace(recipe, model={**recipe.model, "vocab_size": 50}).model_config()
    LogLinearForCausalLM(small).save_pretrained(folder / "small")
    ByteTokenizer().save_pretrained(folder / "small")
    return folder


@pytest.fixture
def arguments_of(tmp_path, run, text, bad):
    places = {"run": run, "text": text, "out": tmp_path / "out", "bad": bad}
    return lambda call: [part.format(**places) for part in call.split()]


@pytest.mark.parametrize("call", MISTAKES, ids=ascii)
def test_a_mistake_is_one_line_and_code_2(capsys, arguments_of, run, call):
    assert_one_line(in_process(capsys, *arguments_of(call)), MISTAKES[call].replace("{run}", str(run)))


@pytest.mark.parametrize("call", IN_SUBPROCESS)
def test_a_mistake_in_a_process_of_its_own(arguments_of, call):
    assert_one_line(in_subprocess(*arguments_of(call)), MISTAKES[call])


def test_folder_in_use(capsys, tmp_path, text):
    holder = "import sys; from pathlib import Path; from loglinear.runs.folder import claim\n"
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


def test_bugs_are_not_dressed_up_as_mistakes(monkeypatch):
    import loglinear.cli.info

    monkeypatch.setattr(loglinear.cli.info, "run", lambda *args: [][1])
    with pytest.raises(IndexError):
        main(["info"])


def test_the_example_without_arguments_is_one_line(capsys, monkeypatch):
    script = Path(__file__).parents[2] / "examples" / "train_and_generate.py"
    monkeypatch.setattr(sys, "argv", [str(script)])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(script), run_name="__main__")
    captured = capsys.readouterr()
    assert_one_line((exit_.value.code, captured.out, captured.err), "data")


@pytest.mark.parametrize("error", [MemoryError("8 TiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8")])
def test_too_little_memory_is_one_line(capsys, monkeypatch, error):
    import loglinear.cli.info

    def too_large(*args):
        raise error

    monkeypatch.setattr(loglinear.cli.info, "run", too_large)
    assert_one_line(in_process(capsys, "info"), str(error))
