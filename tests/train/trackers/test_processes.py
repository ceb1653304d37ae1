"""Senders as processes: real libraries on local files, and a fake one that hangs, dies or is down.

Training is a process without a model that is killed, and goes on from a checkpoint at step 6.
"""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.train.trackers._runs import COMET, noted
from toolkit.train.trackers.wandb_files import steps_in

TIMEOUT = 120


def train(folder: Path, configs: dict, how: str, first: int, last: int, **environ: str):
    words = [str(folder), json.dumps(configs), how, str(first), str(last)]
    return subprocess.run(
        [sys.executable, "-m", "tests.train.trackers._training", *words],
        env=os.environ | environ, capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip


def wait_for_end(output: str) -> None:
    """Until the senders of a training that was killed have ended, which they do by themselves."""
    pids = next(line for line in output.splitlines() if line.startswith("pids")).split()[1:]
    deadline = time.monotonic() + TIMEOUT
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a sender is left"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A run on three trackers whose machine is lost, and which goes on to its end."""
    place = tmp_path_factory.mktemp("real")
    folder = place / "runs" / "exp" / "first"
    common = {"enabled": True, "send_interval": 0.2, "flush_seconds": 60.0}
    configs = {
        "wandb": common | {"mode": "offline", "tags": ["t"]},
        "trackio": common | {"folder": str(place / "trackio")},
        "mlflow": common | {"notes": "why"},
    }
    environ = {"HF_HUB_OFFLINE": "1", "MLFLOW_TRACKING_URI": ""}
    first = train(folder, configs, "lose", 1, 11, **environ)
    assert first.returncode == -9, first.stderr
    sample = {"step": 20, "time": time.time(), "prompt": "a", "text": "b"}
    (folder / "metrics" / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    second = train(folder, configs, "finish", 7, 20, **environ)
    assert second.returncode == 0, second.stderr
    (folder.parent / "mlruns").rename(place / "mlruns")
    del configs["wandb"]
    configs["trackio"]["folder"] = str(place / "elsewhere")
    third = train(folder, configs, "finish", 21, 23, **environ)
    assert third.returncode == 0, third.stderr
    return folder, second.stderr


def sent(folder, field):
    return json.loads((folder / "trackers" / f"{field}.json").read_text())


@pytest.mark.slow
def test_wandb_offline_files_hold_each_step_once(real):
    folder, log = real
    files = sorted((folder / "trackers" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    steps = [list(steps_in(file)) for file in files]
    # The first may be empty: what the library held was lost, and sent again.
    assert [*steps[0], *steps[1]] == list(range(1, 21))
    assert {file.stem for file in files} == {f"run-{sent(folder, 'wandb')['run_id']}"}
    assert f"W&B: {files[1].parent}" in log
    assert b"val/loss" in files[1].read_bytes()
    assert b"d_model" in files[1].read_bytes()


def test_trackio_holds_each_step_once(real):
    folder, _ = real
    code = """
import json
from trackio.sqlite_storage import SQLiteStorage as S
print(json.dumps([S.get_logs("exp", "first"), S.get_run_config("exp", "first")], default=str))
"""
    environ = os.environ | {"TRACKIO_DIR": str(folder.parents[2] / "trackio")}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, check=True
    )
    rows, config = json.loads(found.stdout.splitlines()[-1])
    assert [row["step"] for row in rows] == list(range(1, 21))
    is_first = [row["train/loss"] < 100 for row in rows]  # as the first attempt had it
    assert is_first == sorted(is_first, reverse=True)
    assert sum(is_first) >= 8
    assert [row["step"] for row in rows if "val/loss" in row] == [4, 8, 12, 16, 20]
    assert "system/cpu_pct" in rows[-1]
    assert rows[-1]["samples"]
    assert config["model"] == {"d_model": 8}


def test_mlflow_holds_each_step_once(real):
    folder, log = real
    [run] = [p.parent for p in (folder.parents[2] / "mlruns").glob("*/*/metrics")]
    lines = (run / "metrics" / "train" / "loss").read_text().splitlines()
    assert [int(line.split()[2]) for line in lines] == list(range(1, 21))
    evals = (run / "metrics" / "val" / "loss").read_text().splitlines()
    assert [int(line.split()[2]) for line in evals] == [4, 8, 12, 16, 20]
    assert (run / "params" / "model.d_model").read_text() == "8"
    assert (run / "tags" / "mlflow.note.content").read_text() == "why"
    assert (run / "artifacts" / "samples" / "step20.txt").read_text() == "ab"
    assert "status: 3" in (run / "meta.yaml").read_text()  # FINISHED
    assert "not sent" not in log


def test_on_a_machine_without_the_store_all_is_sent_from_the_run_folder(real):
    folder, _ = real
    [losses] = (folder.parent / "mlruns").glob("*/*/metrics/train/loss")
    assert losses.parents[2].name == sent(folder, "mlflow")["run_id"]
    steps = [int(line.split()[2]) for line in losses.read_text().splitlines()]
    assert steps == list(range(1, 24))
    assert (folder.parents[2] / "elsewhere" / "exp.db").stat().st_size > 0
    assert sent(folder, "trackio")["row"] == 23


@pytest.fixture
def fake(tmp_path):
    """A folder with a fake of Comet's library, which writes down its calls."""
    (tmp_path / "comet_ml.py").write_text(COMET)
    calls = tmp_path / "calls"
    calls.touch()
    paths = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return calls, {"FAKE_CALLS": str(calls), "PYTHONPATH": paths}


def comet(**settings):
    return {"comet": {"enabled": True, "send_interval": 0.1, "flush_seconds": 30.0} | settings}


def test_a_killed_training_leaves_no_process_and_its_resume_no_gap(fake, tmp_path):
    calls, environ = fake
    folder = tmp_path / "runs" / "exp" / "first"
    killed = train(folder, comet(), "kill", 1, 11, **environ)
    assert killed.returncode == -9, killed.stderr
    wait_for_end(killed.stdout)
    assert noted(calls, "outcome") == [["outcome", "killed"]]
    finished = train(folder, comet(), "finish", 7, 20, **environ)
    assert noted(calls, "outcome")[1:] == [["outcome", "finished"]]
    assert [step for _, step, _ in noted(calls, "row")] == list(range(1, 21))
    assert Counter(loss > 100 for *_, loss in noted(calls, "row")) == {False: 10, True: 10}
    assert len({key for _, key in noted(calls, "start")}) == 1
    assert "Comet: https://fake" in finished.stderr
    assert "noise" not in finished.stdout + finished.stderr
    assert "noise" in (folder / "trackers" / "comet.log").read_text()


@pytest.mark.parametrize("mode", ["hang", "down", "exit"])
def test_the_end_waits_for_a_bounded_time_and_says_what_is_missing(fake, tmp_path, mode):
    calls, environ = fake
    folder = tmp_path / "runs" / "exp" / "first"
    ended = train(folder, comet(flush_seconds=1.0), "finish", 1, 11, FAKE_MODE=mode, **environ)
    assert ended.returncode == 0
    assert float(ended.stdout.split()[-1]) < 10
    said = "its process was killed or has failed" if mode == "exit" else "11 steps not sent"
    assert f"Comet: {said}; what is missing is sent by the next `toolkit resume`" in ended.stderr
    assert ("Comet: ConnectionError: refused; training goes on" in ended.stderr) == (mode == "down")
    if mode == "down":
        train(folder, comet(), "finish", 12, 14, **environ)
        assert [step for _, step, _ in noted(calls, "row")] == list(range(1, 15))
