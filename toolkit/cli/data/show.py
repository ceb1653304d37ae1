"""`toolkit data show`."""

from enum import StrEnum
from typing import Annotated

import typer

from toolkit.cli.arguments import (
    Base,
    Config,
    DataRoot,
    Overrides,
    SequenceLength,
    WorkDir,
    split_words,
)
from toolkit.wording import count


class SplitName(StrEnum):
    """The splits of a corpus."""

    train = "train"
    val = "val"


def show(
    config: Config,
    overrides: Overrides = None,
    number: Annotated[
        int, typer.Option("-n", "--number", metavar="N", help="Instances to show.")
    ] = 3,
    split: Annotated[SplitName, typer.Option(help="Which split.")] = SplitName.train,
    start: Annotated[int, typer.Option(metavar="I", help="First instance, from 0.")] = 0,
    source: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which source of a mixture.")
    ] = None,
    data_root: DataRoot = None,
    sequence_length: SequenceLength = None,
    work_dir: WorkDir = None,
    base: Base = None,
) -> None:
    """Show instances as training sees them: text, documents, and what the loss counts.

    Instances are numbered from 0, before shuffling. Every document starts a new paragraph. Tokens
    between [[ and ]] are targets: the loss asks for them. Control tokens show by their names. Data
    that is not there yet is prepared first.

    \b
    Examples:
      toolkit data show quickstart -n 1
      toolkit data show sft_chat --base models/smollm
      toolkit data show chat.json -n 3 --split val --start 100
      toolkit data show mix.json --source web --dataset.instances='{type: packed}'
    """
    from toolkit.cli.instance_text import LEGEND, plain_console, print_pieces
    from toolkit.data.prepare.tools.show import find_instances
    from toolkit.experiment.load import load_experiment

    word, paths = split_words(config, overrides, "CONFIG")
    shorthands = {
        "data_root": data_root, "sequence_length": sequence_length, "work_dir": work_dir,
    }  # fmt: skip
    loaded = load_experiment(word, paths, shorthands, base=base).config
    found = find_instances(loaded.data, split.value, source=source, work_dir=loaded.run.work_dir)
    console = plain_console()
    instances = "instances of unknown number,"
    if found.num_instances is not None:
        instances = count(found.num_instances, "instance")
    console.print(
        f"{found.where} {split.value}: {instances} of up to "
        f"{found.instances.sequence_length:,} tokens ({found.kind})"
    )
    console.print(LEGEND)
    for shown in found.decoded(start, number):
        documents = len(shown.documents)
        padding = f", {shown.num_padding:,} of padding" if shown.num_padding else ""
        console.print()
        console.print(
            f"instance {shown.instance:,}: {shown.num_tokens:,} tokens{padding}, "
            f"{shown.num_targets:,} targets, {count(documents, 'document')}",
            style="bold",
        )
        print_pieces(console, shown.text, shown.documents)
