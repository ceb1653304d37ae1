"""The services: what of each library is called, from the sender's process.

All are used directly, and not through Accelerate's trackers: those need torch, which a process that
only sends has no use for, and cannot tell which step a service has already.
"""

import contextlib
import importlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from toolkit.train.trackers.config import (
    AimConfig,
    ClearMLConfig,
    CometConfig,
    MLflowConfig,
    SwanLabConfig,
    TrackerConfig,
    TrackioConfig,
    WandBConfig,
)
from toolkit.train.trackers.rows import Row
from toolkit.train.trackers.service import Opened, Outcome, Service, TrackedRun, cells, flat
from toolkit.train.trackers.wandb_files import last_step_in

_LONGEST_PARAM = 5_000
"""Characters that MLflow's stores take as the value of a parameter or tag, with room to spare."""
_MOST_METRICS, _MOST_PARAMS = 1_000, 100
"""Of one request to MLflow."""
_NOT_IN_MLFLOW = re.compile(r"[^\w\-. :/]")


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


class Trackio(Service):
    """Runs have names; one that is taken gets a part of the key at its end."""

    config: TrackioConfig

    def open(self, run_id: str | None) -> Opened:
        config = self.config
        if config.folder is not None:
            os.environ["TRACKIO_DIR"] = str(Path(config.folder).expanduser().absolute())
        import trackio

        def init(name: str, resume: str) -> Any:
            return trackio.init(
                project=self.project,
                name=name,
                group=config.group,
                space_id=config.space_id,
                resume=resume,
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

        self._run: Any = init(run_id or self.name, "must" if run_id else "allow")
        if run_id is None and self._run._next_step > 0:  # another run's
            self._run = init(f"{self.name}-{self.run.key[:6]}", "allow")
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


class MLflow(Service):
    """Metrics have a step and a time. A store takes the same step twice, so what may be there
    already is asked for."""

    config: MLflowConfig

    def open(self, run_id: str | None) -> Opened:
        own = (self.run.folder.parent / "mlruns").as_uri()
        uri = self.config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or own
        if uri.startswith("file:") or "://" not in uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        # The sender tries again itself.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        self._client: Any = MlflowClient(uri)
        if run_id is None:
            run_id = self._find_or_create()
        else:
            self._client.update_run(run_id, status="RUNNING")
        self._id = run_id
        return Opened(run_id, None, uri)

    def _find_or_create(self) -> str:
        client, mine = self._client, f"tags.`toolkit.key` = '{self.run.key}'"
        experiment = client.get_experiment_by_name(self.project)
        place = experiment.experiment_id if experiment else client.create_experiment(self.project)
        found = client.search_runs([place], mine, max_results=1)
        if found:
            return found[0].info.run_id
        tags = {"toolkit.key": self.run.key} | dict.fromkeys(self.config.tags, "true")
        if self.config.notes:
            tags["mlflow.note.content"] = self.config.notes
        return client.create_run(place, run_name=self.name, tags=tags).info.run_id

    def describe(self, facts: dict[str, Any]) -> None:
        from mlflow.entities import Param, RunTag

        before = self._client.get_run(self._id).data.params
        params, tags = [], []
        for name, value in flat(facts).items():
            name, value = _NOT_IN_MLFLOW.sub("_", name)[:250], value[:_LONGEST_PARAM]
            if name not in before:
                params.append(Param(name, value))
            elif before[name] != value:  # which cannot be changed
                tags.append(RunTag(f"now.{name}", value))
        if commit := facts.get("git", {}).get("commit"):
            tags.append(RunTag("mlflow.source.git.commit", commit))
        for some in _parts(params, _MOST_PARAMS):
            self._client.log_batch(self._id, params=some)
        for some in _parts(tags, _MOST_PARAMS):
            self._client.log_batch(self._id, tags=some)

    def send(self, rows: Sequence[Row], *, again: bool) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(_NOT_IN_MLFLOW.sub("_", name), value, int(1e3 * row.time), row.step)
            for row in rows
            for name, value in row.values.items()
        ]
        if again:
            history = self._client.get_metric_history
            names = {metric.key for metric in metrics}
            there = {(name, m.step) for name in names for m in history(self._id, name)}
            metrics = [m for m in metrics if (m.key, m.step) not in there]
        for some in _parts(metrics, _MOST_METRICS):
            self._client.log_batch(self._id, metrics=some)
        for row in rows:
            if row.samples:
                text = "\n\n".join(prompt + text for prompt, text in cells(row))
                with self._samples_may_fail():
                    self._client.log_text(self._id, text, f"samples/step{row.step}.txt")

    @contextlib.contextmanager
    def _samples_may_fail(self) -> Iterator[None]:
        """Artifacts have a store of their own, which may need what is not installed here."""
        try:
            yield
        except Exception as error:
            self.tell(f"a sample is not stored: {type(error).__name__}: {error}")

    def finish(self, outcome: Outcome) -> None:
        status = {"finished": "FINISHED", "failed": "FAILED"}.get(outcome, "KILLED")
        self._client.set_terminated(self._id, status)


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
        aim = importlib.import_module("aim")
        repo = self.config.repo or str(self.run.folder.parent)
        self._run = aim.Run(
            run_hash=run_id,
            repo=repo,
            experiment=self.project,
            system_tracking_interval=None,
            log_system_params=False,
            capture_terminal_logs=False,
        )
        self._run.name = self.name
        if self.config.notes:
            self._run.description = self.config.notes
        for tag in self.config.tags if run_id is None else ():
            self._run.add_tag(tag)
        return Opened(self._run.hash, None, repo)

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


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[first : first + size] for first in range(0, len(items), size))
