"""Parts of the reference that are read from the code when the site is built.

A page says `<!-- generated: NAME -->` where the part belongs; `PARTS` has the names.
"""

import ast
import inspect
import itertools
import json
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

import toolkit
from toolkit.cli.main import app
from toolkit.commands.recipes import experiment_schema
from toolkit.runs.files import RunFiles

DOCS = Path(__file__).parent
_MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
_REF = "#/$defs/"


def fill(text: str) -> str:
    """A page with its generated parts. Raises KeyError where a name is none of `PARTS`."""
    return _MARK.sub(lambda found: PARTS[found[1]](), text)


def _cell(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def cli() -> str:
    """Every command of `toolkit`: usage, options, examples."""
    root: Any = typer.main.get_command(app)
    return "\n".join(_command(path, command) for path, command in _commands(root, "toolkit"))


def _commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if not command.hidden:
            yield f"{path} {name}", command
            if hasattr(command, "commands"):
                yield from _commands(command, f"{path} {name}")


def _command(path: str, command: Any) -> str:
    text, _, examples = inspect.cleandoc(command.help or "").partition("\b\nExamples:\n")
    context = command.make_context(path, [], resilient_parsing=True)
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    rows = []
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None and "--help" not in parameter.opts:
            rows.append((f"`{_cell(record[0])}`", _cell(record[1])))
    parts = [f"## `{path}`\n", text.strip(), f"```text\n{usage}\n```"]
    if rows:
        parts.append(_table(("Argument or option", "Meaning"), rows))
    if examples:
        parts.append(f"```sh\n{textwrap.dedent(examples).strip()}\n```")
    return "\n\n".join(parts) + "\n"


def config() -> str:
    """Every field of a config: one table for each struct, in the order of the config's tree."""
    schema = experiment_schema()
    structs: dict[str, Any] = schema["$defs"]
    paths = _paths(structs, schema.get("$ref", f"{_REF}ExperimentConfig").removeprefix(_REF))
    return "\n".join(_struct(name, path, structs[name]) for name, path in paths.items())


def _paths(structs: dict[str, Any], root: str) -> dict[str, str]:
    """Struct -> dotted path where it is first found."""
    found: dict[str, str] = {root: ""}
    waiting = [root]
    while waiting:
        name = waiting.pop(0)
        for field, entry in structs[name].get("properties", {}).items():
            path = f"{found[name]}.{field}".lstrip(".")
            for reference in re.findall(rf'"{re.escape(_REF)}(\w+)"', json.dumps(entry)):
                if reference in structs and reference not in found:
                    found[reference] = path
                    waiting.append(reference)
    return found


def _struct(name: str, path: str, definition: dict[str, Any]) -> str:
    tag = definition.get("properties", {}).get("type", {}).get("enum", [None])[0]
    place = f"`{path}`" if path else "The whole config"
    if tag is not None:
        place += f" with `type: {tag}`"
    rows = [
        (
            f"`{field}`",
            _type(entry),
            f"`{_cell(_default(entry))}`" if "default" in entry else "required",
            _cell(entry.get("description", "")),
        )
        for field, entry in definition.get("properties", {}).items()
        if field not in ("type", "$schema")
    ]
    table = _table(("Field", "Type", "Default", "Meaning"), rows) if rows else "No fields.\n"
    return f"## {name}\n\n{place}\n\n{table}"


def _default(entry: dict[str, Any]) -> str:
    text = json.dumps(entry["default"], ensure_ascii=False)
    return text if len(text) <= 60 else "{...}" if text.startswith("{") else "[...]"


def _type(entry: dict[str, Any]) -> str:
    if "anyOf" in entry:
        return " or ".join(dict.fromkeys(map(_type, entry["anyOf"])))
    if "$ref" in entry:
        name = entry["$ref"].removeprefix(_REF)
        return f"[{name}](#{name.lower()})"
    if "enum" in entry:
        return ", ".join(f"`{value}`" for value in entry["enum"])
    if entry.get("type") == "array":
        items = entry.get("items") or (entry.get("prefixItems") or [{}])[0]
        return f"list of {_type(items)}" if items else "list"
    if entry.get("type") == "object":
        inner = entry.get("additionalProperties")
        return f"mapping to {_type(inner)}" if isinstance(inner, dict) and inner else "mapping"
    return str(entry.get("type", "any"))


def run_files() -> str:
    """Every file of a run folder."""
    body = ast.parse(inspect.getsource(RunFiles)).body[0].body  # type: ignore[attr-defined]
    rows = []
    for field, doc in itertools.pairwise(body):
        match field, doc:
            case (
                ast.AnnAssign(value=ast.Constant(str(path))),
                ast.Expr(ast.Constant(str(text))),
            ):
                rows.append((f"`{path}`", _cell(text)))
    return _table(("Path", "What it holds"), rows)


def api() -> str:
    """autodoc of every name that `toolkit` exports."""
    parts = []
    for name in toolkit.__all__:
        value = getattr(toolkit, name)
        if inspect.isclass(value) and issubclass(value, toolkit.Config):  # fields: config.md
            directive = [f".. autoclass:: toolkit.{name}()"]
        elif inspect.isclass(value):
            directive = [f".. autoclass:: toolkit.{name}", "   :members:"]
        elif callable(value):
            directive = [f".. autofunction:: toolkit.{name}"]
        else:
            directive = [f".. autodata:: toolkit.{name}", "   :no-value:"]
        parts.append("\n".join([f"## {name}\n", "```{eval-rst}", *directive, "```\n"]))
    return "\n".join(parts)


def other_pages() -> str:
    """Pages of docs/ that index.md does not name, one a line, for its table of contents."""
    named = {"index", *(DOCS / "index.md").read_text().splitlines()}
    return "\n".join(sorted({page.stem for page in DOCS.glob("*.md")} - named))


PARTS: dict[str, Callable[[], str]] = {
    "cli": cli,
    "config": config,
    "run_files": run_files,
    "api": api,
    "other_pages": other_pages,
}
