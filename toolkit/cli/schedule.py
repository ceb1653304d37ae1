"""`toolkit schedule`: the schedules of a config, as a picture."""

from pathlib import Path
from typing import Annotated

import typer

from toolkit import commands
from toolkit.cli.options import Base, Config, Json, Overrides, option
from toolkit.cli.printing import print_json


def schedule(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, option("Write the picture to this PNG file too.", metavar="FILE")
    ] = None,
    base: Base = None,
    json: Json = False,
) -> None:
    """Plot what a config schedules: learning rate, other settings, batch size, row length.

    Nothing is trained. The picture is of the whole run (trainer.max_duration), by the functions
    that training calls. --json gives the points.

    \b
    Examples:
      toolkit schedule quickstart
      toolkit schedule quickstart --train_module.scheduler.type=wsd --out schedule.png
      toolkit schedule my.json --train_module.scheduler.decay_from=800 --json
    """
    plot = commands.schedule.plot_schedule(commands.load.load(config, overrides, base))
    if out is not None:
        plot.write_png(out, config=config)
    if json:
        print_json(plot)
        return
    typer.echo(plot.text())
    if out is not None:
        typer.echo(f"\nwritten to {out}")
