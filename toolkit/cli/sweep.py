"""`toolkit sweep`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolkit import commands
from toolkit.cli.options import (
    Base,
    Config,
    DataRoot,
    Engine,
    Json,
    Overrides,
    Processes,
    SequenceLength,
    WorkDir,
    option,
)
from toolkit.cli.printing import cell, print_json, print_table
from toolkit.errors import EXIT_DONE
from toolkit.wording import compact, count, span, visible

if TYPE_CHECKING:
    from toolkit.commands.sweep.running import Outcome


def sweep(
    context: typer.Context,
    config: Config,
    overrides: Overrides = None,
    grid: Annotated[
        list[str] | None,
        option(
            "A value of the config and what it takes; several make a grid.",
            metavar="PATH=VALUE,...",
        ),
    ] = None,
    random: Annotated[
        int | None, option("Only N points, drawn from the grid.", shown="all", metavar="N")
    ] = None,
    draw_seed: Annotated[int, option("Seed of the draw.", metavar="N")] = 0,
    name: Annotated[
        str | None, option("Name of the sweep; runs are NAME-lr=1e-3.", shown="that of CONFIG")
    ] = None,
    jobs: Annotated[int, option("Runs at the same time.", metavar="N", min=1)] = 1,
    retry: Annotated[bool, option("Go on with runs that failed, too.", "--retry")] = False,
    sequence_length: SequenceLength = None,
    data_root: DataRoot = None,
    work_dir: WorkDir = None,
    base: Base = None,
    processes: Processes = None,
    engine: Engine = None,
    dry_run: Annotated[bool, option("Show the runs; do nothing.", "--dry-run")] = False,
    json: Json = False,
) -> int:
    """Train a config at every point of a grid, each as a run of its own, and compare them.

    Paths may be short where no other value ends so: optim.lr is train_module.optim.lr. Every point
    is checked before the first one starts. The same command goes on where a sweep ended: finished
    runs are skipped, interrupted ones resumed. Ctrl-C saves the running ones and stops.

    Exit code 0: all are finished. 1: one has failed. 75: stopped on request.

    \b
    Examples:
      toolkit sweep quickstart --grid optim.lr=1e-3,3e-3,1e-2
      toolkit sweep my.json --grid optim.lr=1e-3,3e-3 --grid seed=0,1 --name lr --jobs 2
      toolkit sweep my.json --grid optim.lr=1e-3,3e-3 --processes 2 --engine fsdp --dry-run
    """
    asked = commands.launching.planned(engine, processes, None, None, None, None, None)
    environ = os.environ if asked is None else asked.environ(os.environ)
    source, flags = commands.load.split_words(config, overrides, "CONFIG")
    axes = commands.sweep.points.axes(grid or [])
    for axis in axes:
        if axis.path != axis.typed:
            typer.echo(f"{axis.typed} is {axis.path}", err=True)
    given = {
        "--base": base,
        "--sequence-length": sequence_length,
        "--data-root": data_root,
        "--work-dir": work_dir,
    }
    points = commands.sweep.points.points(
        source,
        flags,
        commands.sweep.points.choose(axes, random, draw_seed),
        name=name or Path(source).stem,
        environ=environ,
        base=base,
        sequence_length=sequence_length,
        data_root=data_root,
        work_dir=work_dir,
    )
    code = EXIT_DONE
    if not dry_run:
        launch = {"--processes": processes, "--engine": engine}
        options = commands.sweep.running.Options(
            source,
            flags,
            more=_words(given),
            launch=_words(launch),
            processes=processes or 1,
            jobs=jobs,
            retry=retry,
            debug=context.obj.debug,
        )
        code = commands.sweep.running.run_points(points, options, _say)
    found = commands.sweep.running.outcomes(points)
    if json:
        print_json(commands.sweep.running.as_json(found))
    elif dry_run:
        _print_points(found)
    else:
        _print(found)
    return code


def _say(text: str) -> None:
    typer.echo(visible(text), err=True)


def _words(flags: Mapping[str, str | int | None]) -> list[str]:
    return [f"{flag}={value}" for flag, value in flags.items() if value is not None]


def _print_points(found: "list[Outcome]") -> None:
    values = [[f"{path}={text}" for path, text in outcome.values.items()] for outcome in found]
    rows = [
        [visible(outcome.name), outcome.state, visible(" ".join(pairs)), visible(outcome.folder)]
        for outcome, pairs in zip(found, values, strict=True)
    ]
    print_table(["run", "state", "values", "folder"], rows)
    typer.echo(f"{count(len(found), 'run')}; nothing was written")


def _print(found: "list[Outcome]") -> None:
    typer.echo(f"{count(len(found), 'run')}, the least validation loss first")
    header = ["run", "state", "step", "loss", "val loss", "best", "tok/s", "duration", ""]
    rows = [
        [
            visible(outcome.name),
            outcome.state,
            cell(outcome.step),
            cell(outcome.loss, ".4f"),
            cell(outcome.val_loss, ".4f"),
            cell(outcome.best_val_loss, ".4f"),
            "-" if outcome.tokens_per_second is None else compact(outcome.tokens_per_second),
            "-" if outcome.seconds is None else span(outcome.seconds),
            visible(outcome.message or ""),
        ]
        for outcome in found
    ]
    print_table(header, rows, right=header[2:8])
