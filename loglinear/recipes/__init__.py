"""Named training runs. A recipe is a function that returns a `TrainingRecipe`; `RECIPES` lists them all."""

from collections.abc import Callable
from difflib import get_close_matches

from loglinear.recipes.bytes import demo, small
from loglinear.recipes.paper import paper_gated_delta_net, paper_mamba2, paper_transformer
from loglinear.recipes.recipe import TrainingRecipe

RECIPES: dict[str, Callable[[], TrainingRecipe]] = {
    function.__name__: function for function in (demo, small, paper_mamba2, paper_gated_delta_net, paper_transformer)
}


def get_recipe(name: str) -> TrainingRecipe:
    """Return the recipe called `name`. Raises ValueError, with the nearest name, if there is none."""
    if name not in RECIPES:
        nearest = get_close_matches(name, RECIPES, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown recipe {name!r}: did you mean {nearest!r}? There are {', '.join(RECIPES)}")
    return RECIPES[name]()


__all__ = ["RECIPES", "TrainingRecipe", "get_recipe"]
