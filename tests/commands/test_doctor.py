"""`toolkit doctor` on this machine, and on machines that lack something."""

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from toolkit.cli.main import run
from toolkit.commands import doctor, doctor_files, doctor_speed
from toolkit.commands.doctor import Finding, describe, examine, exit_code
from toolkit.distributed import devices
from toolkit.errors import ConfigError
from toolkit.runs.files import RUN_FILES
from toolkit.runs.lock import own_info
from toolkit.storage.atomic import write_json_atomic


def test_this_machine_can_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "ready to train"
    assert lines[0].startswith("  versions ")
    assert any(line.startswith("  device ") and "`auto` is" in line for line in lines)
    assert any("run folder" in line and str(tmp_path) in line for line in lines)
    assert len(lines) <= 24, "one screen"
    said = dict(re.findall(r"^.. ?(\S.*?)  +(.*)$", "\n".join(lines[:-1]), flags=re.MULTILINE))
    assert re.match(r"fp32 [\d.]+ [GT]FLOP/s, bf16 ", said["matmul"])
    assert re.match(r"write [\d.]+ [MG]B/s, ", said["run folder"])
    assert said["file system"].endswith(
        "fsync, rename, exclusive files, locks, links and clock work"
    )
    assert said["locks"] == f"{tmp_path}/runs: none that a dead run left"
    assert f"torch {torch.__version__} is built for " in said["driver"]
    assert run(["doctor", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert {frozenset(record) for record in records} == {frozenset(("level", "about", "text"))}
    assert "failed" not in {record["level"] for record in records}
    assert list(tmp_path.iterdir()) == []


def test_a_nearly_full_disk_is_not_measured_and_no_folder_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("toolkit.commands.doctor_speed.disk_speed", full)
    (finding, *_) = doctor._disk_speeds(tmp_path)
    assert finding == (
        "note", "run folder", f"{tmp_path}: speed not measured: No space left on device"
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert run(["doctor"]) == 2
    assert "the current folder was removed" in capsys.readouterr().err
    monkeypatch.chdir("/")


def test_one_failure_is_the_exit_code_and_is_marked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [Finding("note", "limits", "few"), Finding("failed", "device", "none")]
    monkeypatch.setattr(doctor, "examine", lambda: found)
    assert run(["doctor"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "! limits  few",
        "x device  none",
        "cannot train here: see the lines with x",
    ]
    assert run(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[1]["level"] == "failed"
    assert exit_code(found[:1]) == 0
    assert describe(found[:1]).endswith("ready to train")


CHECKS = (
    *("versions", "packages", "driver", "device", "matmul", "compiler", "disks", "disk_speeds"),
    *("file_system", "locks", "limits", "network", "extras"),
)


def only(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check in CHECKS
    for other in CHECKS:
        if other != check:
            monkeypatch.setattr(doctor, f"_{other}", lambda *_, **__: iter(()))


def usage(**sizes: int) -> Any:
    return lambda place: SimpleNamespace(**{"total": 10**12, "free": 10**12, **sizes})


def fails(error: Exception) -> Any:
    def raising(*_: Any, **__: Any) -> None:
        raise error

    return raising


@pytest.mark.parametrize(
    ("place", "name", "value", "expected"),
    [
        (doctor, "installed_version", lambda name: None if name == "deepspeed" else "1",
         ("failed", "libraries", "not installed: deepspeed")),
        (sys, "platform", "win32",
         ("failed", "system", "Windows is not supported; use Linux under WSL 2")),
        (devices, "unused_gpus", lambda: "1 x H is not used, this runs on the CPU: torch is old",
         ("failed", "device", "1 x H is not used")),
        (devices, "pick_device", fails(ConfigError("2 processes,\nno GPU")),
         ("failed", "device", "2 processes, no GPU")),
        (torch.nn, "Linear", fails(RuntimeError("CUDA error: out of memory")),
         ("failed", "device", "CUDA error: out of memory")),
        (torch, "isfinite", lambda value: torch.tensor(False),
         ("failed", "device", "a small product is not finite")),
        (shutil, "which", lambda name: None, ("note", "compiler", "no C++ compiler")),
        (tempfile, "TemporaryFile", fails(PermissionError(13, "Permission denied")),
         ("failed", "run folder", "cannot be written: Permission denied")),
        (shutil, "disk_usage", usage(free=10**9), ("note", "run folder", "1.0 GB free")),
        (shutil, "disk_usage", usage(total=1 << 26),
         ("note", "shared memory", "/dev/shm: 0.07 GB; NCCL wants more (docker run --ipc=host)")),
        (shutil, "disk_usage", fails(OSError("no such device")),
         ("failed", "disks", "no such device")),
        (doctor.socket, "socket", fails(OSError("no net")), ("failed", "network", "no net")),
        (doctor_speed, "matmul_speeds", fails(torch.OutOfMemoryError()),
         ("note", "matmul", "not measured: another program has the GPU's memory")),
        (os, "link", fails(PermissionError(1, "Operation not permitted")),
         ("note", "file system", ": not to be relied on: hard links (Operation not ")),
        (fcntl, "flock", lambda *_: None,
         ("note", "file system", ": not to be relied on: locks; ")),
        (time, "time", lambda: 0.0, ("note", "file system", ": not to be relied on: its clock; ")),
        (os, "fsync", fails(OSError(22, "Invalid argument")),
         ("failed", "file system", ": not working: fsync (Invalid argument); put runs on another")),
        (doctor_files, "_replaces", lambda place: False,
         ("failed", "file system", ": not working: rename; ")),
        (doctor, "installed_version", lambda name: "11.5.3" if name == "pynvml" else None,
         ("note", "packages", "pynvml 11.5.3: it hides nvidia-ml-py")),
        (metadata, "requires", lambda name: ["numpy<1", "none-such==1"],
         ("note", "packages", "torch needs numpy<1, here is ")),
        (doctor, "installed_version", lambda name: None,
         ("ok", "extras", "not installed: ")),
    ],
)  # fmt: skip
def test_what_is_missing_is_a_line(
    place: Any, name: str, value: Any, expected: tuple[str, str, str],
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    checks = {"system": "versions", "run folder": "disks", "shared memory": "disks"}
    check = checks.get(expected[1], "versions" if expected[1] == "libraries" else expected[1])
    only(check.replace(" ", "_"), monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(place, name, value)
        found = examine(folder=tmp_path)
    level, about, text = expected
    assert [f for f in found if (f.level, f.about) == (level, about) and text in f.text], found


def test_few_open_files_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 2048))
    (found,) = doctor._limits()
    assert (found.level, found.about) == ("note", "limits")
    assert "`ulimit -n 4096`" in found.text


def test_several_gpus_get_the_line_that_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "usable_gpus", lambda: 2)
    monkeypatch.setattr(devices, "unused_gpus", lambda: None)
    monkeypatch.setattr(devices, "pick_device", lambda local_rank: torch.device("cpu"))
    memory = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    device, start = doctor._device()
    assert device.text.startswith("2 GPUs, the first ")
    assert "with 80 GiB" in device.text
    assert start.text == "toolkit train CONFIG --processes 2"


def test_speeds_are_those_of_the_threads_that_a_run_has(monkeypatch: pytest.MonkeyPatch) -> None:
    before, asked = torch.get_num_threads(), torch.get_num_threads() + 1
    monkeypatch.setenv("OMP_NUM_THREADS", str(before))
    monkeypatch.setenv("TOOLKIT_NUM_THREADS", str(asked))
    monkeypatch.setattr(devices, "usable_gpus", lambda: 0)
    monkeypatch.setattr(devices, "pick_device", lambda local_rank: torch.device("cpu"))
    try:
        (device,) = doctor._device()
        assert f"{asked} threads)" in device.text
        assert torch.get_num_threads() == asked
    finally:
        torch.set_num_threads(before)


def test_locks_of_dead_runs_are_told(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    for name, pid in (("live", os.getpid()), ("dead", gone.pid)):
        info = tmp_path / "group" / name / RUN_FILES.lock_info
        info.parent.mkdir(parents=True)
        write_json_atomic(info, msgspec.structs.replace(own_info(), pid=pid))
    (found,) = doctor._locks(tmp_path)
    assert found.level == "note"
    assert "left by dead writers of group/dead; `toolkit resume RUN`" in found.text


def test_a_port_in_use_is_a_note_unless_it_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setattr(doctor, "DEFAULT_PORT", port)
        (found,) = doctor._network()
        assert (found.level, f"port {port}: Address already in use" in found.text) == ("note", True)
        (found,) = doctor._network(has_peers=True)
        assert found.level == "ok"
