"""Standard output that goes away takes nothing with it."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from toolkit.cli import main as cli
from toolkit.cli.output import has_lost_reader, lasting
from toolkit.errors import reason_of_machine


def broken_pipe() -> Any:
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


def test_a_pipe_without_a_reader_loses_lines_and_nothing_else() -> None:
    with broken_pipe() as pipe:
        assert has_lost_reader(pipe)
        stream = lasting(pipe)
        for _ in range(3):
            assert stream.write("a line\n") == 7
            stream.flush()
        assert not has_lost_reader(pipe)  # what other libraries write goes to /dev/null
        pipe.write("another library's line\n")
        pipe.flush()


def test_a_full_disk_is_tried_again(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full, (tmp_path / "other").open("w") as other:
        stream = lasting(full)
        stream.write("lost\n")
        stream.flush()
        os.dup2(other.fileno(), full.fileno())
        stream.write("kept\n")
        stream.flush()
    assert (tmp_path / "other").read_text() == "kept\n"


def test_what_was_not_buffered_is_not_buffered_now(tmp_path: Path) -> None:
    with (tmp_path / "a").open("wb", buffering=0) as file:
        unbuffered = io.TextIOWrapper(file, write_through=True)
        stream = lasting(unbuffered)
        stream.write("a line\n")
        assert (tmp_path / "a").read_bytes() == b"a line\n"


def test_letters_that_a_terminal_lacks_are_escaped(tmp_path: Path) -> None:
    with (tmp_path / "a").open("w", encoding="ascii") as file:
        stream = lasting(file)
        stream.write("café\n")
        stream.flush()
        assert stream.encoding == "ascii"
    assert (tmp_path / "a").read_bytes() == b"caf\\xe9\n"


def test_a_program_started_without_streams_has_some(tmp_path: Path) -> None:
    code = """
import os, sys
os.close(1); os.close(2); sys.stdout = sys.stderr = None
from toolkit.cli.output import open_missing_streams
open_missing_streams()
print("nowhere", flush=True)
descriptor = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
sys.exit(0 if descriptor > 2 and sys.stderr is not None else 1)
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")]).returncode == 0


def test_exit_0_is_for_readers_that_left_not_for_other_pipes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("toolkit.commands.load.load_experiment", fail)
    with pytest.raises(BrokenPipeError):
        cli.run(["train", "smoke"])
    with broken_pipe() as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.run(["train", "smoke"]) == 0


def test_text_for_a_reader_that_left_ends_quietly(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from toolkit.cli.printing import plain_console

    monkeypatch.setattr(
        "toolkit.commands.load.load_experiment", lambda *_, **__: plain_console().print("text")
    )
    with broken_pipe() as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.run(["data", "show", "smoke"]) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_an_error_of_the_disk_is_one_line(
    number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "/data/runs/a")

    monkeypatch.setattr("toolkit.commands.load.load_experiment", fail)
    assert cli.run(["train", "smoke"]) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"error: /data/runs/a: {os.strerror(number)}: ")
    assert line.count("\n") == 1
    assert reason_of_machine(FileNotFoundError(errno.ENOENT, "", "x")) is None


def test_debug_waits_for_kernels_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for mode, words in (("", "slow"), ("0", "CUDA_LAUNCH_BLOCKING=0 in every process\n")):
        monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", mode or "1")
        if not mode:
            monkeypatch.delenv("CUDA_LAUNCH_BLOCKING")
        cli._wait_for_kernels()
        assert os.environ["CUDA_LAUNCH_BLOCKING"] == (mode or "1")
        assert capsys.readouterr().err.endswith(f"{words}\n" if not mode else words)
