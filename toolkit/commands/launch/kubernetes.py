"""`--to kubernetes`: a JobSet, or a PyTorchJob of Kubeflow's training operator.

A JobSet is the default: it restarts all machines of a run together, and leaves a run whose input is
bad alone. Both are one object, so a job is there whole or not at all.
"""

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from toolkit.commands.launch.containers import Containers, mount_problems, secret_pair, to_yaml
from toolkit.commands.launch.job import Job, script_with_config
from toolkit.commands.launch.target import (
    OVER,
    JobStatus,
    LaunchError,
    Record,
    State,
    Submission,
    no_library,
)
from toolkit.errors import EXIT_BAD_INPUT

_NAME = re.compile(r"[^a-z0-9]+")
_ERRNO = re.compile(r"\[Errno \d+\] ")
_LONGEST_NAME = 46
"""The name of a pod's host, which is longer by some characters, has 63 at most."""
_KINDS = {
    "jobset": ("jobset.x-k8s.io", "v1alpha2", "jobsets", "jobset.sigs.k8s.io/jobset-name"),
    "pytorchjob": ("kubeflow.org", "v1", "pytorchjobs", "training.kubeflow.org/job-name"),
}
"""Kind -> group, version, name of the collection, label of its pods."""
_CONDITIONS: dict[str, State] = {
    "Completed": "finished",
    "Succeeded": "finished",
    "Failed": "failed",
    "Suspended": "pending",
}
_SECONDS = 2.0
"""Between two looks for a pod."""


