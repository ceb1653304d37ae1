"""`--to kubernetes`: the official client against a stub of the API server, on loopback."""

import json
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from tests.commands.launch.fakes import run, stub_python, wait_for
from toolkit.experiment.load import load_experiment

pytest.importorskip("kubernetes")
yaml = pytest.importorskip("yaml")

VOLUME = (
    "--volume",
    "data:/data",
    "--save-folder",
    "/data/runs/First_Run",
    "--image",
    "me/toolkit",
)
SMOKE = ("launch", "smoke", "--to", "kubernetes", *VOLUME)
JOBSETS = "/apis/jobset.x-k8s.io/v1alpha2/namespaces/team/jobsets"


class Server:
    """What the API server holds, and what it was asked."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.pods: list[dict[str, Any]] = []
        self.requests: list[str] = []
        self.refusal: tuple[int, str] | None = None
        self.logs: list[str] = []
        """With an X at the end the connection is lost there."""
        self.lost: tuple[str, ...] = ()
        """Methods whose requests are done, and get no answer."""
        self.made_by: dict[str, str] = {}

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        self.requests.append(f"{method} {path}")
        place, _, query = unquote(path).partition("?")
        if self.refusal is not None:
            status, message = self.refusal
            return status, {"kind": "Status", "status": "Failure", "message": message}
        if place.endswith("/log"):
            return 200, self.logs.pop(0) if self.logs else ""
        if place.endswith("/pods"):
            assert "labelSelector=jobset.sigs.k8s.io/jobset-name=first-run" in query
            return 200, {"kind": "PodList", "apiVersion": "v1", "items": self.pods}
        if method == "POST":
            name = body["metadata"]["name"]
            if f"{place}/{name}" in self.objects:
                return 409, {"message": f'jobsets "{name}" already exists'}
            self.objects[f"{place}/{name}"] = body
            self.made_by[f"{place}/{name}"] = query.partition("fieldManager=")[2]
            return 201, body
        if place not in self.objects:
            return 404, {"message": f"{place} not found"}
        if method == "DELETE":
            assert not body or body["preconditions"] == {"uid": place}
            return 200, self.objects.pop(place)
        found, managers = self.objects[place], [{"manager": self.made_by.get(place)}]
        metadata = {**found.get("metadata", {}), "uid": place, "managedFields": managers}
        return 200, {**found, "metadata": metadata}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            data = self.rfile.read(size)
            status, found = state.answer(
                self.command, self.path, json.loads(data) if data else None
            )
            if self.command in state.lost:
                return
            content = found.encode() if isinstance(found, str) else json.dumps(found).encode()
            size, content = len(content), content.removesuffix(b"X")
            kind = "text/plain" if isinstance(found, str) else "application/json"
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = _handle

        def log_message(self, *_: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{httpd.server_port}"}}],
        "users": [{"name": "u", "user": {"token": "abc"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "team"}}],
        "current-context": "x",
    }
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.chdir(tmp_path)
    yield state
    httpd.shutdown()
    httpd.server_close()


def pod(number: int, phase: str, **status: Any) -> dict[str, Any]:
    labels = {"batch.kubernetes.io/job-completion-index": str(number)}
    stamp = f"2026-01-01T00:00:0{number}Z"
    metadata = {"name": f"p{number}", "uid": f"u{number}", "labels": labels}
    return {
        "metadata": metadata | {"creationTimestamp": stamp},
        "status": {"phase": phase, **status},
    }


def at(second: int) -> str:
    return f"2026-01-01T00:00:{second:02}.000000000Z"


def test_a_job_is_made_watched_and_deleted(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*SMOKE, "--nodes", "2", "--processes", "2") == 0
    assert "kubernetes first-run: " in capsys.readouterr().out
    assert list(server.objects) == [f"{JOBSETS}/first-run"]
    home = tmp_path / "runs" / "smoke" / "First_Run"
    assert [p.name for p in home.rglob("*") if p.is_file()] == ["launch.json"]

    waiting = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
    state = [{"name": "pytorch", "state": waiting, "ready": False, "restartCount": 0} | _IMAGE]
    server.pods = [pod(1, "Pending", containerStatuses=state), pod(0, "Running")]
    assert run("jobs", "status", "First_Run") == 0
    said = capsys.readouterr().out
    assert "pending (1 of 2 pods; ImagePullBackOff: no such image)" in said
    assert "run    /data/runs/First_Run: not begun, or not to be seen from here" in said

    server.pods = [pod(1, "Running"), pod(0, "Running")]
    assert run("jobs", "status", "First_Run") == 0
    assert "on 2 machines: running (2 of 2 pods)" in capsys.readouterr().out

    server.logs = [f"{at(1)} step 1\n{at(2)} step 2\n"]
    done = {"type": "Completed", "status": "True", "message": "jobset completed successfully"}
    server.objects[f"{JOBSETS}/first-run"]["status"] = {"conditions": [done]}
    assert run("jobs", "logs", "First_Run", "--follow") == 0
    assert capsys.readouterr().out == "step 1\nstep 2\n"
    assert any(
        line.startswith("GET /api/v1/namespaces/team/pods/p0/log?") for line in server.requests
    )

    assert run("jobs", "stop", "First_Run") == 0
    assert "asked to save a checkpoint and end within 300 s" in capsys.readouterr().out
    assert server.objects == {}
    assert run("jobs", "status", "First_Run") == 0
    assert "stopped (no longer in the cluster)" in capsys.readouterr().out


_IMAGE = {"image": "me/toolkit", "imageID": ""}


def test_what_is_made_is_what_the_dry_run_prints(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        *("--nodes=2", "--gpus=8", "--cpu=32", "--memory=500Gi", "--shm=64Gi", "--namespace=team"),
        *("--service-account=trainer", "--image-pull-secret=registry", "--queue=gpus"),
        *("--toleration=nvidia.com/gpu", "--toleration=team=a:NoSchedule", "--retries=5"),
        *("--node-selector=gpu=h100", "--resource=rdma/ib=1", "--env=NCCL_DEBUG=INFO"),
        *("--secret=HF_TOKEN=hub/token", "--env-from=s3", "--volume=/mnt/ssd:/scratch"),
        *("--priority-class=high", "--data_loader.global_batch_size=8192", "--engine=fsdp"),
    )
    assert run(*SMOKE, *options, "--dry-run") == 0
    assert server.requests == []
    manifest = yaml.safe_load(capsys.readouterr().out)
    assert run(*SMOKE, *options) == 0
    assert server.objects == {f"{JOBSETS}/first-run": manifest}

    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["completionMode"]) == (2, 2, "Indexed")
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 5
    spec = job["template"]["spec"]
    (container,) = spec["containers"]
    amounts = {"nvidia.com/gpu": "8", "cpu": "32", "memory": "500Gi", "rdma/ib": "1"}
    assert container["resources"] == {"requests": amounts, "limits": amounts}
    secret = {"secretKeyRef": {"name": "hub", "key": "token"}}
    assert container["env"] == [{"name": "HF_TOKEN", "valueFrom": secret}]
    assert container["envFrom"] == [{"secretRef": {"name": "s3"}}]
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == [
        *("/dev/shm", "/data", "/scratch")
    ]
    assert [{k: v for k, v in volume.items() if k != "name"} for volume in spec["volumes"]] == [
        {"emptyDir": {"medium": "Memory", "sizeLimit": "64Gi"}},
        {"persistentVolumeClaim": {"claimName": "data"}},
        {"hostPath": {"path": "/mnt/ssd"}},
    ]
    assert spec["serviceAccountName"] == "trainer"
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert spec["nodeSelector"] == {"gpu": "h100"}
    assert spec["tolerations"] == [
        {"operator": "Exists", "key": "nvidia.com/gpu"},
        {"key": "team", "operator": "Equal", "value": "a", "effect": "NoSchedule"},
    ]
    script = container["args"][0]
    assert script.splitlines()[:2] == ["set -e", "export NCCL_DEBUG=INFO"]
    head = "first-run-node-0-0.first-run"
    port = script.rpartition(f"--head {head}:")[2].split()[0]
    assert script.endswith(
        "\nEND_OF_CONFIG\n"
        "exec python -m toolkit train /tmp/toolkit-config.json --save-folder /data/runs/First_Run "
        f"--processes 8 --engine fsdp --nodes 2 --head {head}:{port} "
        '--node-rank "$JOB_COMPLETION_INDEX"\n'
    )
    config = json.loads(script.partition("'END_OF_CONFIG'\n")[2].partition("\nEND_OF_CONFIG")[0])
    assert config["data_loader"]["global_batch_size"] == 8192


def expanded(text: str) -> str:
    """What Kubernetes makes of an argument: `$(NAME)` is the container's variable, and stays where
    it has none of that name."""
    return re.sub(
        r"\$\$|\$\(([^)]*)\)",
        lambda found: "$" if found[0] == "$$" else {"printf y": "z"}.get(found[1], found[0]),
        text,
    )


def test_the_script_of_a_container_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    setup = (
        "--setup",
        "export WHO='a b'$PS1_OF_NOBODY PID=$$ SAID=x$(printf y)$$$PS1_OF_NOBODY",
        "--env",
        "X=it's",
        "--nodes",
        "2",
        "--kind",
        "pytorchjob",
    )
    assert run(*SMOKE, *setup, "--dry-run") == 0
    replicas = yaml.safe_load(capsys.readouterr().out)["spec"]["pytorchReplicaSpecs"]
    container = replicas["Worker"]["template"]["spec"]["containers"][0]
    stub_python(tmp_path)
    (tmp_path / "runs" / "First_Run" / "metadata").mkdir(parents=True)
    script = (
        expanded(container["args"][0])
        .replace("/tmp/", f"{tmp_path}/")
        .replace("/data/", f"{tmp_path}/")
    )
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RANK": "1", "WORLD_SIZE": "2"}
    words = [*container["command"], script]
    with subprocess.Popen(words, env=environ, stdout=subprocess.DEVNULL) as process:
        wait_for((tmp_path / "ready1").exists)
        process.send_signal(signal.SIGTERM)  # it reaches the run, not a shell
        assert process.wait(20) == 75
    arguments, seen = json.loads((tmp_path / "calls").read_text())
    config, head = str(tmp_path / "toolkit-config.json"), arguments[-3]
    flags = ["--processes", "1", "--nodes", "2", "--head", head, "--node-rank", "1"]
    assert arguments == ["train", config, "--save-folder", f"{tmp_path}/runs/First_Run", *flags]
    assert head.startswith("first-run-master-0:")
    assert (seen["WHO"], seen["X"], seen.get("RANK")) == ("a b", "it's", None)
    assert (seen["PID"], seen["SAID"]) == (str(process.pid), f"xy{process.pid}")
    assert load_experiment(config).config.seed == 0


def test_a_pytorchjob_instead(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SMOKE, "--kind", "pytorchjob", "--nodes=2", "--processes=2", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "&id" not in text
    spec = yaml.safe_load(text)["spec"]
    assert spec["runPolicy"]["backoffLimit"] == 7  # of both machines, three times
    replicas = spec["pytorchReplicaSpecs"]
    assert {name: replica["replicas"] for name, replica in replicas.items()} == {
        "Master": 1,
        "Worker": 1,
    }
    script = replicas["Worker"]["template"]["spec"]["containers"][0]["args"][0]
    # What the operator says of ranks is about pods.
    assert script.startswith("NODE_RANK=$RANK; unset RANK WORLD_SIZE MASTER_ADDR MASTER_PORT\n")
    assert '--node-rank "$NODE_RANK"' in script
    assert "--head first-run-master-0:" in script


@pytest.mark.parametrize(
    ("refusal", "line"),
    [
        (
            (422, 'JobSet "first-run" is invalid: spec.replicatedJobs[0]: Required value'),
            'kubernetes: JobSet "first-run" is invalid: spec.replicatedJobs[0]: Required value '
            "(status 422)",
        ),
        (
            (403, 'jobsets is forbidden: User "me" cannot create resource "jobsets"'),
            'kubernetes: jobsets is forbidden: User "me" cannot create resource "jobsets" '
            "(status 403)",
        ),
        (
            (404, "the server could not find the requested resource"),
            "kubernetes: the cluster knows no jobset; install it there, or try --kind pytorchjob",
        ),
    ],
)
def test_what_the_cluster_refuses_is_one_line_and_leaves_nothing(
    refusal: tuple[int, str],
    line: str,
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.refusal = refusal
    assert run(*SMOKE) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    assert not (tmp_path / "runs").exists()


def test_a_name_that_is_taken(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.objects[f"{JOBSETS}/first-run"] = {}
    assert run(*SMOKE) == 2
    assert 'jobsets "first-run" already exists; choose another --name' in capsys.readouterr().err


def test_a_job_that_nobody_could_find_again_is_withdrawn(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "launch.json")

    monkeypatch.setattr("toolkit.commands.launch.submit.write_record", full)
    assert run(*SMOKE) == 2
    assert capsys.readouterr().err == "error: launch.json: No space left on device\n"
    assert [line.split()[0] for line in server.requests] == ["POST", "DELETE", "GET"]
    assert server.objects == {}


NO_ANSWER = "Remote end closed connection without response"


@pytest.mark.parametrize(
    ("lost", "other", "line"),
    [
        (
            ("POST",),
            False,
            f"the cluster does not answer ({NO_ANSWER}); try `kubectl cluster-info`",
        ),
        (("POST",), True, "the cluster does not answer"),
        (
            ("POST", "GET"),
            True,
            f"no answer ({NO_ANSWER}), and first-run may be there all the same; look with "
            "`kubectl get jobsets.jobset.x-k8s.io first-run -n team`",
        ),
    ],
)
def test_a_job_whose_answer_is_lost_is_withdrawn_and_no_other(
    lost: tuple[str, ...],
    other: bool,
    line: str,
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server.lost = lost
    if other:
        server.objects[f"{JOBSETS}/first-run"] = {}
    assert run(*SMOKE) == 2
    assert capsys.readouterr().err.startswith(f"error: kubernetes: {line}")
    assert list(server.objects) == ([f"{JOBSETS}/first-run"] if other else [])
    assert not (tmp_path / "runs").exists()


def test_no_pod_is_ended_before_what_would_make_another(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*SMOKE) == 0
    server.pods = [pod(0, "Running")]
    server.requests.clear()
    assert run("jobs", "stop", "First_Run", "--now") == 0
    deleted = [r.split("/")[-1].split("?")[0] for r in server.requests if r.startswith("DELETE")]
    assert deleted == ["first-run", "p0"]  # the pod was gone already


def test_a_log_that_breaks_off_goes_on(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a lost connection, in the middle of a line, and by a container that starts again."""
    monkeypatch.setattr("toolkit.commands.launch.kubernetes._SECONDS", 0.0)
    assert run(*SMOKE) == 0
    server.pods = [pod(0, "Running")]
    lines = [f"{at(second)} step {second}\n" for second in range(9)]
    server.logs = [
        f"{''.join(lines[:3])}X",
        f"{''.join(lines[:5])}{lines[5][:-3]}",
        "".join(lines[4:6]),
        "".join(lines[6:8]),
        "".join(lines[7:])[:-1],
    ]
    capsys.readouterr()
    answer = server.answer

    def completed(method: str, path: str, body: Any) -> tuple[int, Any]:
        if len(server.logs) == 1:
            done = {"type": "Completed", "status": "True"}
            server.objects[f"{JOBSETS}/first-run"]["status"] = {"conditions": [done]}
        return answer(method, path, body)

    monkeypatch.setattr(server, "answer", completed)
    assert run("jobs", "logs", "First_Run", "--follow") == 0
    assert capsys.readouterr().out == "".join(f"step {second}\n" for second in range(9))
    asked = [r for r in server.requests if "/log?" in r]
    assert ["follow=true" in request for request in asked] == [True] * 4 + [False]
    assert ["sinceSeconds=" in request for request in asked[2:]] == [True] * 3


def test_a_cluster_that_does_not_answer(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((tmp_path / "kubeconfig").read_text())
    config["clusters"][0]["cluster"]["server"] = "http://127.0.0.1:9"
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    assert run(*SMOKE) == 2
    error = capsys.readouterr().err
    assert error == (
        "error: kubernetes: the cluster does not answer (Connection refused); try "
        "`kubectl cluster-info`\n"
    )


def test_a_context_that_is_not_there(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*SMOKE, "--context", "prod") == 2
    error = capsys.readouterr().err
    assert "prod" in error
    assert error.count("\n") == 1


def test_no_cluster_at_all(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBECONFIG", "nowhere")
    assert run(*SMOKE) == 2
    problem = "there is no nowhere, and this is no pod of a cluster; set KUBECONFIG"
    assert capsys.readouterr().err == f"error: kubernetes: {problem}\n"
