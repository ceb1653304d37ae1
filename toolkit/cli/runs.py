"""`toolkit runs`: list, reindex."""

from typing import Annotated

import typer

from toolkit.wording import count

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
Root = Annotated[str, typer.Option(help="Folder of all runs (run.root).")]
Registry = Annotated[
    str | None,
    typer.Option(help="SQLAlchemy URL (run.registry).", show_default="ROOT/registry.sqlite"),
]


@app.callback()
def runs(context: typer.Context, root: Root = "runs", registry: Registry = None) -> None:
    """List runs; rebuild their registry.

    \b
    Examples:
      toolkit runs
      toolkit runs list --root /shared/runs
      toolkit runs reindex
    """
    if context.invoked_subcommand is None:
        list_(root, registry)
        return
    for option, is_given in (("--root", root != "runs"), ("--registry", registry is not None)):
        if is_given:
            from toolkit.errors import ConfigError

            verb = context.invoked_subcommand
            raise ConfigError(f"{option} goes after the verb: toolkit runs {verb} {option} ...")


@app.command("list")
def list_(root: Root = "runs", registry: Registry = None) -> None:
    """A table of all runs: state, step, loss, folder.

    \b
    Examples:
      toolkit runs list
      toolkit runs list --root /shared/runs
    """
    from toolkit.cli.table import print_table
    from toolkit.runs.registry import list_runs

    _check_root(root)
    records = list_runs(root, registry_url=registry)
    if not records:
        typer.echo(f"no runs in {root}; start one with `toolkit train quickstart`")
        return
    print_table(
        ["run", "state", "step", "tokens", "loss", "engine", "ranks", "started", "folder"],
        [
            [
                f"{record.experiment}/{record.name}",
                record.state,
                _cell(record.step),
                _cell(record.tokens),
                "-" if record.loss is None else f"{record.loss:.4f}",
                _cell(record.engine),
                _cell(record.world_size),
                record.created[:16].replace("T", " "),
                record.folder,
            ]
            for record in records
        ],
        right=["step", "tokens", "loss", "ranks"],
    )


@app.command()
def reindex(root: Root = "runs", registry: Registry = None) -> None:
    """Rebuild the registry from the run folders, which are the truth.

    \b
    Examples:
      toolkit runs reindex
      toolkit runs reindex --root /shared/runs --registry postgresql://host/toolkit
    """
    from toolkit.runs.registry import reindex as rebuild

    _check_root(root)
    number = rebuild(root, registry_url=registry)
    typer.echo(f"{count(number, 'run')} in the registry of {root}")


def _check_root(root: str) -> None:
    """A folder that was named must be there; without one, there may be no runs yet."""
    from toolkit.config.paths import local_path
    from toolkit.errors import ConfigError

    if root != "runs" and not local_path(root, "--root").is_dir():
        raise ConfigError(f"--root: {root}: no such folder")


def _cell(value: str | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else value
