"""Lines of JSON and TensorBoard events, read back by others' readers."""

import json
import math
import os

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

from toolkit.metrics import events
from toolkit.metrics.events import TensorBoardSink, masked_crc32c
from toolkit.metrics.lines import JsonlSink, Sink


def scalars(folder, tag):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_one_line_per_record_appended(tmp_path):
    path = tmp_path / "metrics" / "train.jsonl"
    for step in (1, 2):
        sink = JsonlSink(path)
        sink.write([{"step": step, "loss": 0.5, "mfu": None}, {"step": step + 10}])
        sink.write([])
        sink.close()
        sink.close()
    assert path.read_text().splitlines() == [
        '{"step":1,"loss":0.5,"mfu":null}', '{"step":11}',
        '{"step":2,"loss":0.5,"mfu":null}', '{"step":12}',
    ]  # fmt: skip


def test_non_finite_numbers_are_strings_that_float_reads_back(tmp_path):
    sink = JsonlSink(tmp_path / "a.jsonl")
    nan, inf = float("nan"), float("inf")
    sink.write([{"a": nan, "b": inf, "c": -inf, "d": [1.0, nan], "e": {"f": inf}}])
    sink.close()
    line = (tmp_path / "a.jsonl").read_text()
    assert line == '{"a":"nan","b":"inf","c":"-inf","d":[1.0,"nan"],"e":{"f":"inf"}}\n'
    assert math.isnan(float(json.loads(line)["a"]))


def test_scalars_of_numpy_and_torch_are_numbers_and_others_an_error(tmp_path):
    sink = JsonlSink(tmp_path / "a.jsonl")
    sink.write([{"a": np.float32(0.5), "b": torch.tensor(3), "c": np.float64("nan")}])
    assert (tmp_path / "a.jsonl").read_text() == '{"a":0.5,"b":3,"c":"nan"}\n'
    with pytest.raises(TypeError, match="cannot be written as a metric"):
        sink.write([{"a": object()}])
    sink.close()


def test_written_lines_are_in_the_file_before_sync(tmp_path):
    sink = JsonlSink(tmp_path / "a.jsonl")
    sink.write([{"step": 1}])
    assert (tmp_path / "a.jsonl").read_text() == '{"step":1}\n'
    sink.close()


def test_tensorboard_reads_every_number(tmp_path):
    sink = TensorBoardSink(tmp_path)
    for step in (1, 2, 3):
        record = {"step": step, "time": 1e9 + step, "loss": step / 4, "tokens": step * 10**12}
        sink.write([record | {"note": "text", "mfu": None}])
    sink.close()
    assert scalars(tmp_path, "loss") == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert [round(v / 1e12, 5) for _, v in scalars(tmp_path, "tokens")] == [1, 2, 3]
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert set(accumulator.Tags()["scalars"]) == {"loss", "tokens"}
    assert accumulator.Scalars("loss")[0].wall_time == 1e9 + 1


def test_a_long_file_of_events_is_followed_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr(events, "MAX_EVENT_BYTES", 200)
    sink = TensorBoardSink(tmp_path, purge_step=1)
    for step in range(1, 21):
        sink.write([{"step": step, "loss": float(step)}])
    sink.close()
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) > 3
    assert max(sizes) < 300
    assert scalars(tmp_path, "loss") == [(step, float(step)) for step in range(1, 21)]


