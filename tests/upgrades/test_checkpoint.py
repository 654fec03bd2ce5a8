"""Checkpoints of upgraded models: saved and loaded by transformers, with and without this library, and adapters."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
)
from transformers.models.nemotron_h_omni.configuration_nemotron_h_omni import NemotronH_Omni_Reasoning_V3_Config
from transformers.models.nemotron_h_omni.modeling_nemotron_h_omni import NemotronH_Omni_Reasoning_V3

import loglinear
from loglinear.upgrades.checkpoint import ENTRY
from tests.upgrades.tiny import (
    COMMON,
    LEVELS,
    MODELS,
    NEMOTRON,
    auto_class_of,
    original,
    tokens,
    trained,
    upgraded,
    with_eager_experts,
)

FAMILIES = pytest.mark.parametrize("family", MODELS)
READ = "print(type(model).__name__, float(model(torch.arange(3, 43)[None]).logits.double().abs().sum()))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An upgraded checkpoint, and the number that READ prints for it."""
    model = trained(original("qwen3_5", torch.float32))
    path = tmp_path_factory.mktemp("upgraded")
    model.save_pretrained(path)
    with torch.no_grad():
        return path, float(model(torch.arange(3, 43)[None]).logits.double().abs().sum())


def run(code: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=240)


def contents(folder) -> dict:
    """Return config.json without its dtypes, which transformers also writes into the parts when it loads them."""
    return json.loads(
        (folder / "config.json").read_text(),
        object_hook=lambda part: {name: value for name, value in part.items() if name != "dtype"},
    )


@FAMILIES
@pytest.mark.parametrize("choices", [{}, {"routing": "gram", "radix": 4, "finest_block": 4}], ids=["levels", "routing"])
@torch.no_grad()
def test_a_saved_model_loads_as_it_was(family, choices, tmp_path):
    model, ids = trained(original(family, torch.float32), **choices), tokens(2, 40)
    model.save_pretrained(tmp_path)
    loaded = with_eager_experts(auto_class_of(family).from_pretrained(tmp_path))
    assert type(loaded) is type(model) and type(loaded.config) is type(model.config)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == {*loglinear.new_parameters(model)}
    loaded.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path)


@FAMILIES
def test_the_keys_of_the_original_remain(family, tmp_path):
    """Its checkpoint loads with a configuration of the upgrade: the new parameters are then neutral."""
    theirs = original(family, torch.float32)
    model = upgraded(theirs, routing="gram")
    assert {*theirs.state_dict()} <= {*model.state_dict()}
    theirs.save_pretrained(tmp_path)
    loaded = auto_class_of(family).from_pretrained(tmp_path, config=model.config)
    assert all((p == 0).all() for p in loglinear.new_parameters(loaded).values())
    with torch.no_grad():  # experts have another implementation after loading
        assert torch.allclose(loaded(tokens(1, 30)).logits, model(tokens(1, 30)).logits, atol=1e-4)


@FAMILIES
@pytest.mark.parametrize("routing", [None, "gram"])
@torch.no_grad()
def test_sixteen_bit_checkpoints_keep_new_parameters_in_float32(family, routing, tmp_path):
    model, ids, logits = trained(original(family, torch.bfloat16), routing=routing), tokens(1, 30), []
    for options in ({}, {"dtype": "auto"}, {"dtype": torch.bfloat16}):
        model.save_pretrained(tmp_path)
        loaded = auto_class_of(family).from_pretrained(tmp_path, **options)
        assert loaded.dtype == torch.bfloat16
        for name, parameter in loglinear.new_parameters(model).items():
            found = loaded.get_parameter(name)
            assert found.dtype == torch.float32 and torch.equal(found, parameter)
        model = loaded
        logits.append(model(ids).logits)
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


@torch.no_grad()
def test_a_file_of_a_16_bit_model_loses_nothing(tmp_path):
    theirs, ids = original("qwen3_5", torch.bfloat16), tokens(1, 30)
    model = trained(theirs)
    loglinear.save_upgrade(model, tmp_path / "levels.safetensors")
    loglinear.load_upgrade(theirs, tmp_path / "levels.safetensors")
    assert torch.equal(theirs(ids).logits, model(ids).logits)
    assert all(torch.equal(p, theirs.get_parameter(name)) for name, p in loglinear.new_parameters(model).items())


def test_other_auto_classes_load_the_model(folder):
    path, _ = folder
    config = AutoConfig.from_pretrained(path)
    assert config.model_type == "qwen3_5_text" and getattr(config, ENTRY)["num_levels"] == LEVELS["num_levels"]
    for auto_class in (AutoModel, AutoModelForSequenceClassification):
        assert loglinear.new_parameters(auto_class.from_pretrained(path))


def test_a_head_that_the_folder_lacks_is_trained(folder):
    """Frozen, it would keep its random weights; the weights of the folder stay frozen."""
    model = AutoModelForSequenceClassification.from_pretrained(folder[0], num_labels=3)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {"score.weight", *loglinear.new_parameters(model)}
    _, found = AutoModelForSequenceClassification.from_pretrained(folder[0], num_labels=3, output_loading_info=True)
    assert found["missing_keys"] == {"score.weight"}


