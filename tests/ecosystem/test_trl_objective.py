"""The tokens and the denominator of TRL's objective with `top_entropy_quantile`, on a batch that is computed here too.

# B answers, T tokens of the longest, P tokens of a prompt
"""

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from loglinear.models import ByteTokenizer
from tests.ecosystem.tiny import KINDS, tiny_model

LENGTHS = torch.tensor([12, 3, 7, 12])
SHARE, LOW, HIGH = 0.2, 0.2, 0.28
IN_OTHER_PARTS = 20  # tokens of the answers that other steps of the same generation learn from
MASK_BT = torch.arange(12) < LENGTHS[:, None]


def trainer_of(folder, kind="mamba2", **options):
    settings = GRPOConfig(
        str(folder),
        num_generations=2,
        per_device_train_batch_size=4,
        **{"loss_type": "dapo", "epsilon": LOW, "epsilon_high": HIGH, "top_entropy_quantile": SHARE, **options},
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    data = Dataset.from_list([{"prompt": "text"}] * 4)
    return GRPOTrainer(tiny_model(**KINDS[kind]), lambda **_: [], settings, data, processing_class=ByteTokenizer())


def batch(model):
    """A part of the answers of a generation: random tokens, advantages of both signs, ratios beyond both clips."""
    random = torch.Generator().manual_seed(1)
    prompt, answer = (torch.randint(0, 255, (4, length), generator=random) for length in (5, 12))
    with torch.no_grad():
        logits = model(torch.cat([prompt, answer], 1)).logits[:, 4:-1].double()
    log_probs = logits.log_softmax(-1)
    of_answer_BT = log_probs.gather(-1, answer[..., None])[..., 0]
    old_BT = of_answer_BT + 0.4 * torch.randn(4, 12, generator=random).double()
    tensors = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": answer,
        "completion_mask": MASK_BT.long(),
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5]),
        "old_per_token_logps": old_BT.float(),
        "num_items_in_batch": LENGTHS.sum() + IN_OTHER_PARTS,
    }
    entropy_BT = -(log_probs.exp() * log_probs).sum(-1)
    return tensors, entropy_BT, clipped_gains((of_answer_BT - old_BT).exp(), tensors["advantages"][:, None])


def clipped_gains(ratio_BT, advantage_B1):
    """min(r A, clip(r, 1 - low, 1 + high) A)."""
    return torch.minimum(ratio_BT * advantage_B1, ratio_BT.clamp(1 - LOW, 1 + HIGH) * advantage_B1)


def pooled(entropy_BT, share):
    """The tokens of all answers whose entropy reaches the (1 - share)-quantile of all of them together."""
    return MASK_BT & (entropy_BT >= torch.quantile(entropy_BT[MASK_BT], 1 - share))


@pytest.mark.parametrize("kind", ["mamba2", "transformer"])
def test_the_threshold_is_over_the_part_and_the_denominator_counts_every_token(tmp_path, kind):
    trainer = trainer_of(tmp_path, kind)
    inputs, entropy_BT, gains_BT = batch(trainer.model)
    trainer.current_gradient_accumulation_steps = 1
    kept_BT = pooled(entropy_BT, SHARE)
    kept, learnt = int(kept_BT.sum()), int(MASK_BT.sum())
    assert kept == 7 and learnt == 34  # a fifth, rounded up
    # A generation is used in steps_per_generation parts, of which each counts a mean share of all tokens.
    tokens = int(inputs["num_items_in_batch"]) / trainer.args.steps_per_generation
    expected = -(gains_BT * kept_BT).sum() / tokens
    assert trainer._compute_loss(trainer.model, inputs).item() == pytest.approx(expected.item(), rel=1e-4)
    mean_of_kept = -(gains_BT * kept_BT).sum() / kept
    assert abs(expected) < 0.5 * abs(mean_of_kept)


def test_no_other_threshold_gives_the_same_tokens(tmp_path):
    trainer = trainer_of(tmp_path)
    _, entropy_BT, _ = batch(trainer.model)
    theirs_BT = trainer.get_high_entropy_mask(entropy_BT, MASK_BT, 1 - SHARE)
    assert torch.equal(theirs_BT, pooled(entropy_BT, SHARE))
    of_rows = [row >= torch.quantile(row[mask], 1 - SHARE) for row, mask in zip(entropy_BT, MASK_BT, strict=True)]
    assert not torch.equal(theirs_BT, torch.stack(of_rows) & MASK_BT)
    certain_BT = entropy_BT * torch.tensor([1.0, 1.0, 0.1, 0.1])[:, None]  # half of the answers has few choices
    parts = [trainer.get_high_entropy_mask(certain_BT[rows], MASK_BT[rows], 1 - SHARE) for rows in ([0, 1], [2, 3])]
    whole_BT = trainer.get_high_entropy_mask(certain_BT, MASK_BT, 1 - SHARE)
    assert not whole_BT[2:].any() and parts[1].sum() == 4  # a step has the threshold of its own part


def test_tokens_of_equal_entropy_are_all_kept(tmp_path):
    trainer = trainer_of(tmp_path)
    kept_BT = trainer.get_high_entropy_mask(torch.ones(4, 12), MASK_BT, 1 - SHARE)
    assert torch.equal(kept_BT, MASK_BT)


def test_all_tokens_learn_without_a_quantile(tmp_path):
    trainer = trainer_of(tmp_path, top_entropy_quantile=1.0)
    inputs, _, gains_BT = batch(trainer.model)
    trainer.current_gradient_accumulation_steps = 1
    tokens = int(inputs["num_items_in_batch"]) / trainer.args.steps_per_generation
    expected = -(gains_BT * MASK_BT).sum().item() / tokens
    assert trainer._compute_loss(trainer.model, inputs).item() == pytest.approx(expected, rel=1e-4)
