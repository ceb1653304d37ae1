"""What `--to kubernetes` asks of the official client: a connection, pods, errors in one line."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolkit.commands.launch.target import LaunchError, no_library

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
        cause: Any = getattr(error, "reason", None) or error
        while cause.args and isinstance(cause.args[-1], Exception):
            cause = cause.args[-1]
        text = _ERRNO.sub("", str(cause)).rpartition(": ")[2]
        raise LaunchError(
            f"kubernetes: the cluster does not answer ({text}); try `kubectl cluster-info`"
        ) from None


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


def lines_of(stream: Any) -> Iterator[str]:
    """The lines of an answer that comes in parts."""
    rest = b""
    for part in stream.stream():
        *lines, rest = (rest + part).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
    if rest:
        yield rest.decode(errors="replace")
