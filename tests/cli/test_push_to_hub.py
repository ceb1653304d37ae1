"""`toolkit export-hf --push-to-hub`, against a hub of this machine."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from toolkit.cli import main as cli


class Hub(ThreadingHTTPServer):
    """As much of the hub's API as one upload of small files asks for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.tokens: set[str | None] = set()
        self.refuses = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        hub = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        hub.tokens.add(self.headers["Authorization"])
        if hub.refuses:
            return self.say({"error": "You don't have the rights to create a model here"}, 403)
        if self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            return self.say({"url": f"{hub.address}/me/first", "name": "me/first"})
        if self.path == "/api/validate-yaml":
            return self.say({"errors": [], "warnings": []})
        if self.path == "/api/models/me/first/preupload/main":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.say({"files": files})
        assert self.path == "/api/models/me/first/commit/main"
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                hub.commits.append(line["value"]["summary"])
            else:
                hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.say({"commitUrl": f"{hub.address}/me/first/commit/1", "commitOid": "1"})

    def say(self, answer: dict[str, Any], code: int = 200) -> None:
        content = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_the_folder_is_uploaded_as_it_is(
    tiny_run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--no-check", "--license", "apache-2.0", "--push-to-hub", "me/first", "--private"]
    assert cli.run(["export-hf", str(tiny_run), "out", *words]) == 0
    assert f"uploaded: {hub.address}/me/first" in capsys.readouterr().out.splitlines()
    written = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert hub.files == written
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= set(written)
    assert b"\nlicense: apache-2.0\n" in written["README.md"]
    (created,) = hub.created
    assert (created["organization"], created["name"]) == ("me", "first")
    assert created["visibility"] == "private"
    assert hub.commits == ["Upload model (LlamaForCausalLM, step 4)"]
    assert hub.tokens <= {"Bearer hf_secret", None}
    assert "Bearer hf_secret" in hub.tokens


def test_a_refusal_leaves_the_export_and_says_how_to_go_on(
    tiny_run: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuses = True
    words = ["--no-check", "--push-to-hub", "me/first"]
    assert cli.run(["export-hf", str(tiny_run), "my out", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--push-to-hub me/first: " in error
    assert "403" in error
    assert "For more information check" not in error
    assert "the export is in my out, and `hf upload me/first 'my out'` tries again" in error
    assert Path("my out/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--push-to-hub", "a/b/c"], "--push-to-hub a/b/c: "),
        (["--push-to-hub", "me/first"], "me/first: no token is known; log in with `hf auth login`"),
        (["--push-to-hub", "me/first"], "me/first: the hub is offline; unset HF_HUB_OFFLINE"),
        (["--private"], "--private belongs to --push-to-hub OWNER/NAME; give both"),
    ],
)
def test_what_cannot_be_pushed_is_said_before_anything_is_written(
    words: list[str], message: str, tiny_run: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    token = "hf_secret" if "offline" in message else None
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert cli.run(["export-hf", str(tiny_run), "out", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
    assert not Path("out").exists()
