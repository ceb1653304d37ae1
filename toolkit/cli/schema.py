"""`toolkit schema`."""

import typer


def schema() -> None:
    """Print the JSON Schema of a config, every field described: for editors, and for reading.

    \b
    Examples:
      toolkit schema > schema.json
      toolkit schema | less
    """
    import json

    from toolkit.commands.schema import experiment_schema

    typer.echo(json.dumps(experiment_schema(), indent=2))
