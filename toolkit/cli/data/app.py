"""The verbs of `toolkit data`."""

import typer

from toolkit.cli.data import inspect, merge, mix, show, split, tokenize

_OVERRIDES = {"ignore_unknown_options": True}

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Look at data, and make token files by hand.",
)
app.command(context_settings=_OVERRIDES)(mix.mix)
app.command(context_settings=_OVERRIDES)(show.show)
app.command()(inspect.inspect)
app.command()(tokenize.tokenize)
app.command()(merge.merge)
app.command()(split.split)
