"""`--to beaker`: an experiment on Beaker, with the flags of OLMo-core's launch scripts."""

import contextlib
import time
from collections.abc import Collection, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Literal

from toolkit.commands.launch.containers import Containers, secret_pair, to_yaml
from toolkit.commands.launch.job import Job, plain_name, script_with_config
from toolkit.commands.launch.target import (
    OVER,
    JobStatus,
    LaunchError,
    Record,
    State,
    Submission,
    no_library,
)

_STATES: dict[str, State] = {
    **dict.fromkeys(("submitted", "queued", "initializing", "ready_to_start"), "pending"),
    **dict.fromkeys(("running", "stopping", "uploading_results"), "running"),
    "canceled": "stopped",
    "succeeded": "finished",
    "failed": "failed",
}  # fmt: skip
_NFS = "/net/nfs.cirrascale"
_SECONDS = 2.0
"""Between two looks for a job."""
_START_NANOSECONDS = 90 * 60 * 10**9
"""How long the machines of a run wait for each other."""


class Beaker(Containers, kw_only=True):
    """Beaker, with the account of its own command line or BEAKER_TOKEN."""

    image: str = ""
    """Beaker image that has the toolkit; `docker://NAME` for one of a registry."""
    workspace: str | None = None
    """Workspace, such as ai2/my-team; default: the one of your Beaker config."""
    budget: str | None = None
    """Budget that is charged; default: the workspace's."""
    cluster: tuple[str, ...] = ()
    """Cluster that may run it, such as ai2/jupiter; again for more."""
    priority: Literal["low", "normal", "high", "urgent", "immediate"] = "normal"
    """Priority."""
    preemptible: bool = True
    """Whether others may take the machines, and the run goes on later; `--not-preemptible`."""
    weka: tuple[str, ...] = ()
    """BUCKET, mounted at /weka/BUCKET, or BUCKET:/PATH; again for more."""
    nfs: bool = False
    """Mount the NFS drive."""
    shm: str = "10GiB"
    """Size of /dev/shm."""
    retries: int = 0
    """How often a run that failed is started again."""

    follows: ClassVar[bool] = True
    mount_example: ClassVar[str] = "--weka BUCKET"

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if not self.image:
            yield "image", "name an image that has the toolkit"
        if self.retries < 0:
            yield "retries", f"must be 0 or more, not {self.retries}"
        for value in self.weka:
            bucket, sign, path = value.partition(":")
            if not bucket or (sign and not path.startswith("/")):
                yield "weka", f"write BUCKET or BUCKET:/PATH, not {value!r}"

    def mounts(self) -> list[str]:
        return [path for _, path in self._buckets()] + ([_NFS] if self.nfs else [])

    def _buckets(self) -> list[tuple[str, str]]:
        pairs = (value.partition(":") for value in self.weka)
        return [(bucket, path or f"/weka/{bucket}") for bucket, _, path in pairs]

    def render(self, job: Job) -> str:
        return to_yaml(self.spec(job))

    def spec(self, job: Job) -> dict[str, Any]:
        """The experiment, as Beaker's spec v2 writes it."""
        script = script_with_config(
            job, rank='"$BEAKER_REPLICA_RANK"', head='"$BEAKER_LEADER_REPLICA_HOSTNAME"'
        )
        kind, _, name = self.image.rpartition("://")
        variables = [{"name": n, "secret": s} for n, s in map(secret_pair, self.secret)]
        mounts = [{"mountPath": path, "source": {"weka": b}} for b, path in self._buckets()]
        if self.nfs:
            mounts.append({"mountPath": _NFS, "source": {"hostPath": _NFS}})
        resources: dict[str, Any] = {"sharedMemory": self.shm}
        if self.gpus:
            resources["gpuCount"] = self.gpus
        task: dict[str, Any] = {
            "name": "train",
            "image": {"docker" if kind == "docker" else "beaker": name},
            "command": ["bash", "-c"],
            "arguments": [script],
            "result": {"path": "/results"},
            "resources": resources,
            "context": {"priority": self.priority, "preemptible": self.preemptible},
        }
        if self.cluster:
            task["constraints"] = {"cluster": list(self.cluster)}
        if variables:
            task["envVars"] = variables
        if mounts:
            task["datasets"] = mounts
        if job.nodes > 1:
            task |= {
                "replicas": job.nodes,
                "leaderSelection": True,
                "hostNetworking": True,
                "propagateFailure": True,
                "propagatePreemption": True,
                "synchronizedStartTimeout": _START_NANOSECONDS,
            }
        spec: dict[str, Any] = {"version": "v2", "tasks": [task]}
        if job.description:
            spec["description"] = job.description
        if self.budget is not None:
            spec["budget"] = self.budget
        if self.retries:
            spec["retry"] = {"allowedTaskRetries": self.retries}
        return spec

    def submit(self, job: Job) -> Submission:
        name = plain_name(job.name)
        with self._connected() as client:
            from beaker import BeakerExperimentSpec
            from beaker.exceptions import BeakerExperimentConflict

            spec = BeakerExperimentSpec.from_json(self.spec(job))
            before = self._own(client, name).keys()
            try:
                workload = client.experiment.create(spec=spec, name=name)
            except BeakerExperimentConflict:
                taken = f"beaker: an experiment {name!r} exists; choose another --name"
                raise LaunchError(taken) from None
            except BaseException as error:
                if not _is_refusal(error):
                    self._withdraw(client, name, before)
                raise
            link = ""
            with contextlib.suppress(Exception):  # it runs, whether a browser finds it or not
                link = client.workload.url(workload)
            return Submission((workload.experiment.id,), {}, link=link)

    def _own(self, client: Any, name: str) -> dict[str, Any]:
        """One's own experiments of this name and workspace, those of the last day, by their id."""
        found = client.workload.list(
            author=client.user.get(),
            workspace=client.workspace.get(),
            created_after=datetime.now(UTC) - timedelta(days=1),
            name_or_description=name,
        )
        return {w.experiment.id: w for w in found if w.experiment.name == name}

    def _withdraw(self, client: Any, name: str, before: Collection[str]) -> None:
        """Cancel what was made although the answer was lost: what was not there before."""
        try:
            for identity, workload in self._own(client, name).items():
                if identity not in before:
                    client.workload.cancel(workload)
        except Exception as error:
            raise LaunchError(
                f"beaker: {_one_line(error)}; an experiment {name!r} may have been made all the "
                "same: look for it on Beaker, and cancel it there"
            ) from None

    def status(self, record: Record) -> JobStatus:
        with self._connected() as client:
            return self._status(client, client.workload.get(record.id))

    def _status(self, client: Any, workload: Any) -> JobStatus:
        from beaker import BeakerWorkloadStatus

        name = BeakerWorkloadStatus(workload.status).name
        job = client.workload.get_latest_job(workload)
        detail = name
        if job is not None and job.status.HasField("exit_code"):
            detail += f", exit code {job.status.exit_code}"
        return JobStatus(_STATES.get(name, "unknown"), detail)

    def logs(self, record: Record, *, follow: bool) -> Iterator[str]:
        seen = ""
        while True:
            with self._connected() as client:
                workload = client.workload.get(record.id)
                job = client.workload.get_latest_job(workload)
                if job is not None and job.id != seen:
                    seen = job.id  # after a preemption there is another one
                    for part in client.job.logs(job, follow=follow):
                        yield part.message.decode(errors="replace").rstrip("\n")
                if not follow or self._status(client, client.workload.get(record.id)).state in OVER:
                    return
            time.sleep(_SECONDS)

    def stop(self, record: Record, *, now: bool) -> str:
        with self._connected() as client:
            client.workload.cancel(client.workload.get(record.id))
        return "cancelled; Beaker asks the run to save a checkpoint and end"

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Any]:
        """A client; what it raises becomes one line."""
        try:
            import beaker
            from beaker.exceptions import BeakerError, HTTPError, RequestException, RpcError
        except ImportError:
            raise no_library("beaker-py", "beaker") from None
        overrides = {} if self.workspace is None else {"default_workspace": self.workspace}
        try:
            with beaker.Beaker.from_env(check_for_upgrades=False, **overrides) as client:
                yield client
        except HTTPError as error:
            body = error.response.text if error.response is not None else ""
            raise LaunchError(f"beaker: {_one_line(body or error)}") from None
        except RequestException as error:
            raise LaunchError(f"beaker: does not answer: {_one_line(error)}") from None
        except (BeakerError, RpcError) as error:
            name = type(error).__name__
            raise LaunchError(f"beaker: {name}: {_one_line(error)}") from None


def _is_refusal(error: BaseException) -> bool:
    """Whether Beaker has answered that it makes nothing."""
    from beaker.exceptions import BeakerError, BeakerNotFoundError, BeakerServerError, HTTPError

    if isinstance(error, HTTPError):
        return error.response is not None and error.response.status_code < 500
    # Not found: `create` makes it, then asks for it.
    return isinstance(error, BeakerError) and not isinstance(
        error, BeakerServerError | BeakerNotFoundError
    )


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:500]
