"""`toolkit launch`: everything is checked, then the job is submitted, whole or not at all."""

import contextlib
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from toolkit import signals
from toolkit.commands.dry_run import check
from toolkit.commands.launch.job import Job, Member, port_of
from toolkit.commands.launch.options import parse_options
from toolkit.commands.launch.records import read_record, target_of, write_record
from toolkit.commands.launch.target import OVER, Record, Target, target_class
from toolkit.commands.load import check_data_files, split_words
from toolkit.distributed.ranks import ENGINE
from toolkit.errors import ConfigError, RunError, ToolkitError
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load import load_experiment, with_origins
from toolkit.experiment.python_config import folder_of_modules
from toolkit.runs.environment import describe_git
from toolkit.runs.files import RUN_FILES
from toolkit.runs.lock import is_locked, utc_now
from toolkit.runs.registry import choose_run_name, is_run, resolve_run_folder
from toolkit.storage.atomic import encode_json, write_atomic

_MODULE = re.compile(r'"([A-Za-z_]\w*)[\w.]*:[A-Za-z_][\w.]*"', re.ASCII)
"""A class that a config names, "module:Class"."""
_ORDERS = ("status", "logs", "stop")


class Plan(NamedTuple):
    """A job that is ready to be submitted."""

    to: str
    """The target as it was named."""
    target: Target
    job: Job
    homes: tuple[Path, ...]
    """For each run the folder of this machine that remembers its job: the run folder, where this
    machine sees it."""

    def render(self) -> str:
        """What would be submitted."""
        return self.target.render(self.job)


def plan(words: Sequence[str], to: str, *, debug: bool = False, **known: Any) -> Plan:
    """The job that the words of a command line describe. Nothing is written, no scheduler is asked.

    Args:
        words: CONFIG, options of the target, overrides, in any order.
        to: name of the target.
        known: `name`, `save_folder`, `base` and the other options of `toolkit train`.

    Raises:
        ConfigError: an option, the config, or the two together are wrong.
    """
    kind = target_class(to)
    target, rest = parse_options(list(words), kind)
    target.check()
    source, flags = split_words(rest[0] if rest else "", rest[1:], "CONFIG")
    if source in _ORDERS:
        run = flags[0] if flags else "RUN"
        raise ConfigError(f"{source!r} is no config; type: toolkit jobs {source} {run}")
    array, otherwise = target.members(), choose_run_name()
    members, homes, environ = [], [], _environ(target)
    for number, own in enumerate(array, 1):
        suffix = f"-{number}" if len(array) > 1 else ""
        with _about(own):
            names = (otherwise, suffix)
            config, origins, folder = _load(target, source, [*flags, *own], known, names, environ)
        text = encode_json(with_origins(config, origins)).decode().rstrip()
        members.append(Member(folder, text))
        homes.append(_home(target, config, folder))
    label = homes[0].name.removesuffix("-1") if len(array) > 1 else homes[0].name
    is_elsewhere = target.is_elsewhere
    job = Job(
        name=label,
        description=config.description,
        members=tuple(members),
        nodes=target.num_nodes,
        processes=target.num_processes,
        engine=target.engine,
        interface=target.interface,
        environment=target.environment,
        setup=(*target.setup, *target.code_lines(), *_module_lines(target, source, members)),
        python=target.python or ("python" if is_elsewhere else sys.executable),
        workdir=getattr(target, "workdir", None) if is_elsewhere else os.getcwd(),
        port=target.port or port_of(members[0].folder),
        debug=debug,
    )
    return Plan(to, target, job, tuple(homes))


def launch(plan: Plan) -> list[Record]:
    """Submit the job; a record for each of its runs, which is kept with it. Raises ToolkitError:
    the target refuses, and nothing of the job is left there or here."""
    for home in plan.homes:
        if plan.target.is_elsewhere and is_run(home):
            raise RunError(f"{home}: is a run of this machine; choose another --name for the job")
        _check_free(home)
    submitted = utc_now()
    # Ctrl-C comes before or after: a job that is half told nobody finds again.
    with signals.holding_back(), _prepared(plan):
        answer = plan.target.submit(plan.job)
        records = [
            Record(
                target=plan.to, options=plan.target.to_dict(), id=one, link=answer.link,
                folder=member.folder, submitted=submitted, nodes=plan.job.nodes,
                details=answer.details,
            )
            for one, member in zip(answer.ids, plan.job.members, strict=True)
        ]  # fmt: skip
        try:
            for home, record in zip(plan.homes, records, strict=True):
                write_record(home, record)
        except BaseException:
            for record in records:  # nobody could find it again
                with contextlib.suppress(ToolkitError):
                    plan.target.stop(record, now=True)
            raise
    return records