def test_all_numbers_of_a_step_are_one_event(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write([{"step": s} | {f"v{i}": float(s * i) for i in range(10)} for s in (1, 2)])
    sink.close()
    (file,) = os.listdir(tmp_path)
    events = [Event.FromString(raw) for raw in RawEventFileLoader(str(tmp_path / file)).Load()]
    assert [(e.step, len(e.summary.value)) for e in events] == [(0, 0), (1, 10), (2, 10)]
    assert [v.simple_value for v in events[2].summary.value] == [2.0 * i for i in range(10)]


def test_name_is_the_prefix_of_tags(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write([{"step": 5, "name": "val", "loss": 1.5}])
    sink.close()
    assert scalars(tmp_path, "val/loss") == [(5, 1.5)]


def test_purge_step_makes_tensorboard_forget_what_comes_again(tmp_path, monkeypatch):
    monkeypatch.setattr("toolkit.metrics.events.time.time", lambda: 1e9)
    first = TensorBoardSink(tmp_path)
    first.write([{"step": s, "loss": 1.0} for s in range(1, 9)])
    first.close()
    monkeypatch.setattr("toolkit.metrics.events.time.time", lambda: 1e9 + 1)
    second = TensorBoardSink(tmp_path, purge_step=6)
    second.write([{"step": s, "loss": 2.0} for s in range(6, 10)])
    second.close()
    assert scalars(tmp_path, "loss") == [
        *((s, 1.0) for s in range(1, 6)), *((s, 2.0) for s in range(6, 10)),
    ]  # fmt: skip


def test_non_finite_and_huge_numbers_do_not_stop_tensorboard(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.write([{"step": 1, "loss": float("nan"), "ppl": float("inf"), "x": 1e300}])
    sink.close()
    assert math.isnan(scalars(tmp_path, "loss")[0][1])
    assert scalars(tmp_path, "x") == [(1, float("inf"))]


def test_what_tensorboard_cannot_say_is_said_as_nearly_as_it_can(tmp_path):
    sink = TensorBoardSink(tmp_path, purge_step=-3)
    big = 10**400
    sink.write([{"step": -2, "time": big, "a": big, "b": -big, "\ud800": 1.0, "name": "\udfff"}])
    sink.write([{"step": 2**70}, {"step": -(2**70)}])
    sink.close()
    (file,) = os.listdir(tmp_path)
    raw = list(RawEventFileLoader(str(tmp_path / file)).Load())
    found = [Event.FromString(event) for event in raw]
    assert [event.SerializeToString() for event in found] == raw
    assert [event.step for event in found[1:]] == [-3, -2, 2**63 - 1, -(2**63)]
    values = {value.tag: value.simple_value for value in found[2].summary.value}
    assert values == {"?/a": math.inf, "?/b": -math.inf, "?/?": 1.0}


def test_nothing_written_makes_no_file(tmp_path):
    sink = TensorBoardSink(tmp_path / "tb")
    sink.write([])
    sink.sync()
    sink.close()
    assert not (tmp_path / "tb").exists()


@pytest.mark.parametrize("kind", ["jsonl", "tensorboard"])
def test_a_full_disk_is_told_once_with_its_file(kind, tmp_path):
    """What it refused does not come again when the file is closed or collected."""
    path = tmp_path / "train.jsonl"
    sink = JsonlSink(path) if kind == "jsonl" else TensorBoardSink(tmp_path / "tb")
    sink.write([{"step": 1}])
    whole, sink._file = sink._file, open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    with pytest.raises(OSError, match="No space left on device") as caught:
        sink.write([{"step": 2}])
    assert caught.value.filename == str(path if kind == "jsonl" else tmp_path / "tb")
    sink._file.close()
    sink._file = whole
    sink.close()


def test_a_disk_that_takes_a_part_at_a_time_gets_all(tmp_path):
    class Slow:
        written = b""

        def write(self, data):
            self.written += bytes(data[:5])
            return min(5, len(data))

    sink = Sink(tmp_path)
    sink._file = Slow()
    sink._append(b"more than five bytes")
    assert sink._file.written == b"more than five bytes"


def test_tensorboard_does_not_make_a_removed_run_anew(tmp_path):
    sink = TensorBoardSink(tmp_path / "run" / "tb" / "eval")
    with pytest.raises(FileNotFoundError):
        sink.write([{"step": 1, "loss": 1.0}])
    assert not (tmp_path / "run").exists()


def test_checksums_are_those_of_tensorboard():
    sizes = [0, 1, 3, 4, 8, 509, 510, 511, 512, 513, 515, 516, 2000]
    texts = [np.random.default_rng(size).bytes(size) for size in sizes]
    expected = [pywrap_tensorflow.masked_crc32c(text) for text in texts]
    assert [int.from_bytes(found, "little") for found in masked_crc32c(texts)] == expected
    assert [int.from_bytes(masked_crc32c([t])[0], "little") for t in texts] == expected


def test_events_are_those_of_the_library_byte_for_byte(tmp_path):
    """Tags and steps whose lengths take several bytes among them."""
    record = {
        "step": 3_000_000_000,
        "time": 1.5e9,
        "name": "\u00e9" * 200,
        "a": True,
        "b": -math.inf,
    }
    record |= {f"norm/{'x' * n}": 0.1 * n for n in range(0, 300, 30)}
    sink = TensorBoardSink(tmp_path, purge_step=300)
    sink.write([record, {"step": 0, "x": 0.0}, {"step": 1}])
    sink.close()
    (file,) = os.listdir(tmp_path)
    raw = list(RawEventFileLoader(str(tmp_path / file)).Load())
    found = [Event.FromString(event) for event in raw]
    assert [event.SerializeToString() for event in found] == raw
    assert found[0].file_version == "brain.Event:2"
    assert (found[1].session_log.status, found[1].step) == (SessionLog.START, 300)
    values = {value.tag: value.simple_value for value in found[2].summary.value}
    assert (found[2].step, found[2].wall_time) == (record["step"], record["time"])
    assert values == {
        f"{record['name']}/{key}": np.float32(value)
        for key, value in record.items()
        if key not in ("step", "time", "name")
    }
