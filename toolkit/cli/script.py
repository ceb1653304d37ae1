"""`toolkit.main(build_config)`: a Python file that is its own command line."""

import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from toolkit.cli import main as command_line
from toolkit.config.types import nearest
from toolkit.errors import EXIT_BAD_INPUT
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.python_config import is_being_imported

_VERBS = ("train", "resume", "prepare", "plan", "schedule", "launch")
_WORD = re.compile(r"\w[\w.-]*")


def main(build_config: Callable[[], ExperimentConfig | Mapping[str, Any] | str]) -> None:
    """Let the file that calls this be started like `toolkit train`, with all of its flags.

    `build_config` is a function of the file without parameters: it returns a config, a mapping of
    its values, or the name of a recipe or JSON file. Flags count over what it returns. Call `main`
    at the end of the file::

        if __name__ == "__main__":
            toolkit.main(build_config)

    `python FILE.py --name first` is then `toolkit train FILE.py --name first`, under launchers and
    with `--processes` too. `python FILE.py VERB ...` is another verb: `prepare`, `plan` and
    `schedule` of this config, or `resume RUN_DIR`, which finds the classes of the file wherever it
    is called. Ends the process, with the exit code of `toolkit`.
    """
    if is_being_imported():
        return
    try:
        file = inspect.getsourcefile(inspect.unwrap(build_config))
    except TypeError:  # a partial, an object
        file = None
    name = getattr(build_config, "__qualname__", "")
    if file is None or not name.isidentifier():
        _refuse("toolkit.main: give a function that is defined at the top of the file")
    source = Path(file).resolve()
    # Workers and resumed runs find the classes of the file too.
    others = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(source.parent), *([others] if others else [])])
    words = sys.argv[1:]
    if words and words[0] not in _VERBS and _WORD.fullmatch(words[0]):
        hint = nearest(words[0], _VERBS)
        hint = f"did you mean {hint}? " if hint else ""
        _refuse(
            f"unexpected argument {words[0]!r}; {hint}{source.name} takes {', '.join(_VERBS)}, or "
            "flags alone; other verbs are those of `toolkit`, and a run's name goes behind --name"
        )
    verb = words.pop(0) if words and words[0] in _VERBS else "train"
    config = [] if verb == "resume" else [f"{source}:{name}"]
    sys.argv = ["toolkit", verb, *config, *words]
    command_line.main()


def _refuse(problem: str) -> NoReturn:
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)
