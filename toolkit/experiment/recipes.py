"""Recipes: complete configs that come with the package (`toolkit/recipes/*.json`)."""

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

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


def copy_recipe(name: str, destination: Path) -> Path:
    """Write a recipe to the file `destination`, or into that folder; returns the file.

    Raises:
        ConfigError: there is no such recipe, the file exists, or it cannot be written.
    """
    text = recipe_text(name)
    path = destination / f"{name}.json" if destination.is_dir() else destination
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path}: exists; give another file name") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    return path


def recipe_hint(name: str) -> str:
    """What to suggest to someone who asked for the unknown recipe `name`."""
    near = nearest(name, recipe_names())
    return f"did you mean {near!r}?" if near else "recipes: " + ", ".join(recipe_names())


def _folder() -> Traversable:
    return resources.files("toolkit") / "recipes"
