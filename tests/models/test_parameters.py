"""The module that owns each parameter, its dtype and its decay: sharding, offloading and trainers go by them."""

from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import HYBRID, TRANSFORMER, tiny_config, tokens
from transformers import Trainer, TrainingArguments

from loglinear.layers.former_names import FORMER_NAMES, current_name
from loglinear.models import LogLinearForCausalLM
from loglinear.variants import VARIANTS, HeadBias

MODELS = pytest.mark.parametrize(
    "options",
    [
        *({"variant": name} for name in VARIANTS),
        {"lambda_form": "bounded"},
        {"lambda_form": "unit"},
        HYBRID,
        TRANSFORMER,
    ],
)
UNDECAYED = ("A_log", "dt_bias", "D", "L", "bias", "norm.weight")  # of any module


@MODELS
def test_stock_trainer_decays_matrices_alone_also_of_a_copy(make_model, tmp_path, options: dict) -> None:
    model = deepcopy(make_model(torch.float32, **options))
    named = dict(model.named_parameters())
    decayed = {name for name in named if not name.endswith(UNDECAYED)}
    assert all(named[name].ndim == 2 for name in decayed)
    trainer = Trainer(model, TrainingArguments(tmp_path, weight_decay=0.1, use_cpu=True, report_to=[]))
    groups = trainer.create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    names = {id(parameter): name for name, parameter in named.items()}
    assert {names[id(parameter)] for parameter in groups[0]["params"]} == decayed
    assert {names[id(parameter)] for parameter in groups[1]["params"]} == named.keys() - decayed


@MODELS
def test_a_parameter_belongs_to_a_leaf_module_of_one_dtype(make_model, tmp_path, options: dict) -> None:
    """FSDP shards parameters of one dtype together; offloading fetches those of the module that is called."""
    make_model(torch.float32, **options).save_pretrained(tmp_path)
    model = LogLinearForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wide = {name.split(".")[-2] for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    assert model._keep_in_fp32_modules_strict == wide  # nothing that this model does not have
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        assert not own or not list(module.children()), name
        assert {p.dtype for p in own} <= {torch.float32 if isinstance(module, HeadBias) else torch.bfloat16}, name


@MODELS
def test_former_names_give_the_same_model(make_model, tmp_path, options: dict) -> None:
    model = make_model(torch.float32, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    former = {_former(name): value for name, value in weights.items()}
    assert {current_name(name) for name in former} == weights.keys()
    save_file(former, file, {"format": "pt"})

    loaded, missing = LogLinearForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(missing.values()), missing
    plain = make_model(torch.float32, **options)
    plain.load_state_dict(former)
    expected = model(tokens(2, 9)).logits
    for other in (loaded.eval(), plain, deepcopy(plain)):
        assert torch.equal(other(tokens(2, 9)).logits, expected)
    loaded.save_pretrained(tmp_path)
    assert load_file(file).keys() == weights.keys()


def _former(name: str) -> str:
    layer, _, own = name.rpartition("mixer.")
    names = {now: former for former, now in FORMER_NAMES.items()}
    return f"{layer}mixer.{names[own]}" if own in names else name


def test_former_names_are_those_of_every_mixer() -> None:
    former = set()
    for options in ({}, {"lambda_form": "unit"}):
        for name, _ in LogLinearForCausalLM(tiny_config(**options)).named_parameters():
            former.add(_former(name).rpartition("mixer.")[2])
    assert former >= FORMER_NAMES.keys()


@MODELS
@pytest.mark.parametrize("real", [0, 1], ids=["padding", "one_token"])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_every_parameter_takes_part_where_nothing_is_to_learn(make_model, options: dict, real: int, impl: str) -> None:
    """Other processes wait for its gradient, which is zero to the last bit."""
    model = make_model(torch.float32, impl=impl, **options).train()
    ids, mask = tokens(2, 5), torch.zeros(2, 5, dtype=torch.long)
    mask[1, 2 : 2 + real] = 1
    for inputs in ({}, {"num_items_in_batch": 7}):
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), **inputs).loss
        loss.backward()
        assert loss.item() == 0
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and not parameter.grad.any(), name


@MODELS
def test_every_parameter_takes_part_in_one_token(make_model, options: dict) -> None:
    """Without padding, and where something is to learn: also what one token cannot read, such as its decay."""
    model = make_model(torch.float32, **options).train()
    model(tokens(2, 1)).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_start_with_a_deviation_of_their_own_and_loading_keeps_them(tmp_path, tied: bool) -> None:
    torch.manual_seed(0)
    sizes = dict(vocab_size=2000, initializer_range=0.02, tie_word_embeddings=tied)
    model = LogLinearForCausalLM(tiny_config(**{**TRANSFORMER, **sizes}, embedding_range=0.3))
    embeddings, head = model.model.embed_tokens.weight, model.lm_head.weight
    assert embeddings.std().item() == pytest.approx(0.3, rel=0.03)
    assert head.std().item() == pytest.approx(0.3 if tied else 0.02, rel=0.03)
    assert model.model.layers[0].mixer.qkv_proj.weight.std().item() == pytest.approx(0.02, rel=0.2)
    same = LogLinearForCausalLM(tiny_config(**{**TRANSFORMER, **sizes})).model.embed_tokens.weight
    assert same.std().item() == pytest.approx(0.02, rel=0.03)
    model.save_pretrained(tmp_path)
    loaded = LogLinearForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.model.embed_tokens.weight, embeddings, rtol=0, atol=0)
    with pytest.raises(ValueError, match="embedding_range must be positive and finite, got 0"):
        tiny_config(embedding_range=0)
