"""Everything that the formats share: whole folders, dtypes, levels, tokenizers and mistakes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loglinear.convert import FORMATS, convert
from loglinear.data.tokenizer import encode_document
from loglinear.models import LogLinearForCausalLM
from loglinear.runs import load_checkpoint, load_model
from loglinear.runs.checkpoints import defect, is_listed
from tests.cli.command_line import assert_one_line, in_process
from tests.convert.checkpoints import tokens
from tests.convert.test_transformers import mamba2


@pytest.fixture
def folder(tmp_path):
    mamba2(tmp_path / "in", n_groups=2, bos_token_id=4, eos_token_id=[5, 6], pad_token_id=None)
    return tmp_path / "in"


def change(folder, **options):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))


def change_weights(folder, changed):
    file = folder / "model.safetensors"
    save_file(changed(load_file(file)), file, metadata={"format": "pt"})


def refused(folder, message, **levels):
    """The line of a refusal, after which nothing is left."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(ValueError) as caught:
        convert(folder, folder.parent / "out", source=levels.pop("source", "transformers"), **levels)
    assert message in f"{caught.value}\n" and "\n" not in str(caught.value)
    assert sorted(folder.parent.rglob("*")) == before


def notes_of_weights(result):
    return [note for note in result.notes if "tokenizer" not in note]


# --- the new folder --------------------------------------------------------------------------------------------------


def test_the_checkpoint_is_whole_and_has_a_manifest(folder):
    out = folder.parent / "new" / "out"
    result = convert(folder, out, source="transformers", num_levels=7)
    assert defect(out) is None and is_listed(out)
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    config = load_model(out).config
    assert (config.bos_token_id, config.eos_token_id, config.num_levels) == (4, [5, 6], 7)
    assert (result.config.num_levels, result.config.variant, result.dtype) == (7, "mamba2", "float64")


def test_an_empty_folder_is_filled_and_a_full_one_is_refused(folder):
    out = folder.parent / "out"
    out.mkdir()
    convert(folder, out, source="transformers")
    assert defect(out) is None
    refused(folder, f"output folder {out} is not empty: choose another one")


def test_a_file_in_the_place_of_the_new_folder_is_refused(folder):
    (folder.parent / "out").write_text("")
    refused(folder, "the output must be a folder, got the file")


