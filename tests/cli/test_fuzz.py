"""Whatever is typed or written into a config: an answer of one line an error, and nothing hangs."""

import contextlib
import functools
import io
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main
from hypothesis import HealthCheck, example, given, settings

from tests.cli.fuzz import command_lines
from toolkit.cli import main as cli

EXAMPLES = int(os.environ.get("TOOLKIT_FUZZ_EXAMPLES", "150"))
"""Set it to 20000 for an hour of it."""
SECONDS = 60
"""What takes longer hangs, on however busy a machine."""


@contextlib.contextmanager
def no_hang() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise AssertionError(f"no answer in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(words: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and error, through streams as strict as a terminal's."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), no_hang():
        code = cli.run(words)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    return code, texts[0], texts[1]


@pytest.fixture(scope="module", autouse=True)
def _commands_are_built_once() -> Iterator[None]:
    """typer builds the commands anew for each command line, which takes longer than the rest."""
    patch = pytest.MonkeyPatch()
    patch.setattr("typer.main.get_command", functools.cache(typer.main.get_command))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("fuzz")
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@given(command_lines())
@settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES < 1000,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@example((None, ["quickstart", "--train_module.ac_config=&a [*a]", "--dry-run"]))
@example(
    (
        None,
        [
            "smoke",
            "--data_loader.global_batch_size=4611686018427387904",
            "--train_module.rank_microbatch_size=192",
            "--dry-run",
        ],
    )
)
@example((None, ["smoke", "--model.num_layers=1000000000000", "--dry-run"]))
@example((None, ["~nouser/x", "--dry-run"]))
@example((b"[" * 3000, ["CONFIG", "--dry-run"]))
def test_any_command_line_is_answered(place: Path, case: tuple[bytes | None, list[str]]) -> None:
    file, words = case
    config = place / "my.json"
    config.unlink(missing_ok=True)
    if file is not None:
        config.write_bytes(file)
    words = [str(config) if word == "CONFIG" else word for word in words]
    code, _, err = run(["train", *words])
    assert code in (0, 2), (code, err)
    assert "Traceback" not in err
    lines = err.splitlines()
    if code == 2:
        assert lines, words
        assert all(line.startswith("error: ") for line in lines), err
    assert {path.name for path in place.iterdir()} <= {"my.json"}
    assert "torch" not in sys.modules or _TORCH_BEFORE


_TORCH_BEFORE = "torch" in sys.modules
