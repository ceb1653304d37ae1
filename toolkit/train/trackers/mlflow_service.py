"""MLflow, whose stores neither say which step they have nor refuse one that is there."""

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from toolkit.train.trackers.config import MLflowConfig
from toolkit.train.trackers.rows import Row
from toolkit.train.trackers.service import Opened, Outcome, Service, cells, flat, parts

_LONGEST_PARAM = 5_000
"""Characters that MLflow's stores take as the value of a parameter or tag, with room to spare."""
_MOST_METRICS, _MOST_PARAMS = 1_000, 100
"""Of one request to MLflow."""
_NOT_IN_MLFLOW = re.compile(r"[^\w\-. :/]")


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
        is_there = run_id is not None and self._continue(run_id)
        self._id = run_id if is_there else self._find_or_create()
        return Opened(self._id, None if is_there else -1, uri)

    def _continue(self, run_id: str) -> bool:
        """Whether the store has the run: a folder may have stayed on another machine."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

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
        for some in parts(params, _MOST_PARAMS):
            self._client.log_batch(self._id, params=some)
        for some in parts(tags, _MOST_PARAMS):
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
        for some in parts(metrics, _MOST_METRICS):
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
