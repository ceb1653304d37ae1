"""Four streams; exactly one line per step after any crash and resume."""

import json
import threading

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from toolkit.metrics.streams import STREAMS, MetricStreams
from toolkit.runs.files import RUN_FILES


def lines(folder, stream):
    text = (folder / "metrics" / f"{stream}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_files_are_those_of_the_run_folder(tmp_path):
    with MetricStreams(tmp_path) as streams:
        for stream in STREAMS:
            streams.write(stream, [{"step": 1, "x": 1.0}])
    for stream in STREAMS:
        assert (tmp_path / getattr(RUN_FILES, f"{stream}_metrics")).stat().st_size > 0
        assert len(list((tmp_path / RUN_FILES.tensorboard / stream).iterdir())) == 1


def test_train_lines_start_with_the_promised_fields_in_order(tmp_path):
    shuffled = {"zeta": 1.0} | dict.fromkeys(reversed(STREAMS["train"]), 1)
    with MetricStreams(tmp_path, tensorboard=()) as streams:
        streams.write("train", [shuffled])
        streams.write("train", [{"loss": 2.0, "step": 2, "extra": 3}])
    assert list(lines(tmp_path, "train")[0]) == [*STREAMS["train"], "zeta"]
    assert list(lines(tmp_path, "train")[1]) == ["step", "loss", "extra"]
    assert not (tmp_path / "tb").exists()


def test_crash_and_resume_leave_one_line_per_step_everywhere(tmp_path):
    streams = MetricStreams(tmp_path)
    for stream in STREAMS:
        streams.write(stream, [{"step": s, "v": 1.0} for s in range(1, 9)])
        with (tmp_path / "metrics" / f"{stream}.jsonl").open("ab") as file:
            file.write(b'{"step":9,"v')  # a crash, so no close
    with MetricStreams(tmp_path, resume_step=5) as resumed:
        for stream in STREAMS:
            resumed.write(stream, [{"step": s, "v": 2.0} for s in range(6, 11)])
    expected = [(s, 1.0 if s <= 5 else 2.0) for s in range(1, 11)]
    for stream in STREAMS:
        assert [(line["step"], line["v"]) for line in lines(tmp_path, stream)] == expected
        accumulator = EventAccumulator(str(tmp_path / "tb" / stream))
        accumulator.Reload()
        assert [(e.step, e.value) for e in accumulator.Scalars("v")] == expected


def test_new_start_in_a_folder_without_checkpoint_records_from_the_beginning(tmp_path):
    with MetricStreams(tmp_path) as streams:
        streams.write("eval", [{"step": 0, "name": "val", "loss": 9.0}])
        streams.write("train", [{"step": 1, "loss": 9.0}])
    with MetricStreams(tmp_path) as streams:
        streams.write("eval", [{"step": 0, "name": "val", "loss": 8.0}])
        streams.write("train", [{"step": 1, "loss": 8.0}])
    assert [line["loss"] for line in lines(tmp_path, "train")] == [8.0]
    assert [line["loss"] for line in lines(tmp_path, "eval")] == [8.0]
    accumulator = EventAccumulator(str(tmp_path / "tb" / "train"))
    accumulator.Reload()
    assert [e.value for e in accumulator.Scalars("loss")] == [8.0]


def test_other_ranks_write_nothing(tmp_path):
    with MetricStreams(tmp_path, is_main=False) as streams:
        streams.write("train", [{"step": 1}])
        streams.sync()
    assert list(tmp_path.iterdir()) == []


def test_unknown_stream_is_an_error_on_every_rank(tmp_path):
    for is_main in (True, False):
        streams = MetricStreams(tmp_path, is_main=is_main)
        with pytest.raises(ValueError, match="no such stream: 'trian'"):
            streams.write("trian", [{"step": 1}])
        streams.close()


def test_writing_from_many_threads_tears_no_line(tmp_path):
    streams = MetricStreams(tmp_path, tensorboard=())

    def work(worker):
        for step in range(50):
            streams.write("system", [{"step": step, "worker": worker, "pad": "x" * 500}])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    streams.close()
    streams.write("system", [{"step": 99}])  # a straggler after close is dropped
    assert len(lines(tmp_path, "system")) == 200


def test_what_is_removed_is_told_in_one_line_without_zeros(tmp_path, caplog):
    with MetricStreams(tmp_path, tensorboard=()) as streams:
        streams.write("train", [{"step": s} for s in range(1, 9)])
        streams.write("eval", [{"step": s} for s in (5, 6)])
        streams.write("network", [{"step": 5}])
    with (tmp_path / "metrics" / "train.jsonl").open("ab") as file:
        file.write(b'{"step":9,"v')
    with caplog.at_level("INFO", logger="toolkit.metrics.streams"):
        MetricStreams(tmp_path, tensorboard=(), resume_step=5).close()
        MetricStreams(tmp_path, tensorboard=(), resume_step=5).close()
        MetricStreams(tmp_path, tensorboard=()).close()
    where = tmp_path / "metrics"
    assert caplog.messages == [
        f"{where}: removed 3 lines of train.jsonl, 1 line of eval.jsonl after step 5 "
        "and 1 damaged line of train.jsonl",
        f"{where}: removed 5 lines of train.jsonl, 1 line of eval.jsonl, "
        "1 line of network.jsonl of a start without a checkpoint",
    ]
