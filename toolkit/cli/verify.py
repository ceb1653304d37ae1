"""`toolkit verify` and `toolkit batch`: whether a run is whole, and what a step trained on."""

from typing import TYPE_CHECKING, Annotated

import typer

from toolkit import commands
from toolkit.cli.options import (
    Engine,
    Head,
    Interface,
    JoinTimeout,
    Json,
    NodeRank,
    NumNodes,
    Processes,
    argument,
    option,
)
from toolkit.cli.printing import (
    LEGEND,
    plain_console,
    print_json,
    print_pieces,
    print_table,
)
from toolkit.errors import EXIT_DONE, EXIT_FAILED, ConfigError
from toolkit.wording import count, prefixed

if TYPE_CHECKING:
    from toolkit.commands.batch import BatchInstance
    from toolkit.commands.receipt import Receipt
    from toolkit.commands.verify import CheckpointReport


def verify(
    context: typer.Context,
    run_dir: Annotated[
        str, argument("A run, a converted model, or a step{N} folder.", metavar="RUN_DIR")
    ],
    quick: Annotated[bool, option("Compare sizes only, not contents.", "--quick")] = False,
    replay: Annotated[
        int | None, option("Run N steps again and compare their losses.", metavar="N")
    ] = None,
    step: Annotated[
        int | None,
        option(
            "With --replay: the checkpoint to start from.",
            shown="the newest with N recorded steps after it",
            metavar="S",
        ),
    ] = None,
    processes: Processes = None,
    engine: Engine = None,
    nodes: NumNodes = None,
    node_rank: NodeRank = None,
    head: Head = None,
    interface: Interface = None,
    join_timeout: JoinTimeout = None,
) -> int:
    """Check every checkpoint of a run against its manifest; or run some of its steps again.

    A config that the run cannot be resumed with is a fault too.

    A replay starts from a checkpoint and computes N steps in a temporary folder, with the recorded
    engine and number of processes (or those asked for, or what a launcher gives). On what the run
    had, every loss must equal the recorded one bit for bit, else to rounding. The receipt is
    written to metadata/verify-replay-step{S}.json. Several machines need TMPDIR on a shared file
    system.

    Exit code 0: all is whole, or equal. 1: it is not.

    \b
    Examples:
      toolkit verify runs/quickstart/first
      toolkit verify runs/quickstart/first/checkpoints/step400 --quick
      toolkit verify runs/quickstart/first --replay 10 --step 200
    """
    asked = commands.launching.planned(
        engine, processes, nodes, node_rank, head, interface, join_timeout
    )
    if replay is None:
        if asked is not None or engine is not None:
            raise ConfigError("--processes and --engine belong to --replay N")
        if step is not None:
            raise ConfigError("--step belongs to --replay N; or give the step{N} folder itself")
        reports = commands.verify.verify(run_dir, quick=quick)
        _print_reports(reports, run_dir, quick=quick)
        damaged = any(report.problem and not report.is_leftover for report in reports)
        return EXIT_FAILED if damaged else EXIT_DONE
    if quick:
        raise ConfigError("--quick does not go with --replay; a replay reads the whole checkpoint")
    folder = commands.runs.named.folder_of(run_dir)
    outcome = commands.replay.replay_steps(
        folder, replay, step=step, asked=asked, debug=context.obj.debug
    )
    if isinstance(outcome, int):
        return outcome
    _print_receipt(outcome)
    return EXIT_DONE if outcome.verdict == "equal" else EXIT_FAILED


def _print_reports(reports: "list[CheckpointReport]", run_dir: str, *, quick: bool) -> None:
    if not reports:
        typer.echo(f"no checkpoints in {run_dir}")
        return
    whole = "OK (sizes)" if quick else "OK"
    print_table(
        ["checkpoint", "engine", "size", "result"],
        [
            [
                report.folder.name,
                f"{saved.engine} x {saved.world_size}" if (saved := report.metadata) else "-",
                prefixed(report.size, "B") if report.size is not None else "-",
                report.problem or whole,
            ]
            for report in reports
        ],
        right=["size"],
    )