def _load(
    target: Target,
    source: str,
    overrides: Sequence[str],
    known: Mapping[str, Any],
    names: tuple[str, str],
    environ: Mapping[str, str],
) -> tuple[ExperimentConfig, dict[str, str], str]:
    """One run's config as it is stored, checked as `toolkit train --dry-run` does it, the origins
    of its values, and its folder. `names`: the run's name where it is given none, and what tells it
    from the other runs of an array."""
    here, (otherwise, suffix) = not target.is_elsewhere, names
    loaded = load_experiment(
        source,
        overrides,
        {key: value for key, value in known.items() if key != "base"},
        base=known.get("base"),
        starts=here,
        environ=environ,
        check_data=check_data_files if here else None,
    )
    run = loaded.config.run
    if here and run.save_folder is not None and "://" in run.save_folder:
        raise ConfigError(
            f"give the folder that the machines share, and --run.mirror={run.save_folder}",
            key="--save-folder",
        )
    if run.save_folder is not None:
        changes: dict[str, Any] = {"save_folder": run.save_folder + suffix}
    elif here:
        changes = {"name": f"{run.name or otherwise}{suffix}"}
    else:
        raise ConfigError(
            "say where the containers write the run: a folder on a mount, or a URL",
            key="--save-folder",
        )
    config = loaded.config.replace(run=run.replace(**changes))
    stored = loaded.stored.replace(run=loaded.stored.run.replace(**changes))
    folder = (
        config.run.save_folder if target.is_elsewhere else str(resolve_run_folder(config.run, ""))
    )
    assert folder is not None
    if "\n" in folder:
        raise ConfigError("holds the end of a line", key="--save-folder")
    for key, value in (("--save-folder", folder), ("--work-dir", config.run.work_dir)):
        if target.is_elsewhere and ".." in (value or "").split("/"):
            raise ConfigError(f"{value}: write it without `..`", key=key)
    target.check_folder(folder, config.run.work_dir)
    check(config, environ, loaded.origins, elsewhere=target.is_elsewhere)
    return stored, loaded.origins, folder


def _module_lines(target: Target, source: str, members: Sequence[Member]) -> tuple[str, ...]:
    """Lines of shell by which a job finds the modules beside the Python file that its config is
    from. Raises ConfigError: its containers do not get them."""
    if (folder := folder_of_modules(source)) is None:
        return ()
    place = shlex.quote(str(folder))
    if target.is_elsewhere:
        named = {name for member in members for name in _MODULE.findall(member.config)}
        own = sorted(n for n in named if (folder / n).is_dir() or (folder / f"{n}.py").is_file())
        if not own:
            return ()
        repository = describe_git()["repository"] if getattr(target, "git", False) else None
        if repository is None or not folder.is_relative_to(repository):
            raise ConfigError(
                f"names classes of {folder / own[0]}, which the containers do not have; bring it "
                "there with --git, or install it in the image and name a config in JSON"
            )
        place = f'"$PWD"/{shlex.quote(str(folder.relative_to(repository)))}'
    return (f"export PYTHONPATH={place}${{PYTHONPATH:+:$PYTHONPATH}}",)


def _environ(target: Target) -> dict[str, str]:
    """What the launcher of each machine will tell its processes, as far as layouts look at it."""
    found: dict[str, str] = {} if target.engine is None else {ENGINE: target.engine}
    if (size := target.num_nodes * target.num_processes) > 1:
        local = str(target.num_processes)
        found |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": local, "RANK": "0"}
    return found


@contextlib.contextmanager
def _about(own: Sequence[str]) -> Iterator[None]:
    """Name the run of an array that an error is about."""
    try:
        yield
    except ToolkitError as error:
        if own and not error.key:
            error.args = (f"{error.problem} (run of the array with {' '.join(own)})",)
        raise


def _home(target: Target, config: ExperimentConfig, folder: str) -> Path:
    """The folder of this machine that remembers the job of a run."""
    if not target.is_elsewhere:
        return Path(folder)
    name = config.run.name or folder.rstrip("/").rpartition("/")[2]
    return resolve_run_folder(config.run.replace(save_folder=None), name)


def _check_free(home: Path) -> None:
    """Raise RunError where the run has a writer, or a job that is not over."""
    if is_locked(home):
        raise RunError(f"{home}: another process is writing this run; stop it first")
    record = read_record(home)
    if record is None:
        return
    status = target_of(record).status(record)
    if status.state not in OVER:
        raise RunError(
            f"{home}: has a job already, {record.target} {record.id} ({status.state}); "
            f"`toolkit jobs stop {home}` ends it"
        )


@contextlib.contextmanager
def _prepared(plan: Plan) -> Iterator[None]:
    """The folders and configs that the job needs on this machine; gone again where the block
    fails."""
    before: dict[Path, bytes | None] = {}
    made: list[Path] = []
    try:
        for home, member in zip(plan.homes, plan.job.members, strict=True):
            files = (RUN_FILES.launch, RUN_FILES.launch_config, RUN_FILES.launch_script)
            for path in (home / name for name in files):
                before[path] = path.read_bytes() if path.is_file() else None
            needs = [home / RUN_FILES.metadata]
            needs += [] if plan.target.is_elsewhere else [home / RUN_FILES.logs]
            for folder in needs:
                made += _make(folder)
            if not plan.target.is_elsewhere:
                write_atomic(home / RUN_FILES.launch_config, member.config.encode() + b"\n")
        yield
    except BaseException as error:
        for path, data in before.items():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True) if data is None else path.write_bytes(data)
        logs = [home / RUN_FILES.logs for home in plan.homes]
        if not _has_log(plan, error):
            for folder in reversed(made):
                with contextlib.suppress(OSError):
                    shutil.rmtree(folder) if folder in logs else folder.rmdir()
        if isinstance(error, OSError):
            raise RunError(f"{error.filename or plan.homes[0]}: {error.strerror}") from None
        raise


def _has_log(plan: Plan, error: BaseException) -> bool:
    """Whether the error names a log, which must stay then."""
    return any(f"{home / RUN_FILES.logs}" in str(error) for home in plan.homes)


def _make(folder: Path) -> list[Path]:
    """Make `folder`; the folders that were not there before, outer ones first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing
