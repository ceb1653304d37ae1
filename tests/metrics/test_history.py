"""`read_history`: columns of a run's metrics."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from toolkit.errors import RunError
from toolkit.metrics.history import read_history


def write(folder: Path, stream: str, lines: list[object], end: str = "\n") -> Path:
    path = folder / "metrics" / f"{stream}.jsonl"
    path.parent.mkdir(exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text + end)
    return path


def step(number: int, loss: object, **more: object) -> dict[str, object]:
    return {"step": number, "tokens": number * 10, "time": 1e9 + number, "loss": loss, **more}


def test_train_and_evaluations_are_columns(tmp_path):
    write(tmp_path, "train", [step(1, 3.0, mfu=0.5), step(2, "nan"), step(3, 1.5, instances=[1])])
    evals = [step(2, 4.0, name="val"), step(2, 5.0, name="arc", accuracy=0.3), step(3, 3.5)]
    write(tmp_path, "eval", evals)
    history = read_history(tmp_path)
    loss = history.train["loss"]
    assert loss.step.tolist() == [1, 2, 3]
    assert loss.tokens.tolist() == [10, 20, 30]
    assert loss.time.tolist() == [1e9 + 1, 1e9 + 2, 1e9 + 3]
    assert loss.value[[0, 2]].tolist() == [3.0, 1.5]
    assert math.isnan(loss.value[1])
    assert history.train["mfu"].step.tolist() == [1]
    assert sorted(history.train) == ["loss", "mfu"]  # lists are no metric
    assert sorted(history.eval) == ["arc/accuracy", "arc/loss", "loss", "val/loss"]
    assert history.eval["val/loss"].value.tolist() == [4.0]
    assert history.network == history.system == {}
    assert sorted(read_history(tmp_path, ["loss"]).eval) == ["arc/loss", "loss", "val/loss"]
    assert sorted(read_history(tmp_path, ["val/loss"]).eval) == ["val/loss"]


def test_of_steps_written_twice_the_last_attempt_counts(tmp_path):
    first = [step(n, 1.0, attempt=1) for n in range(1, 7)]
    write(tmp_path, "train", [*first, *(step(n, 2.0, attempt=2) for n in (4, 5))])
    loss = read_history(tmp_path).train["loss"]
    assert loss.step.tolist() == [1, 2, 3, 4, 5]
    assert loss.value.tolist() == [1, 1, 1, 2, 2]
    write(tmp_path, "system", [step(n, 1.0) for n in (1, 1, 2, 3, 2)])
    system = read_history(tmp_path, streams=["system"]).system["loss"]
    assert system.step.tolist() == [1, 1, 2, 2]


def test_damaged_and_unfinished_lines_are_left_out(tmp_path):
    lines = [step(1, 1.0), '{"step": 2, "lo', "\x00\x00", '{"step": 1e300}', step(3, 3.0)]
    path = write(tmp_path, "train", [*lines, '{"step": 4, "tokens": 4, "loss": 4.0}'], end="")
    assert read_history(tmp_path).train["loss"].step.tolist() == [1, 3]
    with path.open("a") as file:
        file.write("\n")
    loss = read_history(tmp_path).train["loss"]
    assert loss.step.tolist() == [1, 3, 4]
    assert math.isnan(loss.time[2])
    write(tmp_path, "train", ["x" * (1 << 21)], end="")
    with pytest.raises(RunError, match="has a line of more than"):
        read_history(tmp_path)
    assert read_history(tmp_path / "nowhere").train == {}


def test_blocks_of_a_file_are_one_series(tmp_path, monkeypatch):
    lines = [step(n, n / 7, **({"late": n} if n > 90 else {})) for n in range(1, 101)]
    write(tmp_path, "train", lines)
    whole = read_history(tmp_path).train
    monkeypatch.setattr("toolkit.metrics.history._BLOCK", 300)
    in_blocks = read_history(tmp_path).train
    for name in ("loss", "late"):
        for one, other in zip(whole[name], in_blocks[name], strict=True):
            assert np.array_equal(one, other)
    assert in_blocks["late"].step.tolist() == list(range(91, 101))


def test_fewer_points_keep_minima_and_maxima(tmp_path):
    losses: list[object] = [math.sin(n / 50) for n in range(2000)]
    losses[777], losses[1234], losses[1500] = 9.0, -9.0, "nan"
    write(tmp_path, "train", [step(n, loss) for n, loss in enumerate(losses)])
    loss = read_history(tmp_path, points=100).train["loss"]
    assert 50 < len(loss.step) <= 103
    found = dict(zip(loss.step.tolist(), loss.value.tolist(), strict=True))
    assert found[777] == 9.0
    assert found[1234] == -9.0
    assert math.isnan(found[1500])
    assert loss.step[0] == 0
    assert loss.step[-1] == 1999
