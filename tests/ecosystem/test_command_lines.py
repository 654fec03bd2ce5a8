"""Stock tools in processes of their own, which nothing told of this library but the checkpoint."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loglinear.models import LogLinearForCausalLM
from tests.ecosystem.tiny import save_tiny

TEXTS = ["a first text", "another one é", "and a third, longer than the others"]
QUESTIONS = [("is it", 0), ("was it", 1), ("will it be", 0)]
CHOICES = ["yes", "no"]
TASKS = {
    "tiny_texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "tiny_choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": CHOICES,
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("stock") / "checkpoint-8")


def run(command: list[str], home: Path) -> str:
    """The output of a tool that reaches no hub and finds no file of an earlier run."""
    environment = {**os.environ, "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def nats(model: LogLinearForCausalLM, before: list[int], after: bytes) -> float:
    ids = torch.tensor([[*before, *after]])
    targets = torch.full_like(ids, -100)
    targets[:, len(before) :] = ids[:, len(before) :]
    return model(ids, labels=targets).loss.item() * len(after)


def test_lm_eval_measures_what_the_models_own_loss_says(checkpoint, tmp_path):
    rows = {
        "tiny_texts": [{"text": text} for text in TEXTS],
        "tiny_choices": [{"text": text, "answer": answer} for text, answer in QUESTIONS],
    }
    for name, task in TASKS.items():
        data = {"test": str(write_lines(tmp_path / f"{name}.jsonl", rows[name]))}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": data}, **task}
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**task, "test_split": "test"}))
    run(
        [
            tool("lm_eval"),
            "run",
            "--model",
            "hf",
            "--model_args",
            f"pretrained={checkpoint},trust_remote_code=True",
            "--tasks",
            ",".join(TASKS),
            "--include_path",
            str(tmp_path),
            "--device",
            "cpu",
            "--batch_size",
            "2",
            "--output_path",
            str(tmp_path / "out"),
        ],
        tmp_path,
    )
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    model = LogLinearForCausalLM.from_pretrained(checkpoint)
    total = sum(nats(model, [256], text.encode()) for text in TEXTS)
    expected = total / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert results["tiny_texts"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-5)
    chosen = [
        min(range(2), key=lambda i: nats(model, list(question.encode()), f" {CHOICES[i]}".encode()))
        for question, _ in QUESTIONS
    ]
    right = [choice == answer for choice, (_, answer) in zip(chosen, QUESTIONS, strict=True)]
    assert results["tiny_choices"]["acc,none"] == pytest.approx(sum(right) / len(right))


def test_trl_sft_trains_and_saves_a_checkpoint_that_opens_the_same_way(checkpoint, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_lines(data / "train.jsonl", [{"text": text * 3} for text in TEXTS])
    run(
        [
            tool("trl"),
            "sft",
            "--model_name_or_path",
            str(checkpoint),
            "--trust_remote_code",
            "--dataset_name",
            str(data),
            "--output_dir",
            str(tmp_path / "out"),
            "--max_steps",
            "1",
            "--per_device_train_batch_size",
            "2",
            "--use_cpu",
            "--report_to",
            "none",
            "--dtype",
            "float32",
            "--bf16",
            "False",
        ],
        tmp_path,
    )
    trained = tmp_path / "out" / "checkpoint-1"
    code = (
        "import transformers as t, sys\n"
        "folder, options = sys.argv[1], {'trust_remote_code': True}\n"
        "classes = [t.AutoConfig, t.AutoModel, t.AutoModelForCausalLM, t.AutoModelForSequenceClassification,\n"
        "           t.AutoModelForTokenClassification, t.AutoModelForQuestionAnswering, t.AutoTokenizer]\n"
        "print(*(type(kind.from_pretrained(folder, **options)).__name__ for kind in classes))\n"
        "write = t.pipeline('text-generation', folder, **options)\n"
        "print(len(write('abc', max_new_tokens=3, do_sample=False, return_tensors=True)[0]['generated_token_ids']))"
    )
    printed = run([sys.executable, "-c", code, str(trained)], tmp_path).splitlines()
    heads = [f"LogLinearFor{task}" for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering")]
    assert printed[0].split() == ["LogLinearConfig", "LogLinearModel", "LogLinearForCausalLM", *heads, "ByteTokenizer"]
    assert printed[1] == "6"
    names = {file.name for file in trained.iterdir()}
    assert "loglinear_auto.py" in names and not names & {"modeling.py", "configuration.py", "tokenizer.py"}


def test_without_trust_no_file_of_a_checkpoint_is_executed(checkpoint, tmp_path):
    code = (
        "import sys, transformers\n"
        "try:\n    transformers.AutoModel.from_pretrained(sys.argv[1], trust_remote_code=False)\n"
        "except ValueError as error:\n    print(error)\n"
        "print('loglinear' in sys.modules)"
    )
    printed = run([sys.executable, "-c", code, str(checkpoint)], tmp_path)
    assert "trust_remote_code=True" in printed and printed.endswith("False\n")
