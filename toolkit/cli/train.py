"""`toolkit train`, `toolkit resume`, `toolkit prepare`."""

import os
from typing import Annotated

import typer

from toolkit import commands
from toolkit.cli.options import (
    Base,
    Config,
    DataRoot,
    Overrides,
    SequenceLength,
    WorkDir,
    argument,
    option,
)
from toolkit.cli.printing import prepared_text
from toolkit.errors import EXIT_BAD_INPUT, EXIT_DONE, ConfigError


def train(
    config: Config,
    overrides: Overrides = None,
    name: Annotated[str | None, option("Name of the run (run.name).", shown="the time")] = None,
    sequence_length: SequenceLength = None,
    data_root: DataRoot = None,
    save_folder: Annotated[
        str | None,
        option(
            "The run folder itself (run.save_folder), or a URL; a run in it is resumed.",
            shown="runs/EXPERIMENT/NAME",
        ),
    ] = None,
    work_dir: WorkDir = None,
    base: Base = None,
    dry_run: Annotated[
        bool, option("Show the resolved config and what follows; do nothing.", "--dry-run")
    ] = False,
    json: Annotated[
        bool, option("With --dry-run: only the config, as a file `train` reads.", "--json")
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
    if json and not dry_run:
        raise ConfigError("--json belongs to --dry-run; give both to print the resolved config")
    loaded = commands.load.load(
        *(config, overrides, base), starts=True, name=name, sequence_length=sequence_length,
        data_root=data_root, save_folder=save_folder, work_dir=work_dir,
    )  # fmt: skip
    if not dry_run:
        return commands.train.train(loaded.config, origins=loaded.origins, stored=loaded.stored)
    summary = commands.dry_run.summarize(loaded, os.environ)
    if _is_rank_0():
        typer.echo(loaded.stored.to_json() if json else summary)
    return EXIT_DONE


def resume(
    context: typer.Context,
    run_dir: Annotated[
        str,
        argument(
            "A run: its folder, name (see `toolkit runs`) or URL, or its newest step{N} folder.",
            metavar="RUN_DIR",
        ),
    ],
    overrides: Overrides = None,
    work_dir: Annotated[
        str | None, option("Of a run at a URL: where it is on this machine.", metavar="FOLDER")
    ] = None,
    explain: Annotated[
        bool,
        option(
            "Show what would be restored, changed and refused (exit code 2); do nothing.",
            "--explain",
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
      toolkit resume s3://bucket/runs/first
      accelerate launch --config_file accelerate_configs/fsdp.yaml --num_processes 2 \\
          toolkit resume runs/quickstart/first
    """
    word, flags = commands.load.split_words(run_dir, overrides, "RUN_DIR")
    folder = commands.runs.folder_of(word, work_dir)
    if (url := commands.runs.url_of_run(word)) is not None:
        flags = [f"--run.mirror={url}", *flags]  # wherever it was written before
    if not explain:
        return commands.train.resume(folder, flags, debug=bool(context.obj))
    explanation = commands.explain.explain_resume(folder, flags, os.environ)
    if _is_rank_0():
        typer.echo(str(explanation))
    return EXIT_BAD_INPUT if explanation.refused else EXIT_DONE


def prepare(
    config: Config,
    overrides: Overrides = None,
    data_root: DataRoot = None,
    work_dir: WorkDir = None,
    base: Base = None,
) -> None:
    """Turn text into token files: read, tokenize, split, write. Of a mixture, every source.

    `toolkit train` does the same by itself when the files are missing. What is there already and
    fits the config is left alone; what was interrupted goes on where it stopped.

    \b
    Examples:
      toolkit prepare quickstart
      toolkit prepare my.json --data-root /shared/data --dataset.num_processes=32
      toolkit prepare my.json --dataset.source='{type: files, paths: [texts/]}'
    """
    loaded = commands.load.load(config, overrides, base, data_root=data_root, work_dir=work_dir)
    corpus = commands.data.prepare_corpus(loaded.config.data, work_dir=loaded.config.run.work_dir)
    for _, prepared in corpus.parts.values():
        typer.echo(prepared_text(prepared))
        if loaded.config.store.permanent_root is not None:
            typer.echo(commands.data.describe_stored(prepared))
    if not corpus.parts:
        typer.echo(f"{corpus.where}: a data set written in Python; there is nothing to prepare")


def _is_rank_0() -> bool:
    return os.environ.get("RANK", "0") == "0"
