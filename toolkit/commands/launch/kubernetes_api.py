"""What `--to kubernetes` asks of the official client: a connection, pods, errors in one line."""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolkit.commands.launch.target import LaunchError, no_library

answer_in_time: dict[str, Any] = {"_request_timeout": 60.0}
"""For requests after which something is there or not."""
_SECONDS_BEFORE = 60
"""How much of a log is read again, when its stream is opened again."""
_ERRNO = re.compile(r"\[Errno \d+\] ")


def connect(context: str | None, namespace: str | None) -> tuple[Any, str]:
    """The client's module, ready to be used, and the namespace: given, or that of the kubeconfig's
    context. Raises ConfigError or LaunchError: there is no client or no cluster."""
    try:
        from kubernetes import client, config
    except ImportError:
        raise no_library("kubernetes", "kubernetes") from None
    files = os.environ.get("KUBECONFIG") or "~/.kube/config"
    has_file = any(Path(file).expanduser().exists() for file in files.split(os.pathsep))
    of_context = None
    try:
        if has_file:
            config.load_kube_config(files, context=context)
            contexts, active = config.list_kube_config_contexts(files)
            used = [one for one in contexts if one["name"] == context] or [active]
            of_context = used[0]["context"].get("namespace")
        else:
            config.load_incluster_config()
    except config.ConfigException as error:
        problem = " ".join(str(error).split())
        if not has_file:
            problem = f"there is no {files}, and this is no pod of a cluster; set KUBECONFIG"
        raise LaunchError(f"kubernetes: {problem}") from None
    return client, namespace or of_context or "default"


@contextmanager
def explained(kind: str) -> Iterator[None]:
    """Turns what the client raises into one line."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        raise LaunchError(f"kubernetes: {_reason(error, kind)}") from None
    except HTTPError as error:
        raise LaunchError(
            f"kubernetes: the cluster does not answer ({_cause(error)}); try `kubectl cluster-info`"
        ) from None


def _cause(error: Any) -> str:
    cause: Any = getattr(error, "reason", None) or error
    while cause.args and isinstance(cause.args[-1], Exception):
        cause = cause.args[-1]
    return _ERRNO.sub("", str(cause)).rpartition(": ")[2]


def _reason(error: Any, kind: str) -> str:
    try:
        message = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        message = error.reason or "no reason given"
    if error.status == 404 and "could not find the requested resource" in message:
        other = "pytorchjob" if kind == "jobset" else "jobset"
        return f"the cluster knows no {kind}; install it there, or try --kind {other}"
    if error.status == 409:
        return f"{message}; choose another --name"
    return f"{' '.join(message.split())} (status {error.status})"


def if_there(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What `call` returns; None: the cluster has no such thing."""
    from kubernetes.client import ApiException

    try:
        return call(*arguments, **named)
    except ApiException as error:
        if error.status != 404:
            raise
        return None


@contextmanager
def withdraw(
    objects: Any, place: tuple[str, str, str, str], name: str, mark: str
) -> Iterator[None]:
    """Where the answer to the block's request is lost, delete the object that it may have made, and
    no other's: `mark` was its field manager."""
    from kubernetes.client import V1DeleteOptions, V1Preconditions
    from urllib3.exceptions import HTTPError, MaxRetryError

    try:
        yield
    except MaxRetryError:
        raise  # no connection: nothing was sent
    except HTTPError as lost:
        try:
            made = if_there(objects.get_namespaced_custom_object, *place, name, **answer_in_time)
            metadata = made["metadata"] if made is not None else {}
            managers = [entry.get("manager") for entry in metadata.get("managedFields", [])]
            if mark in managers:
                only = V1DeleteOptions(preconditions=V1Preconditions(uid=metadata["uid"]))
                delete = objects.delete_namespaced_custom_object
                if_there(delete, *place, name, body=only, **answer_in_time)
        except Exception:
            group, _, namespace, plural = place
            raise LaunchError(
                f"kubernetes: no answer ({_cause(lost)}), and {name} may be there all the same; "
                f"look with `kubectl get {plural}.{group} {name} -n {namespace}`"
            ) from None
        raise


def pods_of(api: Any, namespace: str, selector: str) -> list[Any]:
    """The pods that have a label, the oldest first."""
    found = api.CoreV1Api().list_namespaced_pod(namespace, label_selector=selector).items
    return sorted(found, key=lambda pod: str(pod.metadata.creation_timestamp))


def number_of(pod: Any) -> int:
    """The number of the machine that a pod is."""
    labels = pod.metadata.labels or {}
    if labels.get("training.kubeflow.org/replica-type") == "worker":
        return int(labels.get("training.kubeflow.org/replica-index", "0")) + 1
    return int(labels.get("batch.kubernetes.io/job-completion-index", "0"))


def why_waiting(pod: Any) -> str:
    """Why a pod does not run."""
    for status in pod.status.container_statuses or []:
        if status.state is not None and status.state.waiting is not None:
            waiting = status.state.waiting
            return f"{waiting.reason}: {waiting.message}" if waiting.message else waiting.reason
    for condition in pod.status.conditions or []:
        if condition.status == "False" and condition.message:
            return condition.message
    return ""


class Logs:
    """Logs of pods, in pieces: a load balancer or the API server may end a stream while the pod
    goes on, and a container that is started again in its pod begins another one."""

    def __init__(self, api: Any, namespace: str) -> None:
        self._api = api
        self._namespace = namespace
        self._last: dict[str, tuple[str, float]] = {}
        """By pod: the time of the last line there, and when it came here."""

    def new_lines(self, pod: Any, *, follow: bool) -> Iterator[str]:
        """The lines that were not shown yet; with `follow` until the stream ends in any way."""
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        name, uid = pod.metadata.name, pod.metadata.uid
        shown = ""
        options: dict[str, Any] = {"timestamps": True}
        if uid in self._last:
            shown, came = self._last[uid]
            options["since_seconds"] = int(time.monotonic() - came) + _SECONDS_BEFORE
        try:
            stream = self._api.CoreV1Api().read_namespaced_pod_log(
                name, self._namespace, follow=follow, _preload_content=False, **options
            )
            for line in _lines_of(stream, also_rest=not follow):
                stamp, _, text = line.partition(" ")
                if stamp > shown:
                    self._last[uid] = stamp, time.monotonic()
                    yield text
        except HTTPError:
            if not follow:
                raise
        except ApiException as error:
            # Its container is just made, or the pod is gone.
            if not follow or error.status not in (400, 404):
                raise


def _lines_of(stream: Any, *, also_rest: bool) -> Iterator[str]:
    """The lines of an answer that comes in parts; `also_rest`: the last one may have no end."""
    rest = b""
    for part in stream.stream():
        *lines, rest = (rest + part).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
    if rest and also_rest:
        yield rest.decode(errors="replace")
