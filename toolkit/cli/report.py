"""`toolkit report`: runs as one page for a browser, and as pictures."""

from typing import Annotated, Literal

import typer

from toolkit import commands
from toolkit.cli.options import Registry, Root, argument, option
from toolkit.errors import ConfigError
from toolkit.wording import count, prefixed


def report(
    runs: Annotated[
        list[str], argument("One run or more: name, id, folder or URL.", metavar="RUN...")
    ],
    out: Annotated[str, option("The page.", metavar="FILE")] = "report.html",
    png: Annotated[
        str | None, option("Write a PNG of each chart too.", metavar="FOLDER", shown="none")
    ] = None,
    axis: Annotated[
        Literal["step", "tokens", "time"] | None,
        option("Horizontal axis of the PNGs; the page has its own choice.", shown="step"),
    ] = None,
    root: Root = "runs",
    registry: Registry = None,
) -> None:
    """Write a page about a run, or about several side by side, that needs no network.

    Curves over steps, tokens or time, norms of layers, throughput with its gaps, evaluations,
    samples, data, checkpoints, attempts, system use, config with origins, and how to repeat it.
    A run that still trains is shown as far as it came.

    \b
    Examples:
      toolkit report first
      toolkit report first second third --out compare.html
      toolkit report first --png pictures --axis tokens
    """
    if axis is not None and png is None:
        raise ConfigError("--axis belongs to --png FOLDER; on the page it is chosen at the top")
    page = commands.report.local_path(out, "--out")
    pictures = None if png is None else commands.report.local_path(png, "--png")
    folders = [commands.runs.named.run_to_read(run, root, registry) for run in runs]
    found = commands.report.read_report(folders)
    is_new = not page.exists()
    size = commands.report.write_html(found, page)
    replaced = "" if is_new else ", in the place of what was there"
    typer.echo(f"{page}: {prefixed(size, 'B')}{replaced}")
    if pictures is not None:
        written = commands.report.write_pngs(found, pictures, axis=axis or "step")
        typer.echo(f"{pictures}: {count(len(written), 'picture')}")


def board(
    root: Root = "runs",
    registry: Registry = None,
    port: Annotated[
        int, option("Where it listens on this machine; 0: a free one.", min=0, max=65535)
    ] = 8765,
) -> None:
    """Serve the pages of `toolkit report` to browsers of this machine, as runs train.

    It lists the runs; those that you tick are shown side by side. Ctrl-C ends it. From another
    machine: `ssh -L 8765:localhost:8765 HOST`.

    \b
    Examples:
      toolkit board
      toolkit board --root /shared/runs --port 9000
    """
    with commands.report.BoardServer(root, registry, port) as server:
        typer.echo(f"http://localhost:{server.server_port}/  (Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            typer.echo("")