class Kubernetes(Containers, kw_only=True):
    """A Kubernetes cluster, through your kubeconfig."""

    image: str = ""
    """Image that has the toolkit."""
    kind: Literal["jobset", "pytorchjob"] = "jobset"
    """What is made: a JobSet, or a PyTorchJob."""
    namespace: str | None = None
    """Namespace; default: the one of the kubeconfig's context, else `default`."""
    context: str | None = None
    """Context of the kubeconfig; default: the current one."""
    gpu_resource: str = "nvidia.com/gpu"
    """What the cluster calls a GPU."""
    cpu: str | None = None
    """CPUs of each machine, such as 32 or 500m."""
    memory: str | None = None
    """Memory of each machine, such as 500Gi."""
    shm: str = "16Gi"
    """Size of /dev/shm, which NCCL and data loaders use; part of the memory."""
    volume: tuple[str, ...] = ()
    """CLAIM:/PATH mounts a PersistentVolumeClaim, /HOST:/PATH a folder of the machine; again for
    more."""
    resource: tuple[str, ...] = ()
    """NAME=AMOUNT, a further resource, such as rdma/ib=1; again for more."""
    env_from: tuple[str, ...] = ()
    """SECRET whose keys all become variables; again for more."""
    service_account: str | None = None
    """Service account of the pods."""
    image_pull_secret: str | None = None
    """Secret that the image is pulled with."""
    node_selector: tuple[str, ...] = ()
    """LABEL=VALUE that machines must have; again for more."""
    toleration: tuple[str, ...] = ()
    """KEY, KEY=VALUE or KEY=VALUE:EFFECT of a taint that does not matter; again for more."""
    priority_class: str | None = None
    """Priority class of the pods."""
    queue: str | None = None
    """Local queue of Kueue."""
    retries: int = 3
    """How often a run that failed or lost a machine is started again."""
    grace: int = 300
    """Seconds that a run has to save when it is stopped or its machine is taken away."""

    mount_example: ClassVar[str] = "--volume CLAIM:/PATH"

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        if not self.image:
            yield "image", "name an image that has the toolkit"
        yield from mount_problems("volume", self.volume)
        for name in ("node_selector", "resource"):
            for pair in getattr(self, name):
                if not all(pair.partition("=")):
                    yield name, f"write NAME=VALUE, not {pair!r}"
        for given in self.secret:
            _, secret = secret_pair(given)
            if "=" not in given or not all(secret.partition("/")):
                yield "", f"after --secret, write NAME=SECRET/KEY, not {given!r}"
        for name in ("retries", "grace"):
            if getattr(self, name) < 0:
                yield name, f"must be 0 or more, not {getattr(self, name)}"

    def mounts(self) -> list[str]:
        return [value.rpartition(":")[2] for value in self.volume]

    def render(self, job: Job) -> str:
        return to_yaml(self.manifest(job))

    def manifest(self, job: Job) -> dict[str, Any]:
        """The object that is made."""
        name = name_of(job)
        group, version, _, _ = _KINDS[self.kind]
        labels = {"app.kubernetes.io/managed-by": "toolkit"}
        if self.queue is not None:
            labels["kueue.x-k8s.io/queue-name"] = self.queue
        is_jobset = self.kind == "jobset"
        metadata: dict[str, Any] = {"name": name, "labels": labels}
        if self.namespace is not None:
            metadata["namespace"] = self.namespace
        return {
            "apiVersion": f"{group}/{version}",
            "kind": "JobSet" if is_jobset else "PyTorchJob",
            "metadata": metadata,
            "spec": self._jobset(job, name) if is_jobset else self._pytorchjob(job, name),
        }

    def _jobset(self, job: Job, name: str) -> dict[str, Any]:
        pod = self._pod(job, rank='"$JOB_COMPLETION_INDEX"', head=f"{name}-node-0-0.{name}")
        failing = {"containerName": "pytorch", "operator": "In", "values": [EXIT_BAD_INPUT]}
        bad_input = {"name": "badinput", "action": "FailJobSet"}
        template = {
            "parallelism": job.nodes,
            "completions": job.nodes,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": failing}]},
            "template": {"spec": {"restartPolicy": "Never", **pod}},
        }
        return {
            "network": {"enableDNSHostnames": True, "subdomain": name},
            "failurePolicy": {
                "maxRestarts": self.retries,
                "rules": [{**bad_input, "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": template}}],
        }

    def _pytorchjob(self, job: Job, name: str) -> dict[str, Any]:
        # The operator's RANK is the number of the pod; no rank is told to the launcher.
        rank = '"$NODE_RANK"'
        pod = self._pod(job, rank=rank, head=f"{name}-master-0", first=_FORGET)
        restart = "OnFailure" if self.retries else "Never"
        replica = {"restartPolicy": restart, "template": {"spec": pod}}
        replicas = {"Master": {"replicas": 1, **replica}}
        if job.nodes > 1:
            replicas["Worker"] = {"replicas": job.nodes - 1, **replica}
        policy = {"backoffLimit": self.retries, "cleanPodPolicy": "None"}
        return {"runPolicy": policy, "pytorchReplicaSpecs": replicas}

    def _pod(self, job: Job, *, rank: str, head: str, first: str = "") -> dict[str, Any]:
        amounts = {self.gpu_resource: str(self.gpus)} if self.gpus else {}
        amounts |= {n: v for n, v in (("cpu", self.cpu), ("memory", self.memory)) if v is not None}
        amounts |= dict(pair.split("=", 1) for pair in self.resource)
        volumes, mounts = self._volumes()
        container: dict[str, Any] = {
            "name": "pytorch",
            "image": self.image,
            "command": ["bash", "-c"],
            "args": [first + script_with_config(job, rank=rank, head=head)],
        }
        if self.secret:
            container["env"] = [_from_secret(given) for given in self.secret]
        if self.env_from:
            container["envFrom"] = [{"secretRef": {"name": name}} for name in self.env_from]
        if amounts:
            container["resources"] = {"requests": amounts, "limits": dict(amounts)}
        container["volumeMounts"] = mounts
        pod: dict[str, Any] = {"terminationGracePeriodSeconds": self.grace}
        if self.service_account is not None:
            pod["serviceAccountName"] = self.service_account
        if self.image_pull_secret is not None:
            pod["imagePullSecrets"] = [{"name": self.image_pull_secret}]
        if self.priority_class is not None:
            pod["priorityClassName"] = self.priority_class
        if self.node_selector:
            pod["nodeSelector"] = dict(pair.split("=", 1) for pair in self.node_selector)
        if self.toleration:
            pod["tolerations"] = [_toleration(text) for text in self.toleration]
        return {**pod, "containers": [container], "volumes": volumes}

    def _volumes(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        volumes: list[dict[str, Any]] = [
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": self.shm}}
        ]
        mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
        for number, value in enumerate(self.volume):
            what, _, path = value.rpartition(":")
            source: dict[str, Any] = {"persistentVolumeClaim": {"claimName": what}}
            if what.startswith("/"):
                source = {"hostPath": {"path": what}}
            volumes.append({"name": f"volume-{number}", **source})
            mounts.append({"name": f"volume-{number}", "mountPath": path})
        return volumes, mounts

    def submit(self, job: Job) -> Submission:
        api, namespace = self._connect()
        group, version, plural, _ = _KINDS[self.kind]
        body = self.manifest(job)
        with _explained(self):
            objects = api.CustomObjectsApi()
            objects.create_namespaced_custom_object(group, version, namespace, plural, body)
        return Submission((name_of(job),), {"namespace": namespace})

    def status(self, record: Record) -> JobStatus:
        api, namespace = self._connect(record)
        group, version, plural, _ = _KINDS[self.kind]
        with _explained(self):
            try:
                found = api.CustomObjectsApi().get_namespaced_custom_object(
                    group, version, namespace, plural, record.id
                )
            except api.ApiException as error:
                if error.status != 404:
                    raise
                return JobStatus("stopped", "no longer in the cluster")
            pods = self._pods(api, namespace, record)
        for condition in found.get("status", {}).get("conditions", []):
            state = _CONDITIONS.get(condition.get("type"))
            if state is not None and condition.get("status") == "True":
                return JobStatus(state, condition.get("message") or condition.get("reason") or "")
        phases = [pod.status.phase for pod in pods]
        if len(phases) >= record.nodes and all(phase == "Running" for phase in phases):
            return JobStatus("running", f"{len(phases)} of {record.nodes} pods")
        waiting = next((reason for pod in pods if (reason := _waiting(pod))), "no pod yet")
        running = phases.count("Running")
        return JobStatus("pending", f"{running} of {record.nodes} pods; {waiting}")

    def logs(self, record: Record, *, follow: bool) -> Iterator[str]:
        api, namespace = self._connect(record)
        seen: set[str] = set()
        while True:
            with _explained(self):
                pods = self._pods(api, namespace, record)
                first = [pod for pod in pods if _number(pod) == 0 and pod.metadata.uid not in seen]
                for pod in first[-1:]:
                    if pod.status.phase == "Pending":
                        break
                    seen.add(pod.metadata.uid)
                    stream = api.CoreV1Api().read_namespaced_pod_log(
                        pod.metadata.name, namespace, follow=follow, _preload_content=False
                    )
                    yield from _lines(stream)
            if not follow or self.status(record).state in OVER:
                return
            time.sleep(_SECONDS)

    def stop(self, record: Record, *, now: bool) -> str:
        api, namespace = self._connect(record)
        group, version, plural, _ = _KINDS[self.kind]
        with _explained(self):
            if now:
                for pod in self._pods(api, namespace, record):
                    api.CoreV1Api().delete_namespaced_pod(
                        pod.metadata.name, namespace, grace_period_seconds=0
                    )
            try:
                api.CustomObjectsApi().delete_namespaced_custom_object(
                    group, version, namespace, plural, record.id, propagation_policy="Background"
                )
            except api.ApiException as error:
                if error.status != 404:
                    raise
                return "ended before"
        return "deleted" if now else f"asked to save a checkpoint and end within {self.grace} s"

    def _pods(self, api: Any, namespace: str, record: Record) -> list[Any]:
        """Its pods, the oldest first."""
        selector = f"{_KINDS[self.kind][3]}={record.id}"
        found = api.CoreV1Api().list_namespaced_pod(namespace, label_selector=selector).items
        return sorted(found, key=lambda pod: str(pod.metadata.creation_timestamp))

    def _connect(self, record: Record | None = None) -> tuple[Any, str]:
        """The client's module, ready to be used, and the namespace."""
        try:
            from kubernetes import client, config
        except ImportError:
            raise no_library("kubernetes", "kubernetes") from None
        files = os.environ.get("KUBECONFIG") or "~/.kube/config"
        has_file = any(Path(file).expanduser().exists() for file in files.split(os.pathsep))
        namespace = None
        try:
            if has_file:
                config.load_kube_config(files, context=self.context)
                contexts, active = config.list_kube_config_contexts(files)
                used = [c for c in contexts if c["name"] == self.context] or [active]
                namespace = used[0]["context"].get("namespace")
            else:
                config.load_incluster_config()
        except config.ConfigException as error:
            problem = " ".join(str(error).split())
            if not has_file:
                problem = f"there is no {files}, and this is no pod of a cluster; set KUBECONFIG"
            raise LaunchError(f"kubernetes: {problem}") from None
        if record is not None:
            return client, record.details["namespace"]
        return client, self.namespace or namespace or "default"


_FORGET = "NODE_RANK=$RANK; unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT\n"


class _explained:
    """Turns what the client raises into one line."""

    def __init__(self, target: Kubernetes) -> None:
        self._target = target

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        if isinstance(error, ApiException):
            raise LaunchError(f"kubernetes: {self._reason(error)}") from None
        if isinstance(error, HTTPError):
            cause: Any = getattr(error, "reason", None) or error
            while cause.args and isinstance(cause.args[-1], Exception):
                cause = cause.args[-1]
            text = _ERRNO.sub("", str(cause)).rpartition(": ")[2]
            raise LaunchError(
                f"kubernetes: the cluster does not answer ({text}); try `kubectl cluster-info`"
            ) from None

    def _reason(self, error: Any) -> str:
        try:
            message = json.loads(error.body)["message"]
        except (TypeError, ValueError, KeyError):
            message = error.reason or f"status {error.status}"
        if error.status == 404 and "could not find the requested resource" in message:
            other = next(kind for kind in _KINDS if kind != self._target.kind)
            return (
                f"the cluster knows no {self._target.kind}; install it there, or try --kind {other}"
            )
        if error.status == 409:
            return f"{message}; choose another --name"
        return f"{' '.join(message.split())} (status {error.status})"


def name_of(job: Job) -> str:
    """The name of the object: that of the run, in the letters that Kubernetes takes."""
    name = _NAME.sub("-", job.name.lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}"
    return name[:_LONGEST_NAME].rstrip("-")


def _from_secret(given: str) -> dict[str, Any]:
    name, place = secret_pair(given)
    secret, _, key = place.partition("/")
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def _toleration(text: str) -> dict[str, str]:
    taint, _, effect = text.partition(":")
    key, sign, value = taint.partition("=")
    found = {"key": key, "operator": "Equal", "value": value} if sign else {"key": key}
    return {
        **({} if sign else {"operator": "Exists"}),
        **found,
        **({"effect": effect} if effect else {}),
    }


def _number(pod: Any) -> int:
    """The number of the machine that a pod is."""
    labels = pod.metadata.labels or {}
    if labels.get("training.kubeflow.org/replica-type") == "worker":
        return int(labels.get("training.kubeflow.org/replica-index", "0")) + 1
    return int(labels.get("batch.kubernetes.io/job-completion-index", "0"))


def _waiting(pod: Any) -> str:
    """Why a pod does not run."""
    for status in pod.status.container_statuses or []:
        if status.state is not None and status.state.waiting is not None:
            waiting = status.state.waiting
            return f"{waiting.reason}: {waiting.message}" if waiting.message else waiting.reason
    for condition in pod.status.conditions or []:
        if condition.status == "False" and condition.message:
            return condition.message
    return ""


def _lines(stream: Any) -> Iterator[str]:
    """The lines of an answer that comes in parts."""
    rest = b""
    for part in stream.stream():
        *lines, rest = (rest + part).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
    if rest:
        yield rest.decode(errors="replace")
