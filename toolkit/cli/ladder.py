"""`toolkit ladder`: a config at several sizes and durations, and the law of their losses."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit import commands
from toolkit.cli.options import (
    Config,
    Engine,
    Json,
    Overrides,
    Processes,
    SequenceLength,
    option,
)
from toolkit.cli.printing import print_json, print_table
from toolkit.errors import EXIT_DONE, ConfigError
from toolkit.wording import count, labelled

if TYPE_CHECKING:
    from toolkit.commands.ladder import Finished, Ladder, Law
    from toolkit.distributed.layout import Layout


def ladder(
    config: Config,
    overrides: Overrides = None,
    sizes: Annotated[
        str,
        option("Weights that a token is multiplied with: of blocks and head.", metavar="N,N,..."),
    ] = "1M,4M,10M",
    tokens_per_parameter: Annotated[
        str,
        option("Tokens for each weight; about 20 is the best use of compute.", metavar="R,R,..."),
    ] = "10,20,40",
    out: Annotated[
        Path | None,
        option("Folder of the runs.", shown="runs/EXPERIMENT_ladder", metavar="DIR"),
    ] = None,
    fit: Annotated[
        bool, option("Train nothing; fit the runs in --out that are done.", "--fit")
    ] = False,
    predict: Annotated[
        str | None,
        option("Tell the law's loss of N weights after D tokens, as in 1B:20B.", metavar="N:D,..."),
    ] = None,
    plot: Annotated[
        Path | None, option("Write the losses and the law to this PNG file.", metavar="FILE")
    ] = None,
    processes: Processes = None,
    engine: Engine = None,
    sequence_length: SequenceLength = None,
    dry_run: Annotated[
        bool, option("List the runs with weights, tokens and FLOPs; do nothing.", "--dry-run")
    ] = False,
    json: Json = False,
) -> int:
    """Train a config at several sizes and durations, and fit how its loss falls.

    Each size is a model of the config's shape; batch and learning rate follow the size from the
    config's own (docs/recipes.md tells the rules). The runs are trained one after the other. The
    same command goes on after a stop, and leaves runs alone that are done. Once all are, or with
    --fit, it fits L(N, D) = E + A/N^alpha + B/D^beta (Hoffmann et al. 2022).

    \b
    Examples:
      toolkit ladder quickstart --sizes 300k,1M,3M --tokens-per-parameter 10,20 --dry-run
      toolkit ladder llama_271M --sizes 4M,10M,30M --out runs/ladder --processes 8
      toolkit ladder llama_271M --sizes 4M,10M,30M --out runs/ladder --fit --predict 1B:20B
    """
    parts = commands.ladder
    loaded = commands.load.load(
        config,
        overrides,
        environ=None if processes else os.environ,
        sequence_length=sequence_length,
    )
    plan = parts.plan_ladder(
        loaded,
        parts.parse_numbers(sizes, "--sizes"),
        parts.parse_numbers(tokens_per_parameter, "--tokens-per-parameter"),
        ranks=processes or 1,
    )
    wanted = _targets(predict)
    folder = out if out is not None else Path("runs") / plan.experiment
    if dry_run:
        _show_plan(plan, folder, parts.layout_of_runs(plan.rungs, processes, engine), json=json)
        return EXIT_DONE
    if not fit:
        options = [*_option("--processes", processes), *_option("--engine", engine)]
        start = parts.start_training(*options)
        code = parts.train_rungs(
            plan.rungs, folder, start, notify=lambda line: typer.echo(line, err=json)
        )
        if code != EXIT_DONE:
            return code
    done = list(parts.finished_runs(plan.rungs, folder))
    if not fit and len(done) < parts.FEWEST:
        return EXIT_DONE  # made for its runs, not for a law
    try:
        law = parts.fit_law(
            [run.rung.size for run in done],
            [run.rung.tokens for run in done],
            [run.loss for run in done],
        )
    except ConfigError as error:
        if fit:
            found = f"{len(done)} of {count(len(plan.rungs), 'run')} done"
            raise ConfigError(f"{folder}: {found}; {error}") from None
        typer.echo(f"no law: {error}", err=json)  # the runs are done all the same
        return EXIT_DONE
    if plot is not None:
        parts.write_png(plot, law, done, title=f"{plan.experiment}: validation loss")
    _show_law(law, done, wanted, json=json)
    if plot is not None and not json:
        typer.echo(f"\nwritten to {plot}")
    return EXIT_DONE


def _option(name: str, value: object) -> list[str]:
    return [] if value is None else [name, str(value)]


def _targets(predict: str | None) -> list[tuple[int, int]]:
    found = []
    for text in predict.split(",") if predict is not None else ():
        size, colon, tokens = text.partition(":")
        if not colon:
            raise ConfigError(f"--predict {text}: give weights:tokens, as in 1B:20B")
        parse = commands.ladder.parse_number
        found.append((parse(size, "--predict"), parse(tokens, "--predict")))
    return found


def _show_plan(plan: "Ladder", folder: Path, layout: "Layout", *, json: bool) -> None:
    done = {run.rung.name for run in commands.ladder.finished_runs(plan.rungs, folder)}
    rows: list[dict[str, Any]] = []
    for rung in plan.rungs:
        model, module = rung.config.model.to_transformer(), rung.config.train_module
        rows.append(
            {
                "run": rung.name,
                "weights": rung.size,
                "parameters": model.num_parameters,
                "layers": model.num_layers,
                "width": model.d_model,
                "tokens": rung.tokens,
                "batch": rung.config.data_loader.global_batch_size,
                "steps": rung.steps,
                "warmup": round(module.scheduler.length_of_warmup(rung.steps)),
                "lr": module.optim.lr,
                "flops": rung.flops,
            }
        )
    total = sum(rung.flops for rung in plan.rungs)
    if json:
        print_json(
            {
                "experiment": plan.experiment,
                "folder": str(folder),
                "engine": layout.name,
                "processes": layout.world_size,
                "runs": [row | {"done": row["run"] in done} for row in rows],
                "flops": total,
            }
        )
        return
    header = [name.replace("flops", "FLOPs") for name in rows[0]]
    cells = [
        [
            f"{value:.2e}" if name == "flops" else f"{value:,}" if name != "run" else value
            for name, value in row.items()
        ]
        for row in rows
    ]
    print_table(header, cells, right=header[1:])
    here = f"{folder}: {len(done)} of {count(len(rows), 'run')} done"
    if done:
        here += f" ({', '.join(rung.name for rung in plan.rungs if rung.name in done)})"
    lack = commands.ladder.lacking([row["weights"] for row in rows], [r["tokens"] for r in rows])
    about = [
        ("folder", [here]),
        ("each run", [f"{layout.description}, {count(layout.world_size, 'process')}"]),
        ("sizes", ["as near as whole layers and heads come at the config's d_model / num_layers"]),
        ("note", [] if lack is None else [f"no law will come of these: {lack}"]),
    ]
    typer.echo("\n" + "\n".join(labelled(about)))
    typer.echo(f"\n{total:.2e} FLOPs in all. Nothing was written.")


def _show_law(
    law: "Law", done: Sequence["Finished"], wanted: Sequence[tuple[int, int]], *, json: bool
) -> None:
    runs: list[dict[str, Any]] = [
        {
            "run": run.rung.name,
            "weights": run.rung.size,
            "tokens": run.rung.tokens,
            "loss": run.loss,
            "law": law.loss(run.rung.size, run.rung.tokens),
        }
        for run in done
    ]
    predicted = [{"weights": n, "tokens": d, "loss": law.loss(n, d)} for n, d in wanted]
    if json:
        print_json({"law": law._asdict(), "runs": runs, "predicted": predicted})
        return
    header = ["run", "weights", "tokens", "val loss", "law", "off by"]
    rows = [
        [
            run["run"],
            f"{run['weights']:,}",
            f"{run['tokens']:,}",
            f"{run['loss']:.4f}",
            f"{run['law']:.4f}",
            f"{100 * (run['law'] / run['loss'] - 1):+.2f}%",
        ]
        for run in runs
    ]
    print_table(header, rows, right=header[1:])
    typer.echo(f"\n{commands.ladder.draw(law, done)}\n")
    typer.echo(
        f"L(N, D) = {law.floor:.4f} + {law.a:.4g} / N^{law.alpha:.4f} + {law.b:.4g} / "
        f"D^{law.beta:.4f}"
    )
    for flops in (1e18, 1e20, 1e22):
        size, tokens = law.best_split(flops)
        typer.echo(
            f"best use of {flops:.0e} FLOPs (6 N D): {size:.3g} weights, {tokens:.3g} tokens, "
            f"loss {law.loss(size, tokens):.4f}"
        )
    for target in predicted:
        typer.echo(
            f"{target['weights']:,} weights after {target['tokens']:,} tokens: "
            f"loss {target['loss']:.4f}"
        )
