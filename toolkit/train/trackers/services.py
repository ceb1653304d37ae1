"""The services: what of each library is called, from the sender's process.

All are used directly, and not through Accelerate's trackers: those need torch, which a process that
only sends has no use for, and cannot tell which step a service has already.
"""

import contextlib
import functools
import importlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from toolkit.train.trackers.config import (
    AimConfig,
    ClearMLConfig,
    CometConfig,
    SwanLabConfig,
    TrackerConfig,
    TrackioConfig,
    WandBConfig,
)
from toolkit.train.trackers.mlflow_service import MLflow
from toolkit.train.trackers.rows import Row
from toolkit.train.trackers.service import Opened, Outcome, Service, TrackedRun, cells, flat
from toolkit.train.trackers.wandb_files import last_step_in


class WandB(Service):
    """`_step` is the step of training. The server takes each step once, in order."""

    config: WandBConfig

    def open(self, run_id: str | None) -> Opened:
        import wandb

        run_id, config = run_id or self.run.key, self.config
        mode: Any = config.mode_in(os.environ)
        self._run: Any = wandb.init(
            dir=str(self.run.scratch),
            id=run_id,
            resume="allow",
            mode=mode,
            name=self.name,
            project=self.project,
            entity=config.entity,
            group=config.group,
            tags=list(config.tags) or None,
            notes=config.notes,
            settings=wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                disable_code=True,
                x_disable_meta=True,
                x_disable_stats=True,  # the system stream has them
            ),
        )
        _yield_processors()
        if mode != "online":
            return Opened(run_id, last_step_in(self.run.scratch / "wandb", run_id), self._run.dir)
        return Opened(run_id, self._run.starting_step - 1, self._run.url)

    def describe(self, facts: dict[str, Any]) -> None:
        self._run.config.update(facts, allow_val_change=True)

    def send(self, rows: Sequence[Row], *, again: bool) -> None:
        import wandb

        for row in rows:
            values: dict[str, Any] = dict(row.values)
            if row.samples:
                values["samples"] = wandb.Table(columns=["prompt", "text"], data=cells(row))
            self._run.log(values, step=row.step, commit=True)

    def finish(self, outcome: Outcome) -> None:
        if outcome == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if outcome == "finished" else 1)


def _yield_processors() -> None:
    """Give W&B's own process, which has a session of its own, the lowest weight against training
    (`man 7 sched`, "The autogroup feature"); where sessions do not count, it inherited ours."""
    for child in psutil.Process().children():
        with contextlib.suppress(OSError):
            Path(f"/proc/{child.pid}/autogroup").write_text("19")