def test_nothing_is_left_of_a_conversion_that_the_disk_refuses(folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loglinear.convert.target.write_manifest", full)
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(OSError, match="out cannot be written: No space left on device"):
        convert(folder, folder.parent / "out", source="transformers")
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_dtype_is_kept_and_values_per_head_are_wide(folder, dtype):
    change_weights(folder, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    result = convert(folder, folder.parent / "out", source="transformers")
    model = load_model(folder.parent / "out")
    assert (result.dtype, notes_of_weights(result)) == (str(dtype).removeprefix("torch."), [])
    wide = torch.promote_types(dtype, torch.float32)
    for name, p in model.named_parameters():
        assert p.dtype == (wide if name.rsplit(".", 1)[-1] in ("A_log", "dt_bias", "D") else dtype), name


def test_several_dtypes_become_the_one_that_holds_all(folder):
    narrow = "backbone.embeddings.weight"
    change_weights(folder, lambda tensors: {**tensors, narrow: tensors[narrow].half()})
    table = load_file(folder / "model.safetensors")[narrow]
    result = convert(folder, folder.parent / "out", source="transformers")
    assert notes_of_weights(result) == [
        "the weights have several dtypes; all are stored as torch.float64, which holds them exactly"
    ]
    assert torch.equal(load_model(folder.parent / "out").model.embed_tokens.weight, table.double())


def test_weights_in_parts_are_read(folder):
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(whole)}
    for file in set(names.values()):
        save_file({name: whole[name] for name in names if names[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    convert(folder, folder.parent / "out", source="transformers")
    assert torch.equal(load_model(folder.parent / "out").lm_head.weight, whole["lm_head.weight"])


def test_options_that_change_nothing_are_accepted(folder):
    change(folder, is_encoder_decoder=False, norm_before_gate=True, intermediate_size=48, new_option=None, top_k=50)
    convert(folder, folder.parent / "out", source="transformers")


@pytest.mark.parametrize("named", ["class", "no class", "no config"])
def test_the_tokenizer_comes_along(folder, named):
    words = {"<unk>": 0, "a": 1, "b": 2, "</s>": 3}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    if named != "class":
        values = json.loads(config.read_text())
        del values["tokenizer_class"]
        config.write_text(json.dumps(values))
    if named == "no config":
        config.unlink()
    convert(folder, folder.parent / "out", source="transformers")
    if named == "no config":  # which names the end of a sequence
        with pytest.raises(ValueError, match="has no end-of-sequence token"):
            encode_document(load_checkpoint(folder.parent / "out")[1], "a b")
        return
    _, tokenizer = load_checkpoint(folder.parent / "out")
    assert tokenizer("b a c")["input_ids"] == [2, 1, 0] and tokenizer.eos_token_id == 3


def test_a_model_without_a_tokenizer_gets_none(folder):
    """Not even that of bytes, which transformers would take."""
    result = convert(folder, folder.parent / "out", source="transformers")
    assert any("has no tokenizer files" in note and str(folder) in note for note in result.notes)
    with pytest.raises(ValueError, match="has no tokenizer files: copy tokenizer.json"):
        load_checkpoint(folder.parent / "out")


# --- levels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "levels",
    [
        dict(num_levels=4, finest_block=2),
        dict(num_levels=9, radix=4),
        dict(num_levels=6, largest_block=16, finest_block=16),
        dict(num_levels=6, finest_block=16, routing="gram"),
        dict(num_levels=6, lambda_form="unit"),
    ],
    ids=str,
)
def test_every_choice_of_levels_keeps_the_logits(folder, levels):
    linear, chosen = folder.parent / "linear", folder.parent / "chosen"
    convert(folder, linear, source="transformers", num_levels=1)
    convert(folder, chosen, source="transformers", **levels)
    with torch.no_grad():
        model = load_model(chosen)
        expected, found = (m(tokens()[None]).logits for m in (load_model(linear), model))
    assert all(getattr(model.config, name) == value for name, value in levels.items())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (dict(lambda_form="softplus"), "lambda_form must be 'unit', the one in which the logits stay the same"),
        (dict(num_levels=100), "num_levels must be at most 64, got 100"),
        (dict(num_levels=1, routing="gram"), "routing needs num_levels of at least 2, got 1"),
        (dict(num_heads=8), "levels are chosen by num_levels, lambda_form, radix,"),
    ],
    ids=str,
)
def test_levels_that_do_not_fit_are_refused(folder, levels, message):
    refused(folder, message, **levels)


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_bias": True}, "use_bias = True cannot be represented, expected False"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu' cannot be represented, expected 'silu' or 'swish'"),
        (
            {"time_step_limit": [0.001, 1.0]},
            "time_step_limit = [0.001, 1.0] cannot be represented, expected [0.0, inf]",
        ),
        ({"rms_norm": False}, "rms_norm = False cannot be represented, expected True"),
        ({"new_option": 2}, "new_option = 2 is not an option of this format that is known"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4} is not an option"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder = True cannot be represented, expected False"),
        ({"model_type": "llama"}, "model_type must be one of mamba2, got 'llama'"),
        ({"num_heads": 2.5}, "num_heads must be int, got 2.5"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon must be float, got nan"),
        ({"n_groups": 3}, "num_heads must be a multiple of num_groups = 3, got 4"),
        ({"state_size": 6}, "backbone.layers.0.mixer.in_proj.weight is [120, 24], expected [124, 24]"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from backbone.embeddings.weight, expected tied"),
        ({"num_hidden_layers": 1}, "backbone.layers.1.mixer.A_log is [4], expected nothing"),
        ({"num_hidden_layers": 3}, "backbone.layers.2.norm.weight is missing, expected [24]"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_named(folder, options, message):
    change(folder, **options)
    refused(folder, message)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda w: {**w, "extra": torch.ones(2)}, "extra is [2], expected nothing"),
        (lambda w: {k: v for k, v in w.items() if "norm_f" not in k}, "backbone.norm_f.weight is missing, expected"),
        (lambda w: {**w, "lm_head.weight": torch.ones(3, 2)}, "lm_head.weight is [3, 2], expected [50, 24]"),
        (lambda w: {**w, "lm_head.weight": torch.ones(50, 24, dtype=torch.int8)}, "lm_head.weight is torch.int8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, changed, message):
    change_weights(folder, changed)
    refused(folder, message)


def test_damaged_and_missing_files_are_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    refused(folder, "model.safetensors is damaged")
    file.unlink()
    refused(folder, "holds neither model.safetensors nor model.safetensors.index.json")
    torch.save({}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin is not read, because it could run code")
    (folder / "config.json").write_text("[")
    refused(folder, "config.json is not JSON")
    (folder / "config.json").unlink()
    refused(folder, f"no checkpoint at {folder}: expected a folder with config.json")
    refused(folder, "did you mean 'transformers'?", source="tranformers")
    refused(folder, "unknown format 'hf': there are transformers, fla, authors, state-spaces\n", source="hf")


@pytest.mark.parametrize(
    ("options", "source", "message"),
    [
        ({}, "authors", "'mamba2'; this is a folder of transformers or fla: --from transformers or --from fla\n"),
        ({}, "state-spaces", "must be left out, got 'mamba2'; this is a folder of transformers or fla: --from trans"),
        ({"model_type": "gated_deltanet"}, "transformers", "'gated_deltanet'; this is a folder of fla: --from fla\n"),
        ({"model_type": "hattention"}, "fla", "got 'hattention'; this is a folder of authors: --from authors\n"),
        ({"model_type": "", "d_model": 24}, "fla", "this is a folder of state-spaces: --from state-spaces\n"),
        ({"model_type": "qwen3_next"}, "fla", "use `loglinear upgrade` for this model of transformers\n"),
        ({"model_type": "qwen3_5_text"}, "transformers", "use `loglinear upgrade` for this model of transformers\n"),
        ({"model_type": "llama"}, "fla", "got 'llama'\n"),
        ({"model_type": "loglinear"}, "transformers", "'loglinear', so the model is one of this library already\n"),
        ({"model_type": "loglinear_upgrade"}, "state-spaces", "so the model is one of this library already\n"),
    ],
)
def test_a_folder_of_another_format_names_the_command_that_reads_it(folder, options, source, message):
    change(folder, **options)
    refused(folder, message, source=source)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_converts_and_says_what_it_made(folder, capsys):
    change(folder, use_conv_bias=False)
    change_weights(folder, lambda w: {name: tensor for name, tensor in w.items() if not name.endswith("conv1d.bias")})
    out = folder.parent / "out"
    code, text, errors = in_process(capsys, "convert", "--from", "transformers", folder, out, "--num-levels", "5")
    assert code == 0 and errors == (
        "note: the convolutions have no bias in the checkpoint: they get one of zero, which training would change\n"
        f"note: {folder} has no tokenizer files: copy tokenizer.json and tokenizer_config.json into {out}\n"
    )
    assert "mamba2" in text and "float64" in text
    assert isinstance(load_model(out), LogLinearForCausalLM) and load_model(out).config.num_levels == 5


def test_mistakes_on_the_command_line_are_one_line(folder, capsys):
    out = folder.parent / "out"
    calls = {
        "did you mean 'transformers'?": ["--from", "transformer", folder, out],
        "--from": [folder, out],
        "OUT": ["--from", "transformers", folder],
        "'--num-levels': must lie between 1 and": ["--from", "transformers", folder, out, "--num-levels", "0"],
        "`hf download nobody/nothing --local-dir FOLDER` first": ["--from", "fla", "nobody/nothing", out],
        "'grams'": ["--from", "transformers", folder, out, "--routing", "grams"],
        "no checkpoint at": ["--from", "transformers", folder / "nothing", out],
    }
    for message, arguments in calls.items():
        assert_one_line(in_process(capsys, "convert", *arguments), message)
    assert not out.exists()


def test_the_help_names_every_format(capsys):
    code, text, _ = in_process(capsys, "convert", "--help")
    assert code == 0 and all(name in text for name in FORMATS) and "Example" in text