def trainable(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_what_was_trained_is_trained_after_the_next_load(folder, tmp_path):
    """A head that a first load added, and parameters that the user set free; not those that nobody trained."""
    model = AutoModelForSequenceClassification.from_pretrained(folder[0], num_labels=3)
    model.save_pretrained(tmp_path / "head")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "head")
    assert trainable(loaded) == trainable(model) and "score.weight" in trainable(model)
    assert torch.equal(loaded.score.weight, model.score.weight)
    loaded.model.norm.requires_grad_(True)
    loaded.score.requires_grad_(False)
    loaded.save_pretrained(tmp_path / "norm")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "norm")
    assert trainable(again) == trainable(loaded) and {"model.norm.weight"} <= trainable(again)
    new = {f"model.{name}" for name in loglinear.new_parameters(AutoModel.from_pretrained(tmp_path / "norm"))}
    assert {f"model.{name}" for name in trainable(AutoModel.from_pretrained(tmp_path / "norm"))} == trainable(again)
    again.model.norm.requires_grad_(False)
    again.save_pretrained(tmp_path / "new")
    assert trainable(AutoModelForSequenceClassification.from_pretrained(tmp_path / "new")) == new


def test_a_model_that_was_set_free_stays_free(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder[0]).requires_grad_(True)
    model.save_pretrained(tmp_path)
    assert all(p.requires_grad for p in AutoModelForCausalLM.from_pretrained(tmp_path).parameters())


def test_a_file_of_the_new_parameters_does_not_say_what_else_was_trained(folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(folder[0], num_labels=3)
    model.save_pretrained(tmp_path / "head")
    loglinear.save_upgrade(model, tmp_path / "levels.safetensors")
    theirs = original("qwen3_5", torch.float32)
    loglinear.load_upgrade(theirs, tmp_path / "levels.safetensors")
    assert trainable(theirs) == {*loglinear.new_parameters(theirs)}


@pytest.mark.parametrize(
    "imports",
    [
        "import loglinear, torch\nfrom transformers import AutoModelForCausalLM",
        "import torch, transformers\nimport loglinear\nfrom transformers import AutoModelForCausalLM",
        "import torch\nfrom transformers import AutoModelForCausalLM\nimport loglinear",
    ],
    ids=["before", "between", "after"],
)
def test_an_import_of_loglinear_is_enough(folder, imports):
    path, number = folder
    name, read = run(f"{imports}\nmodel = AutoModelForCausalLM.from_pretrained({str(path)!r})\n{READ}").stdout.split()
    assert name == "Qwen3_5ForCausalLM" and float(read) == pytest.approx(number, rel=1e-5)


def test_without_the_import_the_checkpoint_is_refused_or_loads_with_trust(folder):
    path, number = folder
    load = f"import torch\nfrom transformers import AutoModelForCausalLM as A\nmodel = A.from_pretrained({str(path)!r}"
    refused = run(f"{load}, trust_remote_code=False)\n{READ}")
    assert "trust_remote_code" in refused.stderr.strip().splitlines()[-1]
    trusted = run(f"{load}, trust_remote_code=True)\n{READ}")
    assert float(trusted.stdout.split()[1]) == pytest.approx(number, rel=1e-5)


REFUSED = "upgraded by loglinear: import loglinear, and load the folder with an Auto class"


def stock_class(model):
    return next(kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers."))


@FAMILIES
def test_the_class_of_transformers_refuses_the_folder(family, tmp_path):
    """It would load the linear model, without the trained level weights."""
    model = trained(original(family, torch.float32, initializer_range=0.0123))
    model.save_pretrained(tmp_path)
    with pytest.raises(Exception, match=REFUSED):
        stock_class(model).from_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert {each.get_text_config().initializer_range for each in (config, model.config)} == {0.0123}
    assert getattr(config, ENTRY) == getattr(model.config, ENTRY)


def test_the_class_of_transformers_refuses_the_folder_in_every_program(folder):
    code = "from transformers import Qwen3_5ForCausalLM as Model"
    for imports in (code, f"import loglinear\n{code}", f"{code}\nimport loglinear"):
        refused = run(f"{imports}\nModel.from_pretrained({str(folder[0])!r})")
        assert refused.returncode != 0 and REFUSED in refused.stderr.strip().splitlines()[-1]


def test_the_class_itself_loads_the_model(folder):
    model = type(upgraded(original("qwen3_5")))
    assert loglinear.new_parameters(model.from_pretrained(folder[0]))


@torch.no_grad()
def test_a_pickled_model_is_the_model():
    model, ids = trained(original("qwen3_next")), tokens(1, 20)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, model(ids).logits)


def test_a_configuration_without_an_entry_is_refused(folder, tmp_path):
    contents = json.loads((folder[0] / "config.json").read_text())
    del contents[ENTRY]
    (tmp_path / "config.json").write_text(json.dumps(contents))
    with pytest.raises(ValueError, match="config.json must have an entry 'loglinear_upgrade' with a base_model_type"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [{"freeze": None}, {"trained": 5}, {"trained": [5]}], ids=str)
def test_an_entry_without_sense_is_refused(folder, tmp_path, change):
    contents = json.loads((folder[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**contents, ENTRY: {**contents[ENTRY], **change}}))
    with pytest.raises(ValueError, match="config.json: loglinear_upgrade must have 'freeze', true or false, and"):
        AutoConfig.from_pretrained(tmp_path)


@FAMILIES
@torch.no_grad()
def test_the_new_parameters_alone_are_a_file(family, tmp_path):
    theirs, ids = original(family), tokens(1, 30)
    model = trained(theirs, routing="gram")
    loglinear.save_upgrade(model, tmp_path / "levels.safetensors")
    right = model(ids).logits
    report = loglinear.load_upgrade(theirs, tmp_path / "levels.safetensors")
    assert str(report).endswith("are loaded") and "neutral" not in str(report)
    assert torch.equal(theirs(ids).logits, right)
    assert (tmp_path / "levels.safetensors").stat().st_size < 8 * report.new_parameters + 4000


def compiled_layers(model):
    model.model.layers[0] = torch.compile(model.model.layers[0])
    return model


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, nn.DataParallel, lambda model: nn.DataParallel(torch.compile(model)), compiled_layers],
    ids=["compiled", "parallel", "both", "layers"],
)
@torch.no_grad()
def test_the_file_of_a_wrapped_model_is_that_of_the_model(wrap, tmp_path):
    theirs, ids = original("qwen3_5"), tokens(1, 30)
    model = trained(theirs)
    right = model(ids).logits
    loglinear.save_upgrade(wrap(model), tmp_path / "levels.safetensors")
    loglinear.load_upgrade(theirs, tmp_path / "levels.safetensors")
    assert torch.equal(theirs(ids).logits, right)


