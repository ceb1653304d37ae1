"""`toolkit resume`."""

from typing import Annotated

import typer

from toolkit.cli.arguments import Overrides, is_rank_0, run_named, split_words


def resume(
    context: typer.Context,
    run_dir: Annotated[
        str,
        typer.Argument(
            metavar="RUN_DIR",
            help="A run: its folder or name (see `toolkit runs`), or its newest step{N} folder.",
        ),
    ],
    overrides: Overrides = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Show what would be restored, changed and refused (exit code 2); do nothing.",
        ),
    ] = False,
) -> int:
    """Continue a run from its newest valid checkpoint, as if nothing had happened.

    Without a launcher the run is launched again as it was: same engine, same number of processes.
    Under a launcher it takes what the launcher gives.

    \b
    Examples:
      toolkit resume runs/quickstart/first
      toolkit resume runs/quickstart/first --trainer.max_duration='{value: 800, unit: steps}'
      toolkit resume --explain runs/quickstart/first --train_module.optim.lr=1e-3
      accelerate launch --config_file accelerate_configs/fsdp.yaml --num_processes 2 \\
          toolkit resume runs/quickstart/first
    """
    from pathlib import Path

    folder, paths = split_words(run_dir, overrides, "RUN_DIR")
    folder = run_named(folder)
    if explain:
        import os

        from toolkit.commands.explain import explain_resume
        from toolkit.distributed.ranks import check_launcher_variables
        from toolkit.errors import EXIT_BAD_INPUT, EXIT_DONE

        check_launcher_variables()
        explanation = explain_resume(Path(folder), paths, os.environ)
        if is_rank_0():
            typer.echo(str(explanation))
        return EXIT_BAD_INPUT if explanation.refused else EXIT_DONE
    from toolkit.experiment.run import resume as resume_run

    return resume_run(Path(folder), paths, debug=bool(context.obj))
