"""`toolkit doctor`: whether this machine can train."""

import typer

from toolkit import commands
from toolkit.cli.options import Json
from toolkit.cli.printing import print_json


def doctor(json: Json = False) -> int:
    """Look whether this machine can train: devices, libraries, disks, limits, extras.

    Trains a layer of 64 channels for one step; writes nothing that stays. Exit code 1 where
    training would not work.

    \b
    Examples:
      toolkit doctor
      toolkit doctor --json
    """
    found = commands.doctor.examine()
    if json:
        print_json(commands.doctor.as_records(found))
    else:
        typer.echo(commands.doctor.describe(found))
    return commands.doctor.exit_code(found)
