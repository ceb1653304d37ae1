"""`toolkit tune`: which tries there are, what wins, and what failures do."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from toolkit import signals
from toolkit.cli import main as cli
from toolkit.commands import tune as tuning
from toolkit.commands import tune_worker
from toolkit.commands.tune_worker import Result, Trial
from toolkit.errors import EXIT_BAD_INPUT, EXIT_FAILED
from toolkit.experiment.load import load_experiment
from toolkit.parents import is_alive
from toolkit.testing import tiny_experiment


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    tiny_experiment(tmp_path)
    return str(tmp_path / "tiny.json")


def speeds(monkeypatch: pytest.MonkeyPatch, judge: Any) -> list[Any]:
    """Tries are judged by `judge(config)`; the configs that were tried."""
    tried: list[Any] = []

    def run(config: Any, *_: Any) -> Result:
        tried.append(config)
        answer = judge(config)
        if isinstance(answer, str):
            return Result(failed=answer)
        return Result(tokens_per_second=answer, peak_memory=10**9)

    monkeypatch.setattr(tuning, "_run", run)
    monkeypatch.setattr(tuning, "can_compile", lambda: True)
    monkeypatch.setattr(tuning, "_machine", lambda processes: tuning.Machine("cpu", 1 << 40, 4))
    return tried


def test_the_fastest_values_win_one_after_the_other(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def judge(config: Any) -> float | str:
        module, speed = config.train_module, 100.0
        if module.rank_microbatch_size > 512:
            return "out of memory"
        speed *= 2.0 if module.precision == "bf16" else 1.0
        speed *= 1.5 if config.trainer.num_threads == 2 else 1.0
        speed *= 1.02 if module.compile_model is True else 1.0  # noise
        return speed

    speeds(monkeypatch, judge)
    sizes = ["--train_module.rank_microbatch_size=512", "--data_loader.global_batch_size=1024"]
    assert cli.run(["tune", config, *sizes, "--write", "fast.json"]) == 0
    out = capsys.readouterr().out
    assert "--train_module.precision=bf16 --trainer.num_threads=2\n" in out
    assert "microbatches of 1,024 tokens" in out
    assert "out of memory" in out
    assert len(Path("fast.json").read_text()) < 2 * len(Path(config).read_text())
    assert json.loads(Path("fast.json").read_text())["train_module"].keys() == {
        *json.loads(Path(config).read_text()).get("train_module", {}),
        "precision",
        "rank_microbatch_size",
    }
    fast = load_experiment("fast.json").config
    assert (fast.train_module.precision, fast.trainer.num_threads) == ("bf16", 2)
    assert fast.train_module.compile_model == "auto"


def test_a_gain_has_to_be_larger_than_what_two_turns_differ(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = iter([100.0, 110.0])
    speeds(monkeypatch, lambda config: next(turns, 115.0))
    monkeypatch.setattr(tuning, "machine_is_busy", lambda: True)
    assert cli.run(["tune", config, "--train_module.precision=fp32"]) == 0
    told = capsys.readouterr()
    assert told.out.endswith("nothing is faster than the config as it is by more than 10%\n")
    assert told.err.startswith("other programs use this machine")
    assert "as configured: 100 tokens/s\nonce more: 110 tokens/s" in told.err


def test_what_would_change_nothing_is_not_tried(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fewer threads than there are already, and chunks of the loss that hold all rows."""
    tried = speeds(monkeypatch, lambda config: 1.0)
    flags = ["--trainer.num_threads=2", "--train_module.precision=fp32"]
    assert cli.run(["tune", config, *flags]) == 0
    assert [c.trainer.num_threads for c in tried if c.trainer.num_threads != 2] == [4]
    assert {c.model.loss_chunk_size for c in tried} == {None}
    del tried[:]
    assert cli.run(["tune", config, *flags, "--model.loss_chunk_size=64"]) == 0
    assert {c.model.loss_chunk_size for c in tried} == {32, 64, 128}


