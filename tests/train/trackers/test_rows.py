"""Rows for trackers: one for each step, complete, in order, each once."""

import json
import math

from tests.train.trackers._runs import write_steps
from toolkit.metrics.streams import MetricStreams
from toolkit.train.trackers import rows as rows_module
from toolkit.train.trackers.rows import FILES, Row, Rows


def write(folder, stream, *records):
    path = folder / FILES[stream]
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def rows_of(folder, *, sent=(), row=-1, streams=FILES):
    return Rows(folder, streams, sent=dict(sent), row=row)


def read(rows, *, is_over=False, most=200):
    rows.read()
    return rows.take(is_over=is_over, most=most)


def test_a_row_waits_until_the_next_step_and_has_all_streams(tmp_path):
    rows = rows_of(tmp_path)
    assert read(rows) == []
    write(tmp_path, "train", {"step": 1, "time": 5.0, "tokens": 8, "loss": 2.0, "note": "x"})
    assert read(rows) == []
    write(tmp_path, "eval", {"step": 1, "time": 7.0, "name": "val", "loss": 3.0, "tokens": 8})
    write(tmp_path, "network", {"step": 1, "time": 6.0, "grad_norm/total": "nan"})
    write(tmp_path, "samples", {"step": 2, "time": 9.0, "prompt": "a", "text": "b"})
    write(tmp_path, "train", {"step": 2, "time": 8.0, "tokens": 16, "loss": 1.0})
    [row] = read(rows)
    assert math.isnan(row.values.pop("network/grad_norm/total"))
    assert row == Row(1, 7.0, {"train/tokens": 8.0, "train/loss": 2.0, "val/loss": 3.0}, [])
    assert read(rows) == []
    last = Row(2, 9.0, {"train/tokens": 16, "train/loss": 1}, [{"prompt": "a", "text": "b"}])
    assert read(rows, is_over=True) == [last]
    assert (rows.row, read(rows, is_over=True)) == (2, [])


def test_rows_are_the_same_however_often_one_looks(tmp_path):
    with MetricStreams(tmp_path, tensorboard=()) as streams:
        write_steps(streams, 1, 23)
    at_once = read(rows_of(tmp_path), is_over=True)
    assert [row.step for row in at_once] == list(range(1, 24))
    assert [row.step for row in at_once if "val/loss" in row.values] == [4, 8, 12, 16, 20]
    rows, parts = rows_of(tmp_path), []
    while some := read(rows, is_over=True, most=2):
        assert len(some) <= 2
        parts += some
    assert parts == at_once
    later = read(rows_of(tmp_path, sent=rows_of(tmp_path).sent | {"train": 20}, row=20))
    assert [row.step for row in later] == [21, 22]


def test_a_record_that_comes_late_joins_the_next_row_once(tmp_path):
    write(tmp_path, "train", *({"step": s, "loss": 1.0} for s in (1, 2, 3)))
    rows = rows_of(tmp_path)
    assert [row.step for row in read(rows)] == [1, 2]
    write(tmp_path, "system", {"step": 2, "time": 4.0, "cpu_pct": 50.0})
    assert read(rows) == []
    write(tmp_path, "train", {"step": 4, "loss": 1.0})
    [row] = read(rows)
    assert (row.step, row.values) == (3, {"train/loss": 1.0, "system/cpu_pct": 50.0})
    again = rows_of(tmp_path, sent=rows.sent, row=rows.row)
    assert [list(row.values) for row in read(again, is_over=True)] == [["train/loss"]]
    write(tmp_path, "eval", {"step": 4, "name": "val", "loss": 2.0})  # an evaluation after a resume
    again = rows_of(tmp_path, sent={"train": 4, "system": 2}, row=4)
    assert [(r.step, r.values) for r in read(again, is_over=True)] == [(5, {"val/loss": 2.0})]
    assert read(again, is_over=True) == []
    # A longer run has step 5; a machine's samples wait for it.
    write(tmp_path, "system", {"step": 4, "time": 9.0, "cpu_pct": 70.0})
    again = rows_of(tmp_path, sent=again.sent, row=again.row)
    assert read(again, is_over=True) == []
    write(tmp_path, "train", *({"step": s, "loss": s / 10} for s in (5, 6)))
    later = rows_of(tmp_path, sent=again.sent, row=again.row)
    assert [(r.step, r.values) for r in read(later, is_over=True)] == [
        (5, {"train/loss": 0.5, "system/cpu_pct": 70.0}),
        (6, {"train/loss": 0.6}),
    ]


def test_steps_that_are_trained_again_are_not_rows_again(tmp_path):
    with MetricStreams(tmp_path, tensorboard=()) as streams:
        write_steps(streams, 1, 12)
    rows = rows_of(tmp_path)
    assert read(rows)[-1].step == 11
    with MetricStreams(tmp_path, tensorboard=(), resume_step=6) as streams:
        write_steps(streams, 7, 14, offset=100.0)
    found = read(rows_of(tmp_path, sent=rows.sent, row=rows.row), is_over=True)
    assert [row.step for row in found] == [12, 13, 14]
    assert [row.values["val/loss"] for row in found if "val/loss" in row.values] == [112.0]


def test_streams_are_selectable(tmp_path):
    with MetricStreams(tmp_path, tensorboard=()) as streams:
        write_steps(streams, 1, 9)
    names = {
        name
        for row in read(rows_of(tmp_path, streams=["eval", "network"]), is_over=True)
        for name in row.values
    }
    assert names == {"val/loss", "network/grad_norm/total"}


def test_little_is_held_and_nothing_is_lost_where_much_waits(tmp_path, monkeypatch):
    with MetricStreams(tmp_path, tensorboard=()) as streams:
        write_steps(streams, 1, 300)
        streams.write("system", [{"step": 300, "time": 1.0, "x": float(i)} for i in range(40)])
    with (tmp_path / FILES["train"]).open("a") as file:
        file.write('{"torn": \n[1]\n{"step": "7"}\n{"step": 301, "lo')
    whole = read(rows_of(tmp_path), is_over=True, most=1000)
    monkeypatch.setattr(rows_module, "_BLOCK", 700)
    monkeypatch.setattr(rows_module, "_MOST_WAITING", 10)
    rows, parts = rows_of(tmp_path), []
    for _ in range(300):
        rows.read()
        assert all(len(waiting) < 60 for waiting in rows._waiting.values())
        parts += rows.take(is_over=True)
    assert [row.step for row in parts] == list(range(1, 301))
    assert [(r.step, r.values) for r in parts] == [(r.step, r.values) for r in whole]
