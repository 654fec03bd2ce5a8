"""The commands on a folder that transformers' own Trainer trained and `save_pretrained` wrote."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from loglinear.cli.serve import prepare
from loglinear.evaluation import sample
from loglinear.evaluation.sampling import cache_bytes
from loglinear.models import ByteTokenizer, LogLinearForCausalLM
from loglinear.runs.loading import load_checkpoint
from tests.cli.command_line import assert_one_line, in_process
from tests.data.test_tokenizer import words_without_end
from tests.training.tiny import tiny_recipe
from tests.upgrades.tiny import original, upgraded

TEXT = "def main():\n    return 1\n" * 40


def new_model(kind):
    if kind == "ours":
        torch.manual_seed(0)
        return LogLinearForCausalLM(tiny_recipe(".").model_config())
    return upgraded(original(kind, torch.float32, vocab_size=264))


@pytest.fixture(scope="module", params=["ours", "qwen3_5", "mamba2", "zamba2"])
def trained(request, tmp_path_factory):
    """A model after two steps of the Trainer, and its folder, whose configuration says use_cache = False."""
    folder, model = tmp_path_factory.mktemp(request.param), new_model(request.param)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 256, (4, 33))]
    arguments = TrainingArguments(str(folder / "run"), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True)
    Trainer(model, arguments, train_dataset=rows).train()
    model.save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    assert model.config.use_cache is False
    return model.eval(), folder


def test_generate_uses_a_cache(capsys, trained):
    model, folder = trained
    arguments = ["--model", folder, "--prompt", "def ma", "--temperature", 0, "--max-new-tokens", 9]
    code, out, errors = in_process(capsys, "generate", *arguments)
    assert code == 0 and out.startswith("def ma"), errors
    for loaded in (model, load_checkpoint(folder)[0]):
        result = sample(loaded, ByteTokenizer(), "def ma", max_new_tokens=9, temperature=0)
        assert result.text.strip() == out.strip() and result.state_bytes > 0
    without = model.generate(torch.tensor([[256, *b"def ma"]]), max_new_tokens=9, do_sample=False, use_cache=False)
    assert ByteTokenizer().decode(without[0], skip_special_tokens=True).strip() == out.strip()
    assert cache_bytes(None) == 0


def test_the_server_uses_a_cache(trained):
    from fastapi.testclient import TestClient

    from loglinear.cli.serving.app import application
    from loglinear.cli.serving.turns import Limits

    model, tokenizer = load_checkpoint(trained[1])
    prepare(model, tokenizer)
    lengths = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    with TestClient(application("tiny", model, tokenizer, Limits(tokens=32, prompt_tokens=99, seconds=60))) as client:
        body = {"model": "tiny", "prompt": "def ma", "max_tokens": 5, "temperature": 0}
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200
    assert lengths[0] == 7 and set(lengths[1:]) == {1}  # <bos> and six bytes, then one token after another


def test_info_perplexity_and_membership_take_it(capsys, caplog, trained, tmp_path):
    folder = trained[1]
    (tmp_path / "text.txt").write_text(TEXT)
    code, out, errors = in_process(capsys, "info", "--model", folder)
    assert code == 0 and "parameters" in out, errors
    assert f"{folder} has no manifest.json, as save_pretrained writes none" in caplog.text
    data = ["--data", tmp_path / "text.txt", "--out", tmp_path / "eval", "--length", 64]
    code, out, errors = in_process(capsys, "eval", "perplexity", "--model", folder, *data)
    assert code == 0 and "bits per byte" in out, errors
    (tmp_path / "other.txt").write_text(TEXT[1:])
    data = ["--members", tmp_path / "text.txt", "--others", tmp_path / "other.txt", "--max-tokens", 64]
    code, out, errors = in_process(capsys, "eval", "membership", "--model", folder, *data)
    assert code == 0 and "1 member, 1 other" in out, errors


def test_generate_and_serve_need_no_end_of_sequence(capsys, trained, tmp_path):
    from fastapi.testclient import TestClient

    from loglinear.cli.serving.app import application
    from loglinear.cli.serving.turns import Limits

    trained[0].save_pretrained(tmp_path)
    words_without_end(tmp_path)
    arguments = ["--model", tmp_path, "--prompt", "a b", "--temperature", 0, "--max-new-tokens", 5]
    code, out, errors = in_process(capsys, "generate", *arguments)
    assert code == 0 and out.startswith("a b") and "5 tokens" in errors, errors
    for command in (["generate"], ["eval", "entropy"]):
        empty = in_process(capsys, *command, "--model", tmp_path, "--prompt", "")
        assert_one_line(
            last_line(empty), "the prompt is empty, and this tokenizer has no token to begin with: give a text (--"
        )
    model, tokenizer = load_checkpoint(tmp_path)
    prepare(model, tokenizer)
    with TestClient(application("tiny", model, tokenizer, Limits(tokens=32, prompt_tokens=99, seconds=60))) as client:
        answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "a b", "max_tokens": 5})
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 5
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = ["--model", tmp_path, "--data", tmp_path / "text.txt", "--out", tmp_path / "eval", "--length", 64]
    assert_one_line(last_line(in_process(capsys, "eval", "perplexity", *arguments)), "has no end-of-sequence token")


def last_line(result):
    code, out, errors = result
    return code, out, errors.splitlines()[-1] + "\n"