def test_models_whose_parameters_are_elsewhere_are_refused(tmp_path):
    path, model = tmp_path / "levels.safetensors", trained(original("qwen3_5"))
    loglinear.save_upgrade(model, path)
    for wrapped in (torch.compile(original("qwen3_5")), nn.DataParallel(original("qwen3_5"))):
        with pytest.raises(ValueError, match=f"model must be a model of transformers, got {type(wrapped).__name__}"):
            loglinear.load_upgrade(wrapped, path)
    flattened = type("FullyShardedDataParallel", (nn.Sequential,), {})(model)  # torch's own needs a GPU
    with pytest.raises(ValueError, match="model is flattened by FullyShardedDataParallel: save the whole model, or us"):
        loglinear.save_upgrade(flattened, path)
    with pytest.raises(ValueError, match="model must be an upgraded model of transformers, got Sequential"):
        loglinear.save_upgrade(nn.Sequential(model), path)
    offloaded = cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="model must have its parameters in memory, some are offloaded"):
        loglinear.save_upgrade(offloaded, path)


def test_files_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "levels.safetensors"
    with pytest.raises(ValueError, match="has no new parameters: upgrade it first"):
        loglinear.save_upgrade(original("qwen3_5"), path)
    with pytest.raises(ValueError, match="path must be a file of save_upgrade"):
        loglinear.load_upgrade(original("qwen3_5"), path)
    path.write_text("nonsense")
    with pytest.raises(ValueError, match="path must be a file of save_upgrade"):
        loglinear.load_upgrade(original("qwen3_5"), path)
    loglinear.save_upgrade(upgraded(original("qwen3_5")), path)
    with pytest.raises(ValueError, match="model must be of type 'qwen3_5_text', as the file says, got 'olmo_hybrid'"):
        loglinear.load_upgrade(original("olmo_hybrid"), path)
    with pytest.raises(ValueError, match="num_levels is decided by the file"):
        loglinear.load_upgrade(original("qwen3_5"), path, num_levels=4)


def qwen3_5_of_images():
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=COMMON, vision_config=vision))


def nemotron_h_of_images():
    sizes = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=4, image_size=16, max_img_size=32
    )
    vision = dict(model_type="radio", video_temporal_patch_size=2, **sizes)
    text = dict(model_type="nemotron_h", **NEMOTRON)
    return NemotronH_Omni_Reasoning_V3(
        NemotronH_Omni_Reasoning_V3_Config(
            text_config=text, vision_config=vision, vision_hidden_size=16, projector_hidden_size=16, image_token_id=99
        )
    )


@pytest.mark.parametrize("make", [qwen3_5_of_images, nemotron_h_of_images])
@torch.no_grad()
def test_a_model_of_images_and_text_keeps_its_text(make, tmp_path):
    theirs, ids = make().eval(), tokens(2, 20)
    greedy = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    model = trained(theirs)
    assert torch.allclose(upgraded(theirs)(ids).logits, theirs(ids).logits, atol=1e-4)
    assert torch.equal(upgraded(theirs).generate(ids, **greedy), theirs.generate(ids, **greedy))
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForImageTextToText.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    for kind in (type(theirs), *((Qwen3_5ForCausalLM,) if make is qwen3_5_of_images else ())):
        with pytest.raises(Exception, match=REFUSED):
            kind.from_pretrained(tmp_path)
