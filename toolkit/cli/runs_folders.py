"""Verbs of `toolkit runs` that change folders, the registry, or what is elsewhere."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from toolkit import commands
from toolkit.cli.options import Registry, Root, Run, argument, option
from toolkit.errors import EXIT_DONE, EXIT_FAILED, ConfigError
from toolkit.wording import count, prefixed, visible

if TYPE_CHECKING:
    from toolkit.commands.runs.archive import Archived


def rm(
    runs: Annotated[list[str], argument("Runs to remove.", metavar="RUN...")],
    root: Root = "runs",
    registry: Registry = None,
    yes: Annotated[bool, option("Do not ask.", "--yes", "-y")] = False,
) -> None:
    """Remove runs, their checkpoints and all; asks first. A run that is training is refused.

    \b
    Examples:
      toolkit runs rm first
      toolkit runs rm sweep-lr=1e-2 sweep-lr=3e-2 --yes
    """
    named = commands.runs.named.run_to_change
    folders = list(dict.fromkeys(named(run, root, registry) for run in runs))
    for folder in folders:
        commands.runs.places.check_free(folder, doing="removed")
    if not yes:
        for folder in folders:
            size = prefixed(commands.runs.places.bytes_of(folder), "B")
            mirror = commands.runs.places.mirror_of(folder)
            more = f" (what is at {mirror} stays)" if mirror is not None else ""
            typer.echo(visible(f"{folder}: {size}{more}"))
        if not sys.stdin.isatty():
            raise ConfigError("nobody can be asked here; give --yes to remove without asking")
        typer.confirm(f"Remove {count(len(folders), 'run')} for good?", abort=True)
    for folder in folders:
        commands.runs.places.remove(folder, root=root, registry_url=registry)
        typer.echo(visible(f"{folder}: removed"))


def move(
    run: Run,
    dest: Annotated[str, argument("Its new folder, or the folder to put it in.", metavar="DEST")],
    root: Root = "runs",
    registry: Registry = None,
) -> None:
    """Move a run, or rename it; to another disk it is copied, compared, and then removed here.

    A run that is training is refused. The run's name follows its folder's.

    \b
    Examples:
      toolkit runs move first runs/quickstart/baseline
      toolkit runs move first /archive/
    """
    folder = commands.runs.named.run_to_change(run, root, registry)
    target = commands.runs.places.move(folder, dest, root=root, registry_url=registry)
    typer.echo(visible(f"{folder}: moved to {target}"))


def archive(
    run: Run,
    out: Annotated[str, argument("The file: .tar, .tar.gz, .tgz or .tar.zst.", metavar="OUT")],
    root: Root = "runs",
    registry: Registry = None,
    without_checkpoints: Annotated[
        bool, option("Leave out checkpoints, merged weights and exports.", "--without-checkpoints")
    ] = False,
    last: Annotated[bool, option("Of the checkpoints, only the newest.", "--last")] = False,
) -> None:
    """Write a run to one file, which is read back and compared; the run stays.

    \b
    Examples:
      toolkit runs archive first first.tar.zst
      toolkit runs archive first first.tar.zst --last
      toolkit runs archive first metrics.tar.gz --without-checkpoints
    """
    if without_checkpoints and last:
        raise ConfigError("--last keeps a checkpoint, and --without-checkpoints none; give one")
    kept = commands.runs.archive.kept(without=without_checkpoints, last=last)
    folder = commands.runs.named.run_to_change(run, root, registry)
    _say(commands.runs.archive.archive(folder, out, checkpoints=kept))


def restore(
    archive: Annotated[str, argument("A file of `toolkit runs archive`.", metavar="ARCHIVE")],
    dest: Annotated[
        str | None,
        argument("The run folder; default: ROOT/EXPERIMENT/NAME.", metavar="DEST"),
    ] = None,
    root: Root = "runs",
) -> None:
    """Unpack an archived run; every file is compared with the archive's list.

    \b
    Examples:
      toolkit runs restore first.tar.zst
      toolkit runs restore first.tar.zst /scratch/first
    """
    _say(commands.runs.archive.restore(archive, dest, root=root))


def _say(done: "Archived") -> None:
    out = f"; left out: {', '.join(done.left_out)}" if done.left_out else ""
    text = f"{done.place}: {count(done.files, 'file')}, {prefixed(done.bytes, 'B')}, compared{out}"
    typer.echo(visible(text))


def reindex(root: Root = "runs", registry: Registry = None) -> None:
    """Rebuild the registry from the run folders, which are the truth.

    \b
    Examples:
      toolkit runs reindex
      toolkit runs reindex --root /shared/runs --registry postgresql://host/toolkit
    """
    number = commands.runs.listing.reindex(root, registry)
    typer.echo(f"{count(number, 'run')} in the registry of {root}")


def send(
    run_dir: Annotated[str, argument("A run.", metavar="RUN_DIR")],
    tracker: Annotated[
        str | None,
        option("Only this one, also where the run's config does not enable it.", metavar="NAME"),
    ] = None,
) -> int:
    """Send what trackers (wandb, mlflow, ...) lack of a run that is not training.

    Settings are those of the run's config. Exit code 0: all is sent. 1: it is not.

    \b
    Examples:
      toolkit runs send runs/quickstart/first
      toolkit runs send runs/quickstart/first --tracker wandb
    """
    is_sent = commands.runs.trackers.send(run_dir, tracker, lambda t: typer.echo(t, err=True))
    return EXIT_DONE if is_sent else EXIT_FAILED


def push(run_dir: Annotated[str, argument("A run.", metavar="RUN_DIR")]) -> None:
    """Bring what the URL of a run (run.mirror) lacks there, of a run that is not training.

    \b
    Examples:
      toolkit runs push ~/.cache/toolkit/runs/bucket-first-1a2b3c4d
    """
    url = commands.runs.trackers.push_run(run_dir, lambda text: typer.echo(text, err=True))
    typer.echo(f"{url}: is up to date")
