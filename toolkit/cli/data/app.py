"""The verbs of `toolkit data`."""

import typer

from toolkit.cli.data import mix, show

_OVERRIDES = {"ignore_unknown_options": True}

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Look at data, and make token files by hand.",
)
app.command(context_settings=_OVERRIDES)(mix.mix)
app.command(context_settings=_OVERRIDES)(show.show)
