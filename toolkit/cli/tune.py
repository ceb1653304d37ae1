"""`toolkit tune`: the fastest settings of a config on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from toolkit import commands
from toolkit.cli.options import Base, Config, Json, Overrides, SequenceLength, option
from toolkit.cli.printing import print_json, print_table


def tune(
    config: Config,
    overrides: Overrides = None,
    steps: Annotated[int, option("Counted steps of each try.", metavar="N")] = 5,
    processes: Annotated[int, option("Processes of each try.", metavar="N")] = 1,
    write: Annotated[
        Path | None, option("Write the config with the best values to this file.", metavar="FILE")
    ] = None,
    sequence_length: SequenceLength = None,
    base: Base = None,
    json: Json = False,
) -> None:
    """Try which settings train a config fastest on this machine, by real steps on random tokens.

    Precision (where it is auto), threads, microbatch size, activation checkpointing, torch.compile
    and loss chunks, one after the other; what runs out of memory is left out. Takes minutes.
    Nothing is written but the file of --write.

    \b
    Examples:
      toolkit tune quickstart
      toolkit tune my.json --processes 8 --write fast.json
      toolkit tune my.json --steps 20 --train_module.precision=bf16 --json
    """
    loaded = commands.load.load(
        config, overrides, base, environ=None, sequence_length=sequence_length
    )
    report = commands.tune.tune(
        loaded,
        steps=steps,
        processes=processes,
        say=lambda line: typer.echo(line, err=True),
        write=write,
    )
    if json:
        print_json(
            {
                "tries": report.attempts,
                "best": report.best,
                "flags": report.flags,
            }
        )
    else:
        rows, conclusion = commands.tune_report.describe(report)
        header = ("try", "tokens/s", "GB", "")
        print_table(header, rows, right=header[1:3])
        typer.echo(f"\n{conclusion}")
    if write is not None:  # what took minutes is told first
        commands.tune_report.write_config(report, write)
        if not json:
            typer.echo(f"written to {write}")
