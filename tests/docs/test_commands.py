"""Every command of every page is run by a test, or parses: verb, options and config paths exist.

- `console` blocks are run by the test of their page; here is only checked that there is one.
- `sh` blocks name files and machines that are not here: each command is parsed, and runs nothing.
- Behind `<!-- not run: REASON -->` stands what is neither.
"""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.docs.running import ROOT
from toolkit.cli.main import app
from toolkit.cli.options import Invocation
from toolkit.commands.recipes import experiment_schema
from toolkit.experiment.aliases import our_path

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(<!-- not run: .+? -->\n+)?```(sh|console)\n(.*?)```", re.DOTALL)
LAUNCHERS = ("torchrun", "accelerate", "srun", "docker", "uv", "make", "pip", "mkdir")
OTHERS = {"lm-eval": "EleutherAI's, not installed here"}
OTHER = ("model.preset", "run.folder", "run.metadata")
"""What looks like the path of a config value: a word of files, attributes in Python."""
SCHEMA: dict[str, Any] = experiment_schema()
CLI: Any = typer.main.get_command(app)


def shell_commands(text: str) -> list[str]:
    """The commands of `sh` blocks that nobody excuses, without comments, one a line."""
    found = []
    for excuse, kind, block in BLOCK.findall(text):
        if kind == "sh" and not excuse:
            lines = re.sub(r"\\\n\s*", " ", block).splitlines()
            found += [line for line in lines if line.strip() and not line.startswith("#")]
    return found


def toolkit_words(command: str) -> list[str] | None:
    """The words behind `toolkit` in a command; None where there is no such program in it."""
    words = shlex.split(command, comments=True)
    for index, word in enumerate(words):
        is_image = words[0] == "docker" and words[index + 1 : index + 2] == ["toolkit"]
        if word == "toolkit" and not is_image:
            return words[index + 1 :]
    return None


def resolve(path: str, node: Any = None) -> bool:
    """Whether the config has a value at the dotted `path`."""
    node = {"$ref": "#/$defs/ExperimentConfig"} if node is None else node
    if "$ref" in node:
        return resolve(path, SCHEMA["$defs"][node["$ref"].rpartition("/")[2]])
    if not path:
        return True
    name, _, rest = path.partition(".")
    options = [option for key in ("anyOf", "oneOf") for option in node.get(key, [])]
    inner = [node.get("properties", {}).get(name), node.get("additionalProperties")]
    if name.isdigit():
        items = node.get("items")
        inner += [items if isinstance(items, dict) else None, *node.get("prefixItems", [])]
    return any(resolve(path, option) for option in options if option.keys() - {"required"}) or any(
        resolve(rest, child) for child in inner if isinstance(child, dict)
    )


def check(words: list[str]) -> None:
    """Parse a command line as `toolkit` does. Raises what the parser raises, or AssertionError."""
    group, name = CLI, "toolkit"
    while hasattr(group, "commands") and words and words[0] in group.commands:
        name, group, words = f"{name} {words[0]}", group.commands[words[0]], words[1:]
    assert group is not CLI, f"no such verb: {words}"
    words = [word for word in words if word != "--debug"]
    obj = Invocation(tuple(words), False)
    with group.make_context(name, list(words), obj=obj) as context:
        given = [word for value in context.params.values() for word in values(value)]
    for word in [*given, *context.args]:
        if word.startswith("--"):
            path = word[2:].partition("=")[0]
            is_preset = path == "model.preset"
            assert is_preset or resolve(our_path(path)), f"{name}: no such path: {path}"


def values(value: Any) -> list[str]:
    return list(value) if isinstance(value, list | tuple) else [str(value)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_parses(page: Path) -> None:
    for command in shell_commands(page.read_text()):
        words = toolkit_words(command)
        program = shlex.split(command, comments=True)[0]
        if words is None:
            assert program in LAUNCHERS or program in OTHERS, f"what is {command!r}?"
        else:
            check(words)


def test_mistakes_are_found() -> None:
    for wrong in (
        "trian my.json",
        "train my.json --trainer.hard_stopp=1",
        "eval",
        "plan x --wrld 8",
    ):
        with pytest.raises((AssertionError, typer.BadParameter.__base__)):  # type: ignore[arg-type]
            check(shlex.split(wrong))


def test_pages_with_blocks_to_run_have_a_test_that_runs_them() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests/docs").glob("test_*.py"))
    for page in PAGES:
        if "```console\n" in page.read_text():
            names = (f'"{page.name}"', f"/{page.name}", f'"{page.stem}"')
            assert any(name in tests for name in names), page


def test_every_config_path_in_running_text_exists() -> None:
    sections = "run|model|dataset|store|data_loader|train_module|trainer"
    for page in PAGES:
        if page.name in ("LOG.md", "architecture.md"):
            continue
        text = page.read_text()
        if page.parent.name == "migrate":  # the first cell of a row has the other project's names
            text = re.sub(r"^\|[^|]*\|", "", text, flags=re.MULTILINE)
        for path in re.findall(rf"`(?:--)?((?:{sections})\.[\w.]+)`", text):
            if not path.endswith((".py", ".json", ".jsonl", ".safetensors")) and path not in OTHER:
                given = our_path(path).removesuffix(".type")  # a name of a class may stand there
                assert resolve(given), f"{page.name}: {path}"
