"""Who may import whom: no room imports from a floor above, and the core imports no tools.

Imports inside functions and under TYPE_CHECKING count. What is reached by name ("module:object")
or handed over as a function does not.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import toolkit

ROOT = Path(toolkit.__file__).parent
CORE = (
    ("config", "storage", "errors", "threads", "signals", "parents", "wording"),
    ("models", "optim", "data", "metrics", "runs", "autotune"),
    ("distributed",),
    ("checkpoint",),
    ("launch",),
    ("train",),
    ("experiment",),
)
TOOLS = (("data.prepare",), ("hf", "evaluate"), ("commands",), ("cli", "testing"), ("__main__",))
FLOOR = {room: number for number, rooms in enumerate((*CORE, *TOOLS)) for room in rooms}
NOT_YET: set[tuple[str, str]] = set()
"""(file, room above) that are still to be opened; only ever fewer."""


def room_of(module: str) -> str | None:
    """The longest name of a room that `module` (below `toolkit`) lies in."""
    names = [module.rsplit(".", cut)[0] for cut in range(module.count(".") + 1)]
    return next((name for name in names if name in FLOOR), None)


def imports_of(file: Path) -> Iterator[str]:
    """The modules below `toolkit` that a file names, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("toolkit"):
            for alias in node.names:
                yield f"{node.module}.{alias.name}".removeprefix("toolkit.")
        elif isinstance(node, ast.Import):
            yield from (a.name.removeprefix("toolkit.") for a in node.names if "toolkit." in a.name)


def test_no_room_imports_from_a_floor_above() -> None:
    upwards = set()
    for file in sorted(ROOT.rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        own = room_of(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
        for module in imports_of(file):
            room = room_of(module)
            if own is not None and room is not None and FLOOR[room] > FLOOR[own]:
                upwards.add((name, room))
    assert upwards == NOT_YET


def test_every_room_has_a_floor() -> None:
    rooms = {path.stem for path in ROOT.iterdir() if path.suffix in (".py", "")}
    assert rooms - {"__init__", "__pycache__", "recipes"} <= set(FLOOR)
