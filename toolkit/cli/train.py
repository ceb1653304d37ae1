"""`toolkit train`."""

from typing import Annotated

import typer

from toolkit.cli.arguments import (
    Base,
    Config,
    DataRoot,
    Overrides,
    SequenceLength,
    WorkDir,
    is_rank_0,
    split_words,
)


def train(
    config: Config,
    overrides: Overrides = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the run (run.name).", show_default="the time")
    ] = None,
    sequence_length: SequenceLength = None,
    data_root: DataRoot = None,
    save_folder: Annotated[
        str | None,
        typer.Option(
            help="The run folder itself (run.save_folder); a run in it is resumed.",
            show_default="runs/EXPERIMENT/NAME",
        ),
    ] = None,
    work_dir: WorkDir = None,
    base: Base = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show the resolved config and what follows; do nothing."),
    ] = False,
    json: Annotated[
        bool,
        typer.Option("--json", help="With --dry-run: only the config, as a file `train` reads."),
    ] = False,
) -> int:
    """Train a model from a recipe or a JSON config.

    Any config value can be given by its path: --train_module.optim.lr=6e-3, with JSON or YAML
    values. `toolkit schema` describes all of them. The launcher decides the engine: one process,
    `accelerate launch --config_file accelerate_configs/X.yaml`, or `torchrun` with
    --train_module.dp_config.

    \b
    Examples:
      toolkit train quickstart --name first --trainer.hard_stop='{value: 20, unit: steps}'
      toolkit train finetune_lora --base models/smollm --name first
      toolkit train my.json --sequence-length 512 --train_module.optim.lr=6e-3 --dry-run
      accelerate launch --config_file accelerate_configs/zero3.yaml --num_processes 2 \\
          toolkit train quickstart --save-folder runs/quickstart/zero3
    """
    import os
    import re
    import shlex

    from toolkit.distributed.ranks import check_launcher_variables
    from toolkit.errors import ConfigError
    from toolkit.experiment.load import load_experiment

    source, paths = split_words(config, overrides, "CONFIG")
    if paths and re.fullmatch(r"[\w.][\w.-]*", paths[0]):
        command = f"toolkit train {source} --name {shlex.join(paths)}"
        raise ConfigError(
            f"unexpected argument {paths[0]!r}; if it is the run's name, type: {command}"
        )
    shorthands = {
        "name": name,
        "sequence_length": sequence_length,
        "data_root": data_root,
        "save_folder": save_folder,
        "work_dir": work_dir,
    }
    if json and not dry_run:
        raise ConfigError("--json belongs to --dry-run; give both to print the resolved config")
    check_launcher_variables()
    loaded = load_experiment(source, paths, shorthands, base=base, starts=True)
    if dry_run:
        from toolkit.commands.dry_run import summarize

        summary = summarize(loaded, os.environ)
        if is_rank_0():
            typer.echo(loaded.stored.to_json() if json else summary)
        return 0
    from toolkit.experiment.run import train as run_training

    return run_training(loaded.config, origins=loaded.origins, stored=loaded.stored)
