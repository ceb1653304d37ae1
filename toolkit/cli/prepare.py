"""`toolkit prepare`."""

import typer

from toolkit.cli.arguments import Base, Config, DataRoot, Overrides, WorkDir, split_words


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
    from toolkit.data.prepare.corpus import prepare_corpus
    from toolkit.data.prepare.store.store import describe_stored
    from toolkit.experiment.load import load_experiment

    source, paths = split_words(config, overrides, "CONFIG")
    shorthands = {"data_root": data_root, "work_dir": work_dir}
    loaded = load_experiment(source, paths, shorthands, base=base).config
    corpus = prepare_corpus(loaded.data, work_dir=loaded.run.work_dir)
    for _, prepared in corpus.parts.values():
        typer.echo(
            f"{prepared.folder}: {prepared.num_tokens('train'):,} training tokens, "
            f"{prepared.num_tokens('val'):,} validation tokens, "
            f"vocabulary of {prepared.vocab_size:,} ({prepared.manifest.dtype})"
        )
        if loaded.store.permanent_root is not None:
            typer.echo(describe_stored(prepared))
    if not corpus.parts:
        typer.echo(f"{corpus.where}: a data set written in Python; there is nothing to prepare")
