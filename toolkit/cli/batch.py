"""`toolkit batch`."""

from typing import TYPE_CHECKING, Annotated

import typer

from toolkit.cli.arguments import run_named

if TYPE_CHECKING:
    from toolkit.commands.batch import BatchInstance, StepBatch


def batch(
    run_dir: Annotated[
        str, typer.Argument(metavar="RUN_DIR", help="A run folder (see `toolkit runs`).")
    ],
    step: Annotated[int, typer.Option(metavar="N", help="The step, as in metrics/train.jsonl.")],
    show: Annotated[int, typer.Option(metavar="K", help="Instances to show as text.")] = 1,
    json: Annotated[bool, typer.Option("--json", help="Everything as one JSON object.")] = False,
) -> None:
    """Show which documents and tokens made up the global batch of one step.

    Documents and instances are numbered from 0, in the order of train.bin. A document's tokens are
    counted from its own first. Tokens between [[ and ]] are targets: the loss asks for them (not
    for the first of each instance, which nothing predicts, nor for what a loss mask leaves out).
    Every document starts a new paragraph.

    \b
    Examples:
      toolkit batch runs/quickstart/first --step 120
      toolkit batch runs/quickstart/first --step 120 --show 4
      toolkit batch runs/quickstart/first --step 120 --show 0 --json
    """
    from pathlib import Path

    from toolkit.cli.instance_text import LEGEND, plain_console, print_pieces
    from toolkit.commands.batch import step_batch

    found = step_batch(Path(run_named(run_dir)), step, show=show)
    if json:
        import msgspec

        typer.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
        return
    _print_batch(found)
    console = plain_console()
    if show:
        console.print(f"\n{LEGEND}")
    for instance in found.instances[:show]:
        console.print()
        console.print(f"instance {_name(instance)}", style="bold")
        print_pieces(console, instance.text or [], instance.documents)


def _print_batch(found: "StepBatch") -> None:
    from toolkit.cli.table import print_table

    typer.echo(
        f"step {found.step}: batch {found.batch + 1:,}{_place(found)}; "
        f"{len(found.instances):,} instances, {found.num_tokens:,} tokens, "
        f"{found.num_targets:,} targets"
    )
    checked = "as in the run's checkpoint" if found.is_checked else "the run has no checkpoint"
    typer.echo(f"data {found.fingerprint} ({checked})")
    rows = []
    for instance in found.instances:
        for number, part in enumerate(instance.documents):
            first = number == 0
            rows.append(
                [
                    _name(instance) if first else "",
                    f"{instance.num_tokens:,}" if first else "",
                    f"{instance.num_targets:,}" if first else "",
                    f"{part.document:,}",
                    f"{part.start:,} to {part.end - 1:,} of {part.num_tokens:,}",
                ]
            )
    header = ["instance", "tokens", "targets", "document", "its tokens"]
    print_table(header, rows, right=header[:4])


def _place(found: "StepBatch") -> str:
    if found.batches_per_epoch is None:
        return ""
    return f" of {found.batches_per_epoch:,} in epoch {found.epoch + 1}"


def _name(instance: "BatchInstance") -> str:
    number = f"{instance.instance:,}"
    return f"{instance.source} {number}" if instance.source is not None else number
