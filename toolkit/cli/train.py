"""`toolkit train`, `toolkit resume`, `toolkit prepare`."""

import os
from typing import Annotated

import typer

from toolkit import commands
from toolkit.cli.options import (
    Base,
    Config,
    DataRoot,
    Engine,
    Head,
    Interface,
    JoinTimeout,
    NodeRank,
    NumNodes,
    Overrides,
    Processes,
    SequenceLength,
    WorkDir,
    argument,
    option,
)
from toolkit.cli.printing import prepared_text
from toolkit.errors import EXIT_BAD_INPUT, EXIT_DONE, ConfigError


def train(
    context: typer.Context,
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
    processes: Processes = None,
    engine: Engine = None,
    nodes: NumNodes = None,
    node_rank: NodeRank = None,
    head: Head = None,
    interface: Interface = None,
    join_timeout: JoinTimeout = None,
    dry_run: Annotated[
        bool, option("Show the resolved config and what follows; do nothing.", "--dry-run")
    ] = False,
    every: Annotated[
        bool, option("With --dry-run: all values, those at their defaults too.", "--all")
    ] = False,
    json: Annotated[
        bool, option("With --dry-run: only the config, as a file `train` reads.", "--json")
    ] = False,
    yaml: Annotated[bool, option("The same as YAML.", "--yaml")] = False,
) -> int:
    """Train a model from a recipe or a config file.

    Any config value can be given by its path: --train_module.optim.lr=6e-3, with JSON or YAML
    values. `toolkit schema` describes all of them. --processes starts several processes, which
    run DDP or what --engine says; under `accelerate launch` and `torchrun` leave --processes out.

    \b
    Examples:
      toolkit train quickstart --name first --trainer.hard_stop='{value: 20, unit: steps}'
      toolkit train finetune_lora --base models/smollm --name first
      toolkit train my.json --sequence-length 512 --train_module.optim.lr=6e-3 --dry-run
      toolkit train quickstart --processes 2 --engine zero3 --save-folder runs/quickstart/zero3
      toolkit train my.json --processes 8 --nodes 2 --node-rank 1 --head node0 --interface eth0
      accelerate launch -m toolkit train my.json
    """
    ways = [name for name, is_on in (("all", every), ("json", json), ("yaml", yaml)) if is_on]
    if ways and not dry_run:
        shown = "every value" if every else "the resolved config"
        raise ConfigError(f"--{ways[0]} belongs to --dry-run; give both to print {shown}")
    if len(ways) > 1:
        raise ConfigError(f"--{' and --'.join(ways)} are ways to print one thing; give one")
    asked = commands.launching.planned(
        engine, processes, nodes, node_rank, head, interface, join_timeout
    )
    loaded = commands.load.load(
        *(config, overrides, base), starts=True, name=name, sequence_length=sequence_length,
        data_root=data_root, save_folder=save_folder, work_dir=work_dir,
    )  # fmt: skip
    if not dry_run and asked is not None and asked.starts_workers:
        return commands.train.start_workers(
            loaded.config, asked, context.obj.words, debug=context.obj.debug
        )
    if not dry_run:
        return commands.train.train(loaded.config, origins=loaded.origins, stored=loaded.stored)
    environ = os.environ if asked is None else asked.environ(os.environ)
    summary = commands.dry_run.summarize(loaded, environ, every=every)
    if _is_rank_0():
        if json:
            summary = loaded.stored.to_json().decode()
        elif yaml:
            summary = commands.dry_run.as_yaml(loaded.stored)
        typer.echo(summary)
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
    processes: Processes = None,
    engine: Engine = None,
    nodes: NumNodes = None,
    node_rank: NodeRank = None,
    head: Head = None,
    interface: Interface = None,
    join_timeout: JoinTimeout = None,
    explain: Annotated[
        bool,
        option(
            "Show what would be restored, changed and refused (exit code 2); do nothing.",
            "--explain",
        ),
    ] = False,
) -> int:
    """Continue a run from its newest valid checkpoint, as if nothing had happened.

    Without a launcher the run is launched again as it was, on the same engine and number of
    processes; --engine and --processes ask for others. Under a launcher it takes what that gives.

    \b
    Examples:
      toolkit resume runs/quickstart/first
      toolkit resume runs/quickstart/first --trainer.max_duration='{value: 800, unit: steps}'
      toolkit resume --explain runs/quickstart/first --train_module.optim.lr=1e-3
      toolkit resume runs/quickstart/first --processes 2 --engine fsdp
      toolkit resume s3://bucket/runs/first
    """
    asked = commands.launching.planned(
        engine, processes, nodes, node_rank, head, interface, join_timeout
    )
    word, flags = commands.load.split_words(run_dir, overrides, "RUN_DIR")
    folder = commands.runs.named.folder_of(word, work_dir)
    if (url := commands.runs.named.url_of_run(word)) is not None:
        flags = [f"--run.mirror={url}", *flags]  # wherever it was written before
    if not explain:
        return commands.train.resume(folder, flags, asked=asked, debug=context.obj.debug)
    environ = os.environ if asked is None else asked.environ(os.environ)
    explanation = commands.explain.explain_resume(folder, flags, environ)
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
