"""Folders from strangers: nothing in them runs, nothing foreign is imported, no server is asked."""

import json
import shutil
import socket
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from loglinear.data.tokenizer import load_tokenizer
from loglinear.models import ByteTokenizer, LogLinearForCausalLM
from loglinear.runs.loading import load_model
from tests.training.tiny import tiny_recipe

KERNEL, QUANTISED = "kernels-community/flash-attn", {"quant_method": "quanto", "weights": "int8"}
CONFIG = [
    ({"attn_implementation": KERNEL}, f"attn_implementation = '{KERNEL}' is not what loglinear writes"),
    ({"_attn_implementation": "flash_attention_2"}, "_attn_implementation = 'flash_attention_2' is not what"),
    ({"attn_implementation": 5}, "attn_implementation = 5 is not what loglinear writes"),
    ({"experts_implementation": KERNEL}, "experts_implementation"),
    ({"quantization_config": QUANTISED}, "quantization_config = {'quant_method': 'quanto'"),
    ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map = {'AutoModelForCausalLM': 'evil.Model'}"),
    ({"transformers_weights": "../other.safetensors"}, "transformers_weights = '../other.safetensors'"),
    ({"fusion_config": {"a": True}}, "fusion_config"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling"),
    ({"num_labels": 10**9}, "num_labels"),
    ({"is_encoder_decoder": True}, "is_encoder_decoder = True is not what loglinear writes"),
    ({"anything": None}, "anything = None is not what loglinear writes"),
    ({"model_type": "mamba2"}, "'mamba2' model of transformers: use `loglinear upgrade` or `loglinear convert` first"),
    ({"model_type": "qwen3_5_text"}, "holds a 'qwen3_5_text' model of transformers: use `loglinear upgrade` first"),
    ({"model_type": "gated_deltanet"}, "'gated_deltanet' model of another library: use `loglinear convert` first"),
    ({"model_type": "llama"}, "holds a 'llama' model, expected 'loglinear'"),
    ({"dtype": "load"}, "dtype must be one of float64, float32, bfloat16, float16, got 'load'"),
    ({"num_heads": True}, "num_heads must be int, got True"),
    ({"rope_theta": float("nan")}, "rope_theta must be float, got nan"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps must be positive and finite, got -1.0"),
    ({"num_levels": 10**8}, "num_levels must be at most 64, got 100000000"),
    ({"chunk_size": 2**40}, "chunk_size must be at most 4096, got 1099511627776"),
    ({"impl": "mine"}, "impl must be one of auto, "),
    ({"num_attention_heads": 0}, "num_attention_heads must be an integer of at least 1, got 0"),
    ({"vocab_size": 10**12}, "model.embed_tokens.weight is [264, 32], expected [1000000000000, 32]"),
    ({"vocab_size": 10**18, "hidden_size": 10**18}, "its config.json describes a model of impossible size"),
    ({"num_hidden_layers": 10**4, "layer_types": None}, "its config.json has 10,000 layers, and there are"),
]
GENERATION = [{"num_beams": 10**9}, {"custom_generate": "a/b"}, {"watermarking_config": 3}]
TOKENIZER = [
    ({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}, None),
    ({"auto_map": {"AutoTokenizer": ["a/b--evil.Tokenizer", None]}, "tokenizer_class": "Evil"}, None),
    ({"tokenizer_class": "Evil"}, None),
    ({"tokenizer_class": "RagTokenizer"}, "expected a tokenizer of text"),
    ({"tokenizer_class": 5}, "no tokenizer could be loaded from"),
    ({"added_tokens_decoder": {"1": 1}}, "no tokenizer could be loaded from"),
]
EVIL = "import pathlib; pathlib.Path(__file__).with_name('ran').touch(); raise SystemExit('it ran')"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    LogLinearForCausalLM(tiny_recipe(folder).model_config()).save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, original, monkeypatch):
    """A whole checkpoint with code beside it, which nobody may run, on a machine whose network nobody may ask."""

    def asked(*args):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", asked)
    monkeypatch.setattr(socket.socket, "connect", asked)
    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    shutil.copytree(original, tmp_path / "model")
    for name in ("evil", "modeling_loglinear", "configuration_loglinear", "loglinear_auto", "custom_generate/generate"):
        (tmp_path / "model" / f"{name}.py").parent.mkdir(exist_ok=True)
        (tmp_path / "model" / f"{name}.py").write_text(EVIL)
    yield tmp_path / "model"
    assert not list(tmp_path.rglob("ran"))


def change(file, **fields):
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def refused(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert message in str(caught.value)


def test_a_whole_folder_loads_whatever_code_lies_beside_it(folder):
    model = load_model(folder)
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in model.named_parameters() if name in stored)
    assert isinstance(load_tokenizer(folder), ByteTokenizer)


@pytest.mark.parametrize(("fields", "message"), CONFIG, ids=[str(list(fields)) for fields, _ in CONFIG])
def test_a_config_that_we_did_not_write_is_refused(folder, fields, message):
    change(folder / "config.json", **fields)
    before = set(sys.modules)
    refused(lambda: load_model(folder), message)
    assert not {name for name in set(sys.modules) - before if name.split(".")[0] in ("kernels", "optimum", "evil")}


@pytest.mark.parametrize("fields", GENERATION, ids=str)
def test_settings_of_generation_that_no_command_uses_are_named_and_left_alone(folder, fields, caplog):
    """They are those of another program, and the folder's only ones that may be of any kind."""
    change(folder / "generation_config.json", **fields)
    ((name, value),) = fields.items()
    assert getattr(load_model(folder).generation_config, name, None) is None
    assert f"generation_config.json sets {name} = {value!r}, which transformers' `generate` uses" in caplog.text


def test_settings_of_generation_that_commands_give_themselves_do_not_count(folder):
    change(folder / "generation_config.json", do_sample=True, temperature=9.0, top_k=1)
    assert load_model(folder).generation_config.temperature != 9.0


@pytest.mark.parametrize(
    ("fields", "message"), TOKENIZER, ids=[str(list(fields.items())[0]) for fields, _ in TOKENIZER]
)
def test_a_tokenizer_runs_no_code(folder, fields, message):
    change(folder / "tokenizer_config.json", **fields)
    if message is None:  # ours is registered for the model, and taken; of another class tokenizer.json says all
        loaded = load_tokenizer(folder)
        assert isinstance(loaded, ByteTokenizer) or type(loaded) is PreTrainedTokenizerFast
        assert loaded("é<eos>")["input_ids"] == [*"é".encode(), 257]
    else:
        refused(lambda: load_tokenizer(folder), message)


@pytest.mark.parametrize("named", [{}, {"tokenizer_class": "Evil", "eos_token": "<eos>"}])
def test_another_vocabulary_does_not_pass_for_bytes(folder, named):
    """transformers takes the byte tokenizer wherever it knows no class, whatever tokenizer.json says."""
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {symbol: 255 - id for symbol, id in tokenizer["model"]["vocab"].items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if named:  # tokenizer.json says all
        assert load_tokenizer(folder)("A")["input_ids"] == [255 - ord("A")]
    else:
        refused(lambda: load_tokenizer(folder), "holds another vocabulary than bytes")
    (folder / "tokenizer.json").unlink()
    refused(lambda: load_tokenizer(folder), "tokenizer")


def test_an_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else", "peft_type": "LORA"}')
    refused(lambda: load_model(folder), "holds an adapter: merge it into its model")


def test_pickled_weights_are_not_read(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    refused(lambda: load_model(folder), "pytorch_model.bin is not read, because it could run code")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../model.safetensors"}, "names '../model.safetensors', expected a .safetensors file in its own folder"),
        ({"a": "/etc/passwd"}, "names '/etc/passwd', expected a .safetensors file in its own folder"),
        ({"a": "weights.bin"}, "names 'weights.bin', expected a .safetensors file"),
        ({"a": 5}, "names '5', expected a .safetensors file"),
        ({"a": "model-2.safetensors"}, "names model-2.safetensors, which is missing"),
        ([], "has no 'weight_map' object"),
    ],
)
def test_an_index_names_weights_of_its_own_folder_alone(folder, weight_map, message):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    refused(lambda: load_model(folder), message)


def test_weights_in_parts_are_those_of_the_index(folder):
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(whole)}
    for file in set(names.values()):
        part = {name: value for name, value in whole.items() if names[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    model = load_model(folder)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in whole.items())
    # a file that is whole, and that the index does not name, must not pass for a missing one
    index.write_text(json.dumps({"metadata": {}, "weight_map": {k: v for k, v in names.items() if "00001" in v}}))
    refused(lambda: load_model(folder), "is missing, expected")