def _print_receipt(receipt: "Receipt") -> None:
    steps = f"steps {receipt.first_step} to {receipt.last_step}"
    typer.echo(
        f"replayed {steps} from {receipt.checkpoint}: {receipt.replayed}; compared "
        f"{receipt.comparison}"
    )
    for reason in receipt.reasons:
        typer.echo(f"  not bit for bit: {reason}")
    if receipt.first_difference is None:
        bits = "bit for bit" if receipt.largest_difference == 0 else "to rounding"
        typer.echo(
            f"equal {bits}: {receipt.compared} losses, largest relative difference "
            f"{receipt.largest_difference:.3g}"
        )
    else:
        where = receipt.first_difference
        typer.echo(
            f"differs: step {where.step}: recorded loss {where.recorded!r}, replayed "
            f"{where.replayed!r} (largest relative difference {receipt.largest_difference:.3g})"
        )
    typer.echo(f"receipt: {receipt.file}")


def batch(
    run_dir: Annotated[str, argument("A run folder (see `toolkit runs`).", metavar="RUN_DIR")],
    step: Annotated[
        int | None, argument("The step, as in metrics/train.jsonl.", metavar="STEP")
    ] = None,
    same: Annotated[int | None, option("STEP, by name.", "--step", metavar="N")] = None,
    show: Annotated[int, option("Instances to show as text.", metavar="K")] = 1,
    json: Json = False,
) -> None:
    """Show which documents and tokens made up the global batch of one step.

    Documents and instances are numbered from 0, in the order of train.bin. A document's tokens are
    counted from its own first. Tokens between [[ and ]] are targets: the loss asks for them (not
    for the first of each instance, which nothing predicts, nor for what a loss mask leaves out).
    Every document starts a new paragraph.

    \b
    Examples:
      toolkit batch runs/quickstart/first 120
      toolkit batch runs/quickstart/first 120 --show 4
      toolkit batch runs/quickstart/first 120 --show 0 --json
    """
    steps = {number for number in (step, same) if number is not None}
    if len(steps) != 1:
        raise ConfigError(f"which step? Give one: toolkit batch {run_dir} STEP")
    saved_in = commands.runs.named.url_of_run(run_dir)
    if saved_in is not None and saved_in != run_dir.rstrip("/"):
        raise ConfigError(
            f"{run_dir}: a checkpoint, not a run; type: toolkit batch {saved_in} {steps.pop()}"
        )
    folder = commands.runs.named.folder_of(run_dir, checkpoints=False)
    found = commands.batch.step_batch(folder, steps.pop(), show=show, saved_in=saved_in)
    if json:
        print_json(found)
        return
    place = ""
    if found.batches_per_epoch is not None:
        place = f" of {found.batches_per_epoch:,} in epoch {found.epoch + 1}"
    typer.echo(
        f"step {found.step}: batch {found.batch + 1:,}{place}; "
        f"{len(found.instances):,} instances, {found.num_tokens:,} tokens, "
        f"{found.num_targets:,} targets"
    )
    if found.instances and found.sequence_length < found.instances[0].num_tokens:
        typer.echo(f"each instance is cut into rows of {count(found.sequence_length, 'token')}")
    checked = "as in the run's checkpoint" if found.is_checked else "the run has no checkpoint"
    typer.echo(f"data {found.fingerprint} ({checked})")
    rows = []
    for instance in found.instances:
        own = [_name(instance), f"{instance.num_tokens:,}", f"{instance.num_targets:,}"]
        for part in instance.documents:
            tokens = f"{part.start:,} to {part.end - 1:,} of {part.num_tokens:,}"
            rows.append([*own, f"{part.document:,}", tokens])
            own = [""] * 3
    header = ["instance", "tokens", "targets", "document", "its tokens"]
    print_table(header, rows, right=header[:4])
    console = plain_console()
    if show:
        console.print(f"\n{LEGEND}")
    for instance in found.instances[:show]:
        console.print()
        console.print(f"instance {_name(instance)}", style="bold")
        print_pieces(console, instance.text or [], instance.documents)


def _name(instance: "BatchInstance") -> str:
    number = f"{instance.instance:,}"
    return f"{instance.source} {number}" if instance.source is not None else number
