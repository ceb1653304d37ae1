"""`toolkit verify`."""

from typing import TYPE_CHECKING, Annotated

import typer

from toolkit.cli.arguments import run_named

if TYPE_CHECKING:
    from toolkit.commands.receipt import Receipt
    from toolkit.commands.verify import CheckpointReport


def verify(
    context: typer.Context,
    run_dir: Annotated[
        str,
        typer.Argument(metavar="RUN_DIR", help="A run, a converted model, or a step{N} folder."),
    ],
    quick: Annotated[
        bool, typer.Option("--quick", help="Compare sizes only, not contents.")
    ] = False,
    replay: Annotated[
        int | None,
        typer.Option(metavar="N", help="Run N steps again and compare their losses."),
    ] = None,
    step: Annotated[
        int | None,
        typer.Option(
            metavar="S",
            help="With --replay: the checkpoint to start from.",
            show_default="the newest with N recorded steps after it",
        ),
    ] = None,
) -> int:
    """Check every checkpoint of a run against its manifest; or run some of its steps again.

    A replay starts from a checkpoint and computes N steps in a temporary folder, with the recorded
    engine and number of processes (under a launcher: what that gives). On what the run had, every
    loss must equal the recorded one bit for bit, else to rounding. The receipt is written to
    metadata/verify-replay-step{S}.json. Several machines need TMPDIR on a shared file system.

    Exit code 0: all is whole, or equal. 1: it is not.

    \b
    Examples:
      toolkit verify runs/quickstart/first
      toolkit verify runs/quickstart/first/checkpoints/step400 --quick
      toolkit verify runs/quickstart/first --replay 10 --step 200
    """
    from pathlib import Path

    from toolkit.errors import EXIT_DONE, EXIT_FAILED, ConfigError

    run_dir = run_named(run_dir)
    if replay is None:
        if step is not None:
            raise ConfigError("--step belongs to --replay N; or give the step{N} folder itself")
        from toolkit.commands.verify import verify_checkpoints

        reports = verify_checkpoints(Path(run_dir), quick=quick)
        _print_reports(reports, run_dir, quick=quick)
        damaged = any(report.problem and not report.is_leftover for report in reports)
        return EXIT_FAILED if damaged else EXIT_DONE
    if quick:
        raise ConfigError("--quick does not go with --replay; a replay reads the whole checkpoint")
    from toolkit.commands.receipt import Receipt
    from toolkit.commands.replay import replay_steps

    outcome = replay_steps(Path(run_dir), replay, step=step, debug=bool(context.obj))
    if not isinstance(outcome, Receipt):
        return outcome
    _print_receipt(outcome)
    return EXIT_DONE if outcome.verdict == "equal" else EXIT_FAILED


def _print_reports(reports: "list[CheckpointReport]", run_dir: str, *, quick: bool) -> None:
    from toolkit.cli.table import print_table, size_text

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
                size_text(report.size),
                report.problem or whole,
            ]
            for report in reports
        ],
        right=["size"],
    )


def _print_receipt(receipt: "Receipt") -> None:
    from toolkit.commands.receipt import describe

    steps = f"steps {receipt.first_step} to {receipt.last_step}"
    typer.echo(
        f"replayed {steps} from {receipt.checkpoint}: {describe(receipt.replayed)}; compared "
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