def test_where_memory_ends_checkpointing_is_tried(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def judge(config: Any) -> float | str:
        if config.train_module.ac_config is None:
            return "out of memory"
        return 10.0 if config.train_module.ac_config.mode == "full" else "out of memory"

    speeds(monkeypatch, judge)
    assert cli.run(["tune", config, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["best"]["values"]["train_module.ac_config"] == {"mode": "full"}
    assert found["tries"][0]["failed"] == "out of memory"


def test_what_the_plan_refuses_is_not_tried(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = speeds(monkeypatch, lambda config: 1.0)
    monkeypatch.setattr(tuning, "_machine", lambda processes: tuning.Machine("cpu", 1000, None))
    assert cli.run(["tune", config]) == EXIT_FAILED
    assert tried == []
    assert "no try worked; the first: not tried: the plan needs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "--steps 0: give 1 or more"),
        (["--processes", "0"], "--processes 0: give 1 or more"),
        (["--write", "nowhere/fast.json"], "--write nowhere/fast.json: its folder does not exist"),
        (["--write", "tiny.json"], "--write tiny.json: exists; give another name"),
        (["--write", f"{'x' * 250}.json"], "cannot be written: File name too long"),
        (["--write", "dangling"], "--write dangling: exists; give another name"),
        (["--trainer.num_threads=100000"], "trainer.num_threads: 100000 threads are more than 4"),
        (["--train_module.precision=fp17"], "train_module.precision"),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("dangling").symlink_to("nowhere")
    assert cli.run(["tune", config, *words]) == EXIT_BAD_INPUT
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said


def test_a_file_that_appears_meanwhile_is_not_replaced(
    config: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def judge(config: Any) -> float:
        Path("fast.json").write_text("mine")
        return 1.0

    speeds(monkeypatch, judge)
    assert cli.run(["tune", config, "--write", "fast.json"]) == EXIT_BAD_INPUT
    told = capsys.readouterr()
    assert "--write fast.json: exists by now, and was not replaced" in told.err
    assert "--train_module.precision=fp32\n" in told.out
    assert Path("fast.json").read_text() == "mine"


def test_a_request_to_stop_ends_all_ranks_of_the_try(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has a session of its own, so that nobody else would end it."""
    python, notes = tmp_path / "python", [tmp_path / "rank0", tmp_path / "rank1"]
    python.write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/new$RANK\n"
        f"mv {tmp_path}/new$RANK {tmp_path}/rank$RANK\nexec sleep 60\n"
    )
    python.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(python))
    tiny = load_experiment(config).config

    def ask() -> None:
        end_at = time.monotonic() + 30
        while not all(note.exists() for note in notes) and time.monotonic() < end_at:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    machine = tuning.Machine("cpu", 8 << 30, 1)
    with signals.listening(signals.Starting()):
        asking.start()
        with pytest.raises(signals.Interrupted, match="SIGTERM"):
            tuning._run(tiny, 1, 2, machine, tuning._environ())
    asking.join()
    assert not any(is_alive(int(note.read_text())) for note in notes)


def test_one_try_from_end_to_end(config: str, tmp_path: Path) -> None:
    """In a process of its own, and nothing is left."""
    before = sorted(tmp_path.rglob("*"))
    tiny = load_experiment(config).config
    machine = tuning.Machine("cpu", 8 << 30, 1)
    result = tuning._run(tiny, 1, 1, machine, tuning._environ())
    assert result.failed is None
    assert result.tokens_per_second is not None
    assert result.tokens_per_second > 0
    assert result.peak_memory is not None
    assert 10**8 < result.peak_memory < 2 * 10**9
    assert sorted(tmp_path.rglob("*")) == before


def test_memory_that_runs_out_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(trial: Trial) -> Result:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")

    monkeypatch.setattr(tune_worker, "_run", run)
    file = tmp_path / "try.json"
    file.write_text('{"config": {}, "steps": 1}')
    monkeypatch.setattr("sys.argv", ["tune_worker", str(file)])
    assert tune_worker.main() == EXIT_FAILED
    assert json.loads((tmp_path / "result.json").read_text())["failed"] == "out of memory"
