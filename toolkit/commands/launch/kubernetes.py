"""`--to kubernetes`: a JobSet, or a PyTorchJob of Kubeflow's training operator.

A JobSet is the default: it restarts all machines of a run together, and leaves a run whose input is
bad alone. Both are one object, so a job is there whole or not at all.
"""

import re
import secrets
import time
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from toolkit.commands.launch.containers import Containers, mount_problems, secret_pair, to_yaml
from toolkit.commands.launch.job import Job, script_with_config
from toolkit.commands.launch.kubernetes_api import (
    Logs,
    answer_in_time,
    connect,
    explained,
    if_there,
    number_of,
    pods_of,
    why_waiting,
    withdraw,
)
from toolkit.commands.launch.target import OVER, JobStatus, Record, State, Submission
from toolkit.errors import EXIT_BAD_INPUT

_NAME = re.compile(r"[^a-z0-9]+")
_LONGEST_NAME = 46
"""The name of a pod's host, which is longer by some characters, has 63 at most."""
_KINDS = {
    "jobset": ("JobSet", "jobset.x-k8s.io", "v1alpha2", "jobset.sigs.k8s.io/jobset-name"),
    "pytorchjob": ("PyTorchJob", "kubeflow.org", "v1", "training.kubeflow.org/job-name"),
}
"""`--kind` -> Kubernetes' own word, group, version, label of the pods."""
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
        kind, group, version, _ = _KINDS[self.kind]
        labels = {"app.kubernetes.io/managed-by": "toolkit"}
        if self.queue is not None:
            labels["kueue.x-k8s.io/queue-name"] = self.queue
        is_jobset = self.kind == "jobset"
        metadata: dict[str, Any] = {"name": name, "labels": labels}
        if self.namespace is not None:
            metadata["namespace"] = self.namespace
        return {
            "apiVersion": f"{group}/{version}",
            "kind": kind,
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
        # Exit codes below 128 are final with `ExitCode`, a failed training too.
        restart = "OnFailure" if self.retries else "Never"
        replica = {"restartPolicy": restart, "template": {"spec": pod}}
        replicas = {"Master": {"replicas": 1, **replica}}
        if job.nodes > 1:
            replicas["Worker"] = {"replicas": job.nodes - 1, **replica}
        # Restarts of all pods count, and the job ends when they are as many as this.
        limit = self.retries * job.nodes + 1 if self.retries else 0
        policy = {"backoffLimit": limit, "cleanPodPolicy": "None"}
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
            "args": [_escaped(first + script_with_config(job, rank=rank, head=head))],
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

    def _place(self, namespace: str) -> tuple[str, str, str, str]:
        _, group, version, _ = _KINDS[self.kind]
        return group, version, namespace, f"{self.kind}s"

    def _selector(self, record: Record) -> str:
        return f"{_KINDS[self.kind][3]}={record.id}"

    def submit(self, job: Job) -> Submission:
        api, namespace = connect(self.context, self.namespace)
        objects, place, body = api.CustomObjectsApi(), self._place(namespace), self.manifest(job)
        mark = f"toolkit-{secrets.token_hex(8)}"
        with explained(self.kind), withdraw(objects, place, name_of(job), mark):
            objects.create_namespaced_custom_object(
                *place, body, field_manager=mark, **answer_in_time
            )
        return Submission((name_of(job),), {"namespace": namespace})

    def status(self, record: Record) -> JobStatus:
        api, namespace = connect(self.context, record.details["namespace"])
        with explained(self.kind):
            get = api.CustomObjectsApi().get_namespaced_custom_object
            found = if_there(get, *self._place(namespace), record.id)
            if found is None:
                return JobStatus("stopped", "no longer in the cluster")
            pods = pods_of(api, namespace, self._selector(record))
        for condition in found.get("status", {}).get("conditions", []):
            state = _CONDITIONS.get(condition.get("type"))
            if state is not None and condition.get("status") == "True":
                return JobStatus(state, condition.get("message") or condition.get("reason") or "")
        phases = [pod.status.phase for pod in pods]
        if len(phases) >= record.nodes and all(phase == "Running" for phase in phases):
            return JobStatus("running", f"{len(phases)} of {record.nodes} pods")
        waiting = next((reason for pod in pods if (reason := why_waiting(pod))), "no pod yet")
        running = phases.count("Running")
        return JobStatus("pending", f"{running} of {record.nodes} pods; {waiting}")

    def logs(self, record: Record, *, follow: bool) -> Iterator[str]:
        api, namespace = connect(self.context, record.details["namespace"])
        logs = Logs(api, namespace)
        while True:
            is_last = not follow or self.status(record).state in OVER
            with explained(self.kind):
                pods = pods_of(api, namespace, self._selector(record))
                first = [pod for pod in pods if number_of(pod) == 0]
                for pod in first[-1:]:
                    if pod.status.phase != "Pending":
                        yield from logs.new_lines(pod, follow=not is_last)
            if is_last:
                return
            time.sleep(_SECONDS)

    def stop(self, record: Record, *, now: bool) -> str:
        api, namespace = connect(self.context, record.details["namespace"])
        with explained(self.kind):
            # Before its pods: it would make others.
            delete = api.CustomObjectsApi().delete_namespaced_custom_object
            place = self._place(namespace)
            found = if_there(delete, *place, record.id, propagation_policy="Background")
            for pod in pods_of(api, namespace, self._selector(record)) if now else []:
                end = api.CoreV1Api().delete_namespaced_pod
                if_there(end, pod.metadata.name, namespace, grace_period_seconds=0)
        if found is None:
            return "ended before"
        return "deleted" if now else f"asked to save a checkpoint and end within {self.grace} s"


_REFERENCE = re.compile(r"\$+\(|\$\$+")
"""What Kubernetes would put something else for, before a shell sees it."""
_FORGET = "NODE_RANK=$RANK; unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT\n"


def _escaped(script: str) -> str:
    """`script` such that a container gets it as it is. To Kubernetes `$$` means `$`, and `$(NAME)`
    a variable."""
    return _REFERENCE.sub(lambda found: found[0].replace("$", "$$"), script)


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
