"""Train a small log-linear model on a folder of text, then continue a prompt with it.

python examples/train_and_generate.py FOLDER_OF_TEXT OUTPUT_FOLDER
"""

from pathlib import Path

import typer

from loglinear.cli import execute
from loglinear.evaluation import sample
from loglinear.recipes import get_recipe
from loglinear.training import load_model, load_tokenizer, train

app = typer.Typer(add_completion=False)


@app.command()
def main(data: str, out: Path) -> None:
    """Train on the text in DATA, keep the run in the folder OUT, and print a sample of the model."""
    recipe = get_recipe("demo").override(data=(data,), steps=100, num_levels=10)
    train(recipe, out)
    result = sample(
        load_model(out),
        load_tokenizer("bytes"),
        "The ",
        max_new_tokens=200,
        temperature=0.8,
        seed=1,
    )
    print(result.text)
    print(f"{result.tokens / result.seconds:.0f} tokens/s, {result.state_bytes:,} bytes of state")


if __name__ == "__main__":
    execute(app, "python examples/train_and_generate.py")
