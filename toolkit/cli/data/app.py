"""The verbs of `toolkit data`."""

import typer

app = typer.Typer(no_args_is_help=True, help="Look at data, and make token files by hand.")
