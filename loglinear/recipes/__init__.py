"""Named training runs. A recipe is a function that returns a `TrainingRecipe`; `RECIPES` lists them all."""

from collections.abc import Callable

from loglinear.recipes.bytes import demo, small
from loglinear.recipes.paper import paper_gated_delta_net, paper_mamba2, paper_transformer
from loglinear.recipes.recipe import TrainingRecipe
from loglinear.registry import pick

RECIPES: dict[str, Callable[[], TrainingRecipe]] = {
    function.__name__: function for function in (demo, small, paper_mamba2, paper_gated_delta_net, paper_transformer)
}


def get_recipe(name: str) -> TrainingRecipe:
    """Return the recipe called `name`. Raises ValueError, with the nearest name, if there is none."""
    return pick("recipe", RECIPES, name)()


__all__ = ["RECIPES", "TrainingRecipe", "get_recipe"]
