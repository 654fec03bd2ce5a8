"""Reinforce a trained model on the tokens where it hesitates: GRPO with DAPO's loss, through TRL.

python examples/grpo.py CHECKPOINT OUTPUT_FOLDER
"""

from pathlib import Path
from random import Random
from typing import Annotated

import torch
import typer
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from loglinear.cli import execute
from loglinear.training import load_model, load_tokenizer, resolve

app = typer.Typer(add_completion=False)
Count = Annotated[int, typer.Option(min=1)]


def right(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """Return the reward of each answer: 1 if it is the true one, letter by letter. The data's columns come by name."""
    return [float(text.strip() == true) for text, true in zip(completions, answer, strict=True)]


@app.command()
def main(model: Path, out: Path, steps: Count = 200, longest: Count = 32) -> None:
    """Reinforce a model on sums, and save it in the new folder OUT. Put your own prompts and reward here."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"OUT must be a new folder, got {out}, which holds files")
    random = Random(0)
    sums = [(random.randint(1, 99), random.randint(1, 99)) for _ in range(10_000)]
    data = Dataset.from_list([{"prompt": f"{a} + {b} = ", "answer": f"{a + b}"} for a, b in sums])
    tokenizer = load_tokenizer(resolve(model))
    tokenizer.add_bos_token = True  # every document of the training began with it
    settings = GRPOConfig(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=64,  # answers of a step, 8 to each of 8 prompts
        num_generations=8,
        max_completion_length=longest,  # an answer that has no end by then is cut off
        top_entropy_quantile=0.2,  # a fifth of the tokens learns; 1.0: all
        loss_type="dapo",
        epsilon_high=0.28,
        learning_rate=1e-4,
        generation_kwargs={"use_cache": True},
        gradient_checkpointing=False,
        bf16=False,  # so that answers are sampled from the probabilities that learn
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
    )
    device = "cpu" if settings.use_cpu else "cuda"
    trainer = GRPOTrainer(load_model(model, device=device), right, settings, data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    execute(app, "python examples/grpo.py")
