"""`toolkit launch` and `toolkit jobs`: runs on clusters."""

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

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
from toolkit.cli.printing import cell, print_table, visible
from toolkit.commands.launch import TARGETS
from toolkit.errors import EXIT_DONE, ConfigError
from toolkit.wording import count

jobs = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
Run = Annotated[str, argument("A run: its folder or name.", metavar="RUN")]


class LaunchCommand(TyperCommand):
    """Shows the options of targets below its own: of the one that `--to` names, or of all."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = [args[i + 1] for i, word in enumerate(args[:-1]) if word == "--to"]
        named += [word.removeprefix("--to=") for word in args if word.startswith("--to=")]
        ctx.meta["launch targets"] = named[:1] or list(TARGETS)
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from toolkit.commands.launch.target import Target, target_class
        from toolkit.config.schema import field_docs

        shared = {field: field_docs(Target)[field] for field in Target.__struct_fields__}
        sections = {"Options of every target": shared}
        for name in ctx.meta["launch targets"]:
            kind = target_class(name)
            own = [field for field in kind.__struct_fields__ if field not in shared]
            sections[f"Options of --to {name}"] = {f: field_docs(kind).get(f, "") for f in own}
        for title, docs in sections.items():
            if docs:
                rows = [(f"--{name.replace('_', '-')}", text) for name, text in docs.items()]
                with formatter.section(title):
                    formatter.write_dl(rows)


def launch(
    context: typer.Context,
    config: Config,
    overrides: Overrides = None,
    to: Annotated[
        str,
        option(f"Where: {', '.join(TARGETS)}, or module:Class.", metavar="TARGET"),
    ] = "",
    name: Annotated[str | None, option("Name of the run (run.name).", shown="the time")] = None,
    sequence_length: SequenceLength = None,
    data_root: DataRoot = None,
    save_folder: Annotated[
        str | None,
        option("The run folder, as the machines see it.", shown="runs/EXPERIMENT/NAME"),
    ] = None,
    work_dir: WorkDir = None,
    base: Base = None,
    dry_run: Annotated[
        bool, option("Print exactly what would be submitted; do nothing.", "--dry-run")
    ] = False,
    follow: Annotated[
        bool | None,
        option(
            "Show the log until the job ends, or leave it alone.",
            "--follow/--detach",
            shown="--detach; on Beaker --follow",
        ),
    ] = None,
) -> int:
    """Train on a cluster: check everything, submit a job, say where it is.

    The config is checked as by `toolkit train --dry-run` before anything is submitted. `toolkit
    jobs` looks after the job. docs/clusters.md is the guide.

    \b
    Examples:
      toolkit launch my.json --to slurm --nodes 2 --gpus 8 --partition gpu --time 24:00:00
      toolkit launch my.json --to kubernetes --gpus 8 --image me/toolkit --volume data:/data \\
          --save-folder /data/runs/first
      toolkit launch my.json --to beaker --gpus 8 --weka training --image me/toolkit \\
          --save-folder /weka/training/first
      toolkit launch my.json --to ssh --hosts gpu1,gpu2 --gpus 8
      toolkit launch my.json --to local --dry-run
    """
    if not to:
        raise ConfigError(f"say where: --to {', '.join(TARGETS)}", key="--to")
    plan = commands.launch.submit.plan(
        [config, *(overrides or ())], to, debug=context.obj.debug, name=name, base=base,
        sequence_length=sequence_length, data_root=data_root, save_folder=save_folder,
        work_dir=work_dir,
    )  # fmt: skip
    if dry_run:
        typer.echo(plan.render(), nl=False)
        return EXIT_DONE
    records = commands.launch.submit.launch(plan)
    for home, record in zip(plan.homes, records, strict=True):
        typer.echo(
            f"{record.target} {record.id}: {home}" + (f"  {record.link}" if record.link else "")
        )
    run = str(plan.homes[0])
    if follow is None:
        follow = plan.target.follows
    if not follow or len(records) > 1:
        typer.echo(f"toolkit jobs status {run}   (or: logs --follow, stop)")
        return EXIT_DONE
    return _follow(run)


def _follow(run: str) -> int:
    try:
        for line in commands.launch.jobs.logs(run, follow=True):
            typer.echo(visible(line))
    except KeyboardInterrupt:
        typer.echo(f"the job goes on; `toolkit jobs stop {run}` ends it", err=True)
        raise
    return commands.launch.jobs.exit_code(run)


@jobs.callback()
def list_jobs(
    context: typer.Context,
    root: Annotated[str, option("Folder of all runs (run.root).")] = "runs",
) -> None:
    """Look after jobs of `toolkit launch`: list them, show logs, stop them. Listed are those of
    runs ROOT/GROUP/NAME.

    \b
    Examples:
      toolkit jobs
      toolkit jobs logs runs/quickstart/first --follow
      toolkit jobs stop runs/quickstart/first
    """
    if context.invoked_subcommand is not None:
        return
    reports = commands.launch.jobs.list_all(root)
    if not reports:
        typer.echo(
            f"no jobs in {root}; submit one with `toolkit launch CONFIG --to TARGET`, or list "
            "those of --save-folder TOP/GROUP/NAME with --root TOP"
        )
        return
    rows = [
        [
            f"{report.home.parent.name}/{report.home.name}",
            report.record.target,
            report.record.id,
            report.status.state,
            cell(report.run.step if report.run is not None else None),
            report.record.submitted[:16].replace("T", " "),
            report.status.detail,
        ]
        for report in reports
    ]
    print_table(["run", "target", "job", "state", "step", "submitted", ""], rows, right=["step"])


@jobs.command()
def status(run: Run) -> None:
    """How a job and its run are.

    \b
    Examples:
      toolkit jobs status runs/quickstart/first
      toolkit jobs status first
    """
    report = commands.launch.jobs.report(run)
    record, found = report.record, report.status
    detail = f" ({visible(found.detail)})" if found.detail else ""
    machines = f" on {count(record.nodes, 'machine')}" if record.nodes > 1 else ""
    typer.echo(f"job    {record.target} {record.id}{machines}: {found.state}{detail}")
    if record.link:
        typer.echo(f"link   {record.link}")
    where = record.folder
    if report.run is None:
        typer.echo(f"run    {where}: not begun, or not to be seen from here")
        return
    step = cell(report.run.step, unknown="0")
    typer.echo(
        f"run    {where}: {report.run.state}, step {step}, loss {cell(report.run.loss, '.4f')}"
    )


@jobs.command()
def logs(
    run: Run,
    follow: Annotated[bool, option("Go on until the job ends.", "--follow", "-f")] = False,
) -> int:
    """Show the newest log of a job. With --follow the exit code says how the job ended.

    \b
    Examples:
      toolkit jobs logs runs/quickstart/first
      toolkit jobs logs first --follow
    """
    if follow:
        return _follow(run)
    for line in commands.launch.jobs.logs(run, follow=False):
        typer.echo(visible(line))
    return EXIT_DONE


@jobs.command()
def stop(
    runs: Annotated[list[str], argument("Runs: folders or names.", metavar="RUN...")],
    now: Annotated[bool, option("Do not wait for a checkpoint.", "--now")] = False,
) -> None:
    """End jobs. A run saves a checkpoint first, from which `toolkit resume` or a new `toolkit
    launch --save-folder RUN` continues.

    \b
    Examples:
      toolkit jobs stop runs/quickstart/first
      toolkit jobs stop first-1 first-2 --now
    """
    for run in runs:
        typer.echo(commands.launch.jobs.stop(run, now=now))