class Trackio(Service):
    """Runs have names; one that is taken gets a part of the key at its end."""

    config: TrackioConfig

    def open(self, run_id: str | None) -> Opened:
        config = self.config
        if config.folder is not None:
            os.environ["TRACKIO_DIR"] = str(Path(config.folder).expanduser().absolute())
        import trackio

        init = functools.partial(
            trackio.init,
            project=self.project,
            group=config.group,
            space_id=config.space_id,
            resume="allow",  # on a machine without its database, all is sent again
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._run: Any = init(name=run_id or self.name)
        if run_id is None and self._run._next_step > 0:  # another run's
            self._run = init(name=f"{self.name}-{self.run.key[:6]}")
        return Opened(self._run.name, self._run._next_step - 1, config.space_id or config.folder)

    def describe(self, facts: dict[str, Any]) -> None:
        own = {"tags": list(self.config.tags), "notes": self.config.notes}
        self._run.config.update(json.loads(json.dumps(facts | own, default=str)))

    def send(self, rows: Sequence[Row], *, again: bool) -> None:
        import trackio

        for row in rows:
            values: dict[str, Any] = dict(row.values)
            if row.samples:
                values["samples"] = trackio.Table(columns=["prompt", "text"], data=cells(row))
            self._run.log(values, step=row.step)

    def finish(self, outcome: Outcome) -> None:
        self._run.finish()


class Comet(Service):
    config: CometConfig

    def open(self, run_id: str | None) -> Opened:
        comet_ml = importlib.import_module("comet_ml")
        config = self.config
        self._run = comet_ml.start(
            workspace=config.entity,
            project_name=self.project,
            experiment_key=run_id or self.run.key,
            mode="get_or_create",
            online=config.mode == "online",
            experiment_config=comet_ml.ExperimentConfig(
                name=self.name,
                tags=list(config.tags),
                offline_directory=str(self.run.scratch / "comet"),
                log_code=False,
                log_graph=False,
                log_git_metadata=False,
                log_git_patch=False,
                log_env_details=False,
                auto_param_logging=False,
                auto_metric_logging=False,
                auto_output_logging=False,
                parse_args=False,
            ),
        )
        return Opened(self._run.get_key(), None, self._run.url)

    def describe(self, facts: dict[str, Any]) -> None:
        self._run.log_parameters(flat(facts))
        if self.config.notes:
            self._run.log_other("notes", self.config.notes)

    def send(self, rows: Sequence[Row], *, again: bool) -> None:
        for row in rows:
            self._run.log_metrics(row.values, step=row.step)
            for prompt, text in cells(row):
                self._run.log_text(prompt + text, step=row.step)
        self._run.flush()

    def finish(self, outcome: Outcome) -> None:
        self._run.log_other("outcome", outcome)
        self._run.end()


class ClearML(Service):
    """A scalar of the same step replaces the one before."""

    config: ClearMLConfig

    def open(self, run_id: str | None) -> Opened:
        Task = importlib.import_module("clearml").Task
        config = self.config
        if config.mode == "offline":
            Task.set_offline(offline_mode=True)
            run_id = None  # a session cannot be continued, only imported after the one before
        self._task = Task.init(
            project_name=self.project,
            task_name=self.name,
            tags=list(config.tags),
            reuse_last_task_id=run_id or False,
            # 0: steps are ours, and not counted from the last one there.
            continue_last_task=0 if run_id else False,
            auto_connect_arg_parser=False,
            auto_connect_frameworks=False,
            auto_connect_streams=False,
            auto_resource_monitoring=False,
        )
        return Opened(self._task.id, None, self._task.get_output_log_web_page())

    def describe(self, facts: dict[str, Any]) -> None:
        self._task.connect_configuration(facts, name="run")
        if self.config.notes:
            self._task.set_comment(self.config.notes)

    def send(self, rows: Sequence[Row], *, again: bool) -> None:
        logger = self._task.get_logger()
        for row in rows:
            for name, value in row.values.items():
                title, _, series = name.partition("/")
                logger.report_scalar(title, series, value=value, iteration=row.step)
            for prompt, text in cells(row):
                logger.report_text(f"sample at step {row.step}: {prompt}{text}")
        self._task.flush()

    def finish(self, outcome: Outcome) -> None:
        if outcome == "failed":
            self._task.mark_failed(force=True)
        elif outcome != "finished":
            self._task.mark_stopped(force=True)
        self._task.close()


class SwanLab(Service):
    config: SwanLabConfig

    def open(self, run_id: str | None) -> Opened:
        swanlab, config = importlib.import_module("swanlab"), self.config
        run_id = run_id or self.run.key[:21]
        again = {"id": run_id, "resume": "allow"} if config.mode == "cloud" else {}
        self._run = swanlab.init(
            project=self.project,
            workspace=config.entity,
            experiment_name=self.name,
            description=config.notes,
            group=config.group,
            tags=list(config.tags),
            mode=config.mode,
            logdir=str(self.run.scratch / "swanlab"),
            **again,
        )
        return Opened(run_id)

    def describe(self, facts: dict[str, Any]) -> None:
        importlib.import_module("swanlab").config.update(flat(facts))

    def send(self, rows: Sequence[Row], *, again: bool) -> None:
        Text = importlib.import_module("swanlab").Text
        for row in rows:
            values: dict[str, Any] = dict(row.values)
            if row.samples:
                values["samples"] = [Text(text, caption=prompt) for prompt, text in cells(row)]
            self._run.log(values, step=row.step)

    def finish(self, outcome: Outcome) -> None:
        importlib.import_module("swanlab").finish()


class Aim(Service):
    """A value of the same step replaces the one before."""

    config: AimConfig

    def open(self, run_id: str | None) -> Opened:
        repo, last_step = self.config.repo or str(self.run.folder.parent), None
        new = functools.partial(
            importlib.import_module("aim").Run,
            repo=repo,
            experiment=self.project,
            system_tracking_interval=None,
            log_system_params=False,
            capture_terminal_logs=False,
        )
        try:
            self._run = new(run_hash=run_id)
        except Exception as error:
            if type(error).__name__ != "MissingRunError":
                raise
            run_id, last_step = None, -1  # the repository stayed on another machine
            self._run = new(run_hash=None)
        self._run.name = self.name
        if self.config.notes:
            self._run.description = self.config.notes
        for tag in self.config.tags if run_id is None else ():
            self._run.add_tag(tag)
        return Opened(self._run.hash, last_step, repo)

    def describe(self, facts: dict[str, Any]) -> None:
        self._run["run"] = json.loads(json.dumps(facts, default=str))

    def send(self, rows: Sequence[Row], *, again: bool) -> None:
        Text = importlib.import_module("aim").Text
        for row in rows:
            for name, value in row.values.items():
                self._run.track(value, name=name, step=row.step)
            for prompt, text in cells(row):
                self._run.track(Text(prompt + text), name="samples", step=row.step)

    def finish(self, outcome: Outcome) -> None:
        self._run["outcome"] = outcome
        self._run.close()


SERVICES: dict[str, type[Service]] = {
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
    "comet": Comet,
    "clearml": ClearML,
    "swanlab": SwanLab,
    "aim": Aim,
}
"""Name in `trainer.callbacks` -> service."""


def open_service(config: TrackerConfig, run: TrackedRun, tell: Callable[[str], object]) -> Service:
    """The service of a config, not opened yet."""
    return SERVICES[config.field](config, run, tell)
