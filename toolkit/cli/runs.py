"""`toolkit runs`: runs as a list, on a page, side by side; and what is said about them."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from toolkit import commands
from toolkit.cli import runs_folders
from toolkit.cli.options import Json, Registry, Root, Run, argument, option
from toolkit.cli.printing import cell, print_json, print_table
from toolkit.errors import EXIT_DONE, EXIT_FAILED, ConfigError
from toolkit.wording import compact, span, visible

if TYPE_CHECKING:
    from toolkit.commands.runs.compare import Comparison, Difference
    from toolkit.runs.status import RunRecord

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
for _verb in (
    runs_folders.rm,
    runs_folders.move,
    runs_folders.archive,
    runs_folders.restore,
    runs_folders.reindex,
    runs_folders.send,
    runs_folders.push,
):
    app.command()(_verb)

State = Annotated[
    list[str] | None,
    option("Only of this state: running, finished, stopped, failed, dead.", metavar="STATE"),
]
Tag = Annotated[list[str] | None, option("Only with this tag.", metavar="TAG")]
Name = Annotated[str | None, option("Only of names like this: 'sweep-*'.", metavar="GLOB")]
Since = Annotated[str | None, option("Only started in the last 12h, 2d, 1w.", metavar="TIME")]
Where = Annotated[
    list[str] | None,
    option("Only where the config has this: optim.lr=1e-3.", metavar="PATH=VALUE"),
]
Sort = Annotated[
    str | None,
    option(
        "name, state, step, tokens, loss, val-loss, best, speed, duration, age or updated; "
        "smallest first.",
        shown="the oldest first",
        metavar="COLUMN",
    ),
]
Reverse = Annotated[bool, option("The other way round.", "--reverse")]
Limit = Annotated[
    int | None, option("The first N; without --sort, the newest.", metavar="N", shown="all")
]
Check = Annotated[
    bool, option("Read every run folder; the registry may lag by a minute.", "--check")
]
Tolerance = Annotated[
    float,
    option("Losses whose relative difference is larger have parted.", metavar="X"),
]
Everything = Annotated[bool, option("Names and places of the runs too.", "--all")]


@app.callback()
def runs(
    context: typer.Context,
    root: Root = "runs",
    registry: Registry = None,
    state: State = None,
    tag: Tag = None,
    name: Name = None,
    since: Since = None,
    where: Where = None,
    sort: Sort = None,
    reverse: Reverse = False,
    limit: Limit = None,
    check: Check = False,
    json: Json = False,
) -> None:
    """List runs, compare them, and keep them in order.

    A run is named by its name, experiment/name, its id or the first digits of it, or its folder.

    \b
    Examples:
      toolkit runs
      toolkit runs --sort val-loss --limit 10
      toolkit runs compare first second
      toolkit runs reindex
    """
    if context.invoked_subcommand is None:
        list_(root, registry, state, tag, name, since, where, sort, reverse, limit, check, json)
        return
    for option_, value in context.params.items():
        if value not in (None, False, [], ()) and not (option_ == "root" and value == "runs"):
            verb = context.invoked_subcommand
            flag = f"--{option_}"
            raise ConfigError(f"{flag} goes after the verb: toolkit runs {verb} {flag} ...")


@app.command("list")
def list_(
    root: Root = "runs",
    registry: Registry = None,
    state: State = None,
    tag: Tag = None,
    name: Name = None,
    since: Since = None,
    where: Where = None,
    sort: Sort = None,
    reverse: Reverse = False,
    limit: Limit = None,
    check: Check = False,
    json: Json = False,
) -> None:
    """A table of runs: how far they came, their losses, speed and age.

    `dead` is a run whose process vanished; `missing` one whose folder did.

    \b
    Examples:
      toolkit runs list
      toolkit runs list --state finished --sort best --limit 5
      toolkit runs list --tag baseline --since 7d --where optim.lr=1e-3
      toolkit runs list --root s3://bucket/runs --json
    """
    wanted = commands.runs.listing.Wanted(
        state or (), tag or (), name, since, where or (), sort, reverse, limit
    )
    records = commands.runs.listing.list_all(root, registry, wanted, check=check)
    if json:
        print_json([commands.runs.listing.as_json(record) for record in records])
        return
    if not records:
        is_narrow = any((state, tag, name, since, where))
        more = "" if is_narrow else "; start one with `toolkit train quickstart`"
        typer.echo(f"no {'such ' if is_narrow else ''}runs in {root}{more}")
        return
    header = [
        "run", "id", "state", "step", "tokens", "loss", "val loss", "best", "tok/s", "duration",
        "age", "tags", "folder",
    ]  # fmt: skip
    rows = [_row(record) for record in records]
    if not any(record.tags for record in records):
        header.remove("tags")
        rows = [[*row[:-2], row[-1]] for row in rows]
    print_table(header, rows, right=header[3:11])


def _row(record: "RunRecord") -> list[str]:
    created = commands.runs.listing.unix_seconds(record.created)
    return [
        visible(f"{record.experiment}/{record.name}"),
        str(record.id),
        record.state,
        cell(record.step),
        _short(record.tokens),
        cell(record.loss, ".4f"),
        cell(record.val_loss, ".4f"),
        cell(record.best_val_loss, ".4f"),
        _short(record.tokens_per_second),
        "-" if record.seconds is None else span(record.seconds),
        "-" if created is None else span(time.time() - created),
        record.tags or "",
        visible(_place(record)),
    ]


def _short(number: float | None) -> str:
    return "-" if number is None else compact(number)


def _place(record: "RunRecord") -> str:
    """Where a run is; of one that is gone here, where it is to be had."""
    if record.state == "missing" and record.mirror is not None:
        return f"{record.folder}; mirrored at {record.mirror}"
    folder = Path(record.folder)
    here = Path(os.path.abspath("."))
    return str(folder.relative_to(here)) if folder.is_relative_to(here) else record.folder


@app.command()
def show(run: Run, root: Root = "runs", registry: Registry = None, json: Json = False) -> None:
    """One run on a page: progress, losses, data, machine, attempts, checkpoints, curve.

    \b
    Examples:
      toolkit runs show first
      toolkit runs show 3f2a --json
      toolkit runs show s3://bucket/runs/first
    """
    folder = commands.runs.named.run_to_read(run, root, registry)
    if json:
        print_json(commands.runs.show.as_json(folder))
        return
    first, *lines = commands.runs.show.page(folder)
    typer.echo(typer.style(first, bold=True))
    for line in lines:
        typer.echo(line)


@app.command()
def compare(
    runs: Annotated[list[str], argument("Two runs or more.", metavar="RUN...")],
    root: Root = "runs",
    registry: Registry = None,
    tolerance: Tolerance = 1e-3,
    everything: Everything = False,
    json: Json = False,
) -> None:
    """What differs between runs: config, code, data, machine; their curves, and where they part.

    All are set beside the first. Losses part at the first step where they are not the same to the
    last bit; beyond the tolerance they part perhaps later. `toolkit batch` shows what a step
    trained on.

    \b
    Examples:
      toolkit runs compare first second
      toolkit runs compare sweep-lr=1e-3 sweep-lr=3e-3 sweep-lr=1e-2 --tolerance 0.01
    """
    found = _compared(runs, root, registry, tolerance, everything)
    if json:
        print_json(commands.runs.compare.as_json(found))
        return
    names = commands.runs.compare.titles(found.runs)
    letters = commands.runs.curves.LETTERS
    for letter, name, facts in zip(letters, names, found.runs, strict=False):
        record = facts.record
        words = [record.state, f"step {cell(record.step)}", f"loss {cell(record.loss, '.4f')}"]
        words.append(f"val loss {cell(record.val_loss, '.4f')}")
        words.append(f"best {cell(record.best_val_loss, '.4f')}")
        typer.echo(f"{letter}: {visible(name)}  {', '.join(words)}")
    _print_differences(found, letters)
    curves = dict(zip(letters, found.curves.values(), strict=False))
    if any(len(series.step) for series in curves.values()):
        typer.echo(typer.style("\ntraining loss", bold=True))
        for line in commands.runs.curves.overlay(curves):
            typer.echo(line)
        if len(curves) > 1:
            typer.echo("*: curves coincide")
    typer.echo("")
    for letter, parting in zip(letters[1:], found.partings, strict=False):
        for line in commands.runs.compare.parting_lines(letter, parting, tolerance):
            typer.echo(visible(line))


@app.command()
def diff(
    one: Annotated[str, argument("A run.", metavar="A")],
    other: Annotated[str, argument("Another run.", metavar="B")],
    root: Root = "runs",
    registry: Registry = None,
    everything: Everything = False,
    json: Json = False,
) -> int:
    """Every value that differs between two runs, exactly: config, code, data, engine, environment.

    Exit code 0: nothing differs. 1: something does.

    \b
    Examples:
      toolkit runs diff first second
      toolkit runs diff first second --all
    """
    found = _compared([one, other], root, registry, 0.0, everything)
    sections = commands.runs.compare.sections(found)
    if json:
        print_json(sections)
    else:
        for title, differences in sections.items():
            for difference in differences:
                where = f"{title}: " if title != "config" else ""
                typer.echo(visible(f"{where}{difference.path}"))
                for sign, run in zip("-+", (0, 1), strict=True):
                    value = commands.runs.compare.shown(difference, run, whole=True)
                    typer.echo(f"  {sign} {visible(value)}")
    return EXIT_FAILED if any(sections.values()) else EXIT_DONE


def _compared(
    runs: list[str], root: str, registry: str | None, tolerance: float, everything: bool
) -> "Comparison":
    folders = [commands.runs.named.run_to_read(run, root, registry) for run in runs]
    return commands.runs.compare.compare(folders, tolerance=tolerance, everything=everything)


def _print_differences(found: "Comparison", letters: str) -> None:
    sections = commands.runs.compare.sections(found)
    equal = [title for title, differences in sections.items() if not differences]
    for title, differences in sections.items():
        if differences:
            typer.echo(typer.style(f"\n{title}", bold=True))
            print_table(
                ["", *letters[: len(found.runs)]],
                [_difference_row(difference) for difference in differences],
            )
    if equal:
        typer.echo(f"\nno difference in {', '.join(equal)}")


def _difference_row(difference: "Difference") -> list[str]:
    values = range(len(difference.values))
    shown = [commands.runs.compare.shown(difference, number) for number in values]
    return [visible(difference.path), *map(visible, shown)]


class _TagCommand(TyperCommand):
    """`-TAG` takes a tag away, whatever letters it has: -h asks for help only where it is alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, ["--help"] if args == ["-h"] else args)


