"""Recipes: complete configs that come with the package (`toolkit/recipes/*.json`)."""

from importlib import resources
from importlib.resources.abc import Traversable

from toolkit.config import nearest
from toolkit.errors import ConfigError


def recipe_names() -> list[str]:
    """Names of all recipes, sorted."""
    names = (entry.name for entry in _folder().iterdir())
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def recipe_text(name: str) -> str:
    """The JSON text of a recipe, as it stands in the package.

    Raises:
        ConfigError: there is none of that name; names the nearest.
    """
    if name not in recipe_names():
        raise ConfigError(f"{name}: no such recipe; {recipe_hint(name)}")
    return (_folder() / f"{name}.json").read_text(encoding="utf-8")


def recipe_hint(name: str) -> str:
    """What to suggest to someone who asked for the unknown recipe `name`."""
    near = nearest(name, recipe_names())
    return f"did you mean {near!r}?" if near else "recipes: " + ", ".join(recipe_names())


def _folder() -> Traversable:
    return resources.files("toolkit") / "recipes"
