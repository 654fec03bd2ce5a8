"""Padding and packed documents of upgraded models: every sequence gives what it gives alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DataCollatorWithFlattening, DynamicCache

from loglinear.parallel import Slices
from tests.upgrades.tiny import LANGUAGE_MODELS, MODELS, close, original, tokens, trained, upgraded, wide

FAMILIES = pytest.mark.parametrize("family", MODELS)
THAT_PACK = pytest.mark.parametrize("family", LANGUAGE_MODELS)
LENGTHS = (23, 1, 16, 9)


@pytest.fixture(autouse=True)
def _float64():
    with wide(), torch.no_grad():
        yield


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, mask and positions [4, 23] of rows of the four lengths, whose padding is at one side."""
    ids, columns = tokens(4, 23), torch.arange(23)
    lengths = torch.tensor(LENGTHS)[:, None]
    mask = columns < lengths if side == "right" else columns >= 23 - lengths
    return ids.masked_fill(~mask, 0), mask.long(), (mask.cumsum(1) - 1).clamp(min=0)


@FAMILIES
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_rows_alone(family, side):
    model, (ids, mask, positions) = trained(original(family)), padded(side)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    for row in range(4):
        real = mask[row] == 1
        assert close(logits[row, real], model(ids[row, real][None]).logits[0])


@FAMILIES
def test_one_padded_row_is_no_packed_row(family):
    """Its positions repeat at the padding."""
    model, (ids, mask, _) = trained(original(family)), padded("left")
    greedy = dict(max_new_tokens=3, min_new_tokens=3, do_sample=False)
    row, alone = ids[2:3], ids[2:3, 7:]
    right = model.generate(alone, attention_mask=torch.ones_like(alone), **greedy)[:, -3:]
    for use_cache in (True, False):
        text = model.generate(row, attention_mask=mask[2:3], use_cache=use_cache, **greedy)
        assert torch.equal(text[:, -3:], right)


@pytest.mark.parametrize("rows", [1, 2])
def test_positions_of_images_repeat(rows):
    """Time, height and width of Qwen3.5: an image's tokens have one time, and are no packed documents."""
    theirs, ids = original("qwen3_5"), tokens(rows, 20)
    time = torch.tensor([*range(5), *[5] * 8, *range(9, 16)]).expand(1, rows, 20)
    positions = torch.cat([time, torch.arange(20).expand(2, rows, 20)])
    for kinds in (positions, torch.cat([torch.arange(20).expand(1, rows, 20), positions])):
        assert close(upgraded(theirs)(ids, position_ids=kinds).logits, theirs(ids, position_ids=kinds).logits)


@FAMILIES
def test_left_padded_prompts_continue_as_prompts_alone(family):
    model, (ids, mask, _) = trained(original(family)), padded("left")
    greedy = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False)
    texts = model.generate(ids, attention_mask=mask, **greedy)[:, 23:]
    for row in range(4):
        alone = ids[row, mask[row] == 1][None]
        assert torch.equal(model.generate(alone, attention_mask=torch.ones_like(alone), **greedy)[0, -12:], texts[row])


@THAT_PACK
@pytest.mark.parametrize(
    "extra",
    [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}],
    ids=["position_ids", "cu_seq_lens", "seq_idx"],
)
def test_packed_documents_equal_documents_alone(family, extra):
    model, ids = trained(original(family)), tokens(4, 23)
    documents = [row[:length] for row, length in zip(ids, LENGTHS, strict=True)]
    batch = DataCollatorWithFlattening(return_position_ids=True, return_tensors="pt", **extra)(
        [{"input_ids": document.tolist()} for document in documents]
    )
    batch.pop("labels")
    logits = model(**batch).logits[0].split(LENGTHS)
    for document, part in zip(documents, logits, strict=True):
        assert close(part, model(document[None]).logits[0])


@pytest.mark.parametrize("family", ["qwen3_5", "mamba2"])
def test_packed_documents_stay_apart_under_peft(family):
    """The hooks of the model work inside the wrapper."""
    base, ids = trained(original(family)), tokens(1, 20)
    right = base(ids, cu_seq_lens_q=torch.tensor([0, 13, 20])).logits
    projection = {"qwen3_5": "in_proj_qkv", "mamba2": "in_proj"}[family]
    model = get_peft_model(
        base, LoraConfig(target_modules=[projection], task_type="CAUSAL_LM")
    )  # at the start it changes nothing
    assert close(model(ids, cu_seq_lens_q=torch.tensor([0, 13, 20])).logits, right)
    assert not close(right, model(ids).logits)


def test_boundaries_alone_also_restart_the_positions():
    model, ids = trained(original("qwen3_5")), tokens(1, 20)
    logits = model(ids, cu_seq_lens_q=torch.tensor([0, 13, 20])).logits[0]
    for part, document in zip(logits.split([13, 7]), ids[0].split([13, 7]), strict=True):
        assert close(part, model(document[None]).logits[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.ones(2, 1, 8, 8)}, "says nothing to linear layers: pass it as"),
        ({"attention_mask": torch.ones(2, 5)}, "attention_mask must have shape [2, 8]"),
        ({"attention_mask": torch.full((2, 8), 3)}, "attention_mask must hold 1 at tokens and 0 at padding"),
        ({"position_ids": torch.arange(8).remainder(4).expand(2, 8)}, "position_ids restart inside a row"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 8])}, "needs a batch of 1, got a batch of 2"),
    ],
)
def test_contradictions_are_refused(arguments, message):
    model = upgraded(original("qwen3_5"))
    with pytest.raises(ValueError) as caught:
        model(tokens(2, 8), **arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("named", [{"cu_seq_lens_q": [0, 3, 8]}, {"position_ids": [[0, 1, 2, 0, 1, 2, 3, 4]]}])
def test_documents_that_attention_would_mix_are_refused(named):
    """The sparse attention of GLM-5-next knows padding alone, and reads one document from another."""
    model = upgraded(original("glm5_next"))
    message = "Glm5NextTextModel has attention that reads across packed documents: pass them as rows of a padded batch"
    with pytest.raises(ValueError, match=message):
        model(tokens(1, 8), **{name: torch.tensor(value) for name, value in named.items()})


def test_packed_documents_take_no_cache():
    model = upgraded(original("qwen3_5"))
    for arguments in ({"use_cache": True}, {"past_key_values": DynamicCache(config=model.config)}):
        with pytest.raises(ValueError, match="past_key_values cannot continue packed documents"):
            model(tokens(1, 8), cu_seq_lens_q=torch.tensor([0, 3, 8]), **arguments)


def test_flash_attention_of_a_granite_needs_the_boundaries_by_name():
    """It takes no mask, and this model hands it no positions."""
    model = upgraded(original("granitemoehybrid"))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k must be given"):
        model(tokens(1, 8), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]))


@FAMILIES
def test_slices_of_a_row_on_several_devices_are_refused(family):
    """transformers' models ignore what they do not know, and would read each slice as a whole row."""
    model = upgraded(original(family))
    for called in (model, model.base_model):
        with pytest.raises(ValueError, match="slices need a LogLinearForCausalLM or LogLinearModel, got an upgraded"):
            called(tokens(1, 8), slices=Slices.plan(16, 2, chunk_size=4))