@app.command(
    cls=_TagCommand,
    context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]},
)
def tag(
    run: Run,
    tags: Annotated[list[str], argument("Add +x, remove -y.", metavar="+TAG|-TAG...")],
    root: Root = "runs",
    registry: Registry = None,
) -> None:
    """Add tags to a run, or remove them; also while it trains.

    \b
    Examples:
      toolkit runs tag first +baseline +paper
      toolkit runs tag first -paper
    """
    folder = commands.runs.named.run_to_change(run, root, registry)
    lacking = commands.runs.places.lacking(folder, tags)
    notes = commands.runs.places.tag(folder, tags, root=root, registry_url=registry)
    if lacking:
        typer.echo(visible(f"{folder}: has no tag {', '.join(lacking)}"), err=True)
    typer.echo(f"{folder}: {', '.join(notes.tags) or 'no tags'}")


@app.command()
def note(
    run: Run,
    text: Annotated[str, argument("What to say; '' takes the note away.", metavar="TEXT")],
    root: Root = "runs",
    registry: Registry = None,
) -> None:
    """Say something about a run, for its page and the list as JSON.

    \b
    Examples:
      toolkit runs note first 'the loss jumps at step 1,200: bad shard'
    """
    folder = commands.runs.named.run_to_change(run, root, registry)
    commands.runs.places.note(folder, text, root=root, registry_url=registry)
    typer.echo(f"{folder}: {'noted' if text else 'no note'}")


@app.command()
def watch(
    run: Annotated[
        str | None, argument("A run; default: the one started last that trains.", metavar="RUN")
    ] = None,
    root: Root = "runs",
    registry: Registry = None,
    every: Annotated[float, option("Seconds between looks.", metavar="SECONDS", min=0.1)] = 2.0,
) -> None:
    """Follow a run while it trains: step, losses, speed, time left, curve. Ctrl-C ends the view.

    In a pipe it prints a line for each look. It ends when the run does.

    \b
    Examples:
      toolkit runs watch
      toolkit runs watch first --every 10
    """
    if run is None:
        folder = commands.runs.watch.newest_running(root, registry)
    else:
        folder = commands.runs.named.run_to_change(run, root, registry)
    try:
        _watch(folder, every)
    except KeyboardInterrupt:
        typer.echo("")


def _watch(folder: Path, every: float) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False)
    looks = commands.runs.watch.views(folder, seconds=every, width=min(100, console.width) - 1)
    if not console.is_terminal:
        before = None
        for view in looks:
            if view.line != before:
                typer.echo(view.line)
            before = view.line
        return
    with Live(console=console, auto_refresh=False) as live:
        for view in looks:
            live.update(Text("\n".join(view.lines)), refresh=True)
