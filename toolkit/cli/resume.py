"""`toolkit resume`."""

from typing import Annotated

import typer

from toolkit.cli.arguments import Overrides, split_words


def resume(
    context: typer.Context,
    run_dir: Annotated[
        str, typer.Argument(metavar="RUN_DIR", help="A run folder (see `toolkit runs`).")
    ],
    overrides: Overrides = None,
) -> int:
    """Continue a run from its newest valid checkpoint, as if nothing had happened.

    Without a launcher the run is launched again as it was: same engine, same number of processes.
    Under a launcher it takes what the launcher gives.

    \b
    Examples:
      toolkit resume runs/quickstart/first
      toolkit resume runs/quickstart/first --trainer.max_duration='{value: 800, unit: steps}'
      accelerate launch --config_file accelerate_configs/fsdp.yaml --num_processes 2 \\
          toolkit resume runs/quickstart/first
    """
    from pathlib import Path

    from toolkit.experiment.run import resume as resume_run

    folder, paths = split_words(run_dir, overrides, "RUN_DIR")
    return resume_run(Path(folder), paths, debug=bool(context.obj))
