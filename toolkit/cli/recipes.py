"""`toolkit recipes`, `models` and `schema`: what comes along, and what configs may hold."""

import json
from typing import Annotated

import typer

from toolkit import commands
from toolkit.cli.options import Json, argument, option
from toolkit.cli.printing import print_json, print_prose, print_table
from toolkit.errors import ConfigError

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
RecipeName = Annotated[
    str, argument("A recipe, or a file of a launcher such as fsdp.yaml.", metavar="NAME")
]


@app.callback()
def recipes(context: typer.Context) -> None:
    """List the configs that come with the toolkit; show or copy one.

    \b
    Examples:
      toolkit recipes
      toolkit recipes list olmo2
      toolkit recipes show official/OLMo-2-0425-1B-stage1
      toolkit recipes copy gpt2_124M my.json
    """
    if context.invoked_subcommand is None:
        list_recipes()


@app.command("list")
def list_recipes(
    text: Annotated[str, argument("Only recipes with this in the name.", metavar="TEXT")] = "",
) -> None:
    """A table of all recipes, or of some.

    \b
    Examples:
      toolkit recipes list
      toolkit recipes list olmo2
      toolkit train quickstart --dry-run
    """
    plain = _plain(text)
    recipes = [own for own in commands.recipes.describe_recipes() if plain in _plain(own.name)]
    if not recipes:
        raise ConfigError(f"no recipe has {text!r} in its name; `toolkit recipes` lists them all")
    print_table(
        ["recipe", "parameters", "sequence", "needs", "what for"],
        [
            [
                recipe.name,
                recipe.config.model.shown_parameters if recipe.has_model else "-",
                str(recipe.config.dataset.sequence_length),
                " and ".join(recipe.needs) or "nothing",
                recipe.config.description,
            ]
            for recipe in recipes
        ],
        right=["parameters", "sequence"],
        ends_in_prose=True,
    )
    typer.echo()
    print_prose(
        f"for `accelerate launch --config_file`, with `toolkit recipes copy NAME`: "
        f"{', '.join(commands.recipes.engine_files())}"
    )


def _plain(name: str) -> str:
    """`olmo2` finds `OLMo-2` too."""
    return name.lower().replace("-", "")


@app.command()
def show(name: RecipeName) -> None:
    """Print a recipe, or a file of a launcher.

    \b
    Examples:
      toolkit recipes show quickstart
      toolkit recipes show llama3_8B > my.json
      toolkit recipes show fsdp.yaml
    """
    typer.echo(commands.recipes.recipe_text(name), nl=False)


@app.command()
def copy(
    name: RecipeName,
    destination: Annotated[
        str | None, argument("File or folder; default: its own name, here.", metavar="DEST")
    ] = None,
) -> None:
    """Copy a recipe, to change it.

    \b
    Examples:
      toolkit recipes copy quickstart
      toolkit recipes copy quickstart configs/mine.json
      toolkit recipes copy fsdp.yaml
    """
    path = commands.recipes.copy_recipe(name, destination or ".")
    then = f"edit it, then `toolkit train {path} --dry-run`"
    if name in commands.recipes.engine_files():
        then = f"`accelerate launch --config_file {path} -m toolkit train CONFIG`"
        if name.endswith(".json"):
            then = f"name it in a YAML of ZeRO: `deepspeed_config_file: {path.resolve()}`"
    typer.echo(f"{path}: {then}")


def schema(
    path: Annotated[
        str | None, argument("A part of the config, as in `trainer.callbacks`.", metavar="PATH")
    ] = None,
    type: Annotated[
        str | None, option("Of a part that has several types, one alone.", metavar="NAME")
    ] = None,
) -> None:
    """Describe a part of the config: its fields, their types and defaults.

    Without PATH, print the JSON Schema of the whole, for editors. The name of a type may also end
    the path.

    \b
    Examples:
      toolkit schema trainer.callbacks
      toolkit schema optim.lr
      toolkit schema train_module.optim.muon
      toolkit schema > schema.json
    """
    if path is None:
        typer.echo(json.dumps(commands.recipes.experiment_schema(), indent=2))
        return
    for position, section in enumerate(commands.schema.describe_path(path, type)):
        if position:
            typer.echo()
        typer.echo(typer.style(section.title, bold=True))
        if section.doc:
            print_prose(section.doc)
        for field in section.fields:
            line = f"{field.name}: {field.type}"
            if field.default is None:
                line += "; required"
            elif field.default:
                line += f"; default {field.default}"
            print_prose(line, indent="  ")
            if field.doc:
                print_prose(field.doc, indent="      ")


def models(json: Json = False) -> None:
    """List the named model sizes, for `--model.preset=NAME`.

    \b
    Examples:
      toolkit models
      toolkit models --json
      toolkit train quickstart --model.preset=llama_271M --dry-run
    """
    presets = commands.presets.describe_presets()
    if json:
        print_json([preset._asdict() for preset in presets])
        return
    print_table(
        ["preset", "parameters", "layers", "width", "heads", "vocabulary", "longest", "source"],
        [
            [
                preset.name,
                f"{preset.parameters:,}",
                str(preset.layers),
                f"{preset.width:,}",
                preset.heads,
                f"{preset.vocabulary:,}",
                f"{preset.longest:,}",
                preset.source,
            ]
            for preset in presets
        ],
        right=["parameters", "layers", "width", "heads", "vocabulary", "longest"],
        ends_in_prose=True,
    )
