"""MetricsRecorder: order, one reduction per block, errors that surface."""

import threading
import time

import pytest
import torch

from toolkit.errors import TrainingError
from toolkit.metrics.recorder import MetricsRecorder


class Collected:
    """A `deliver` that keeps what came, block by block."""

    def __init__(self):
        self.blocks = []

    def __call__(self, stream, records):
        self.blocks.append((stream, records))

    def records(self, stream="train"):
        return [record for name, block in self.blocks if name == stream for record in block]


@pytest.fixture
def collected():
    return Collected()


def test_every_step_arrives_once_in_order_with_its_names_in_order(collected):
    recorder = MetricsRecorder(collect_interval=4, deliver=collected)
    for step in range(1, 11):
        loss = torch.tensor(step / 2)
        recorder.record(step, {"loss": loss, "lr": 1e-3, "tokens": step * 8, "name": "a"})
    recorder.close()
    assert [r["step"] for r in collected.records()] == list(range(1, 11))
    assert list(collected.records()[0]) == ["step", "loss", "lr", "tokens", "name"]
    assert collected.records()[6] == {"step": 7, "loss": 3.5, "lr": 1e-3, "tokens": 56, "name": "a"}
    assert [len(block) for _, block in collected.blocks] == [4, 4, 2]  # steps 4 and 8 close blocks


def test_blocks_close_at_the_same_steps_after_a_resume(collected):
    recorder = MetricsRecorder(collect_interval=4, deliver=collected, start_step=6)
    for step in range(7, 13):
        recorder.record(step, {"x": 1})
    recorder.flush()
    assert [[r["step"] for r in block] for _, block in collected.blocks] == [
        [7, 8],
        [9, 10, 11, 12],
    ]
    with pytest.raises(ValueError, match="train: step 12 was recorded before"):
        recorder.record(12, {"x": 1})
    recorder.close()


def test_several_parts_make_one_record_of_a_step(collected):
    recorder = MetricsRecorder(collect_interval=4, deliver=collected)
    for step in (1, 2):
        shared = {"time": float(step)}
        recorder.add(step, {"norm": torch.tensor(2.0)}, stream="network", shared=shared)
        recorder.add(step, {"max": 3.0}, {"max": "max"}, stream="network", shared={"time": 9.0})
        with pytest.raises(ValueError, match=f"network: norm of step {step} was recorded before"):
            recorder.add(step, {"norm": 1.0}, stream="network", shared=shared)
    recorder.close()
    assert collected.records("network") == [
        {"step": step, "time": float(step), "norm": 2.0, "max": 3.0} for step in (1, 2)
    ]


def test_blocks_of_short_steps_are_delivered_together_and_never_late(collected):
    recorder = MetricsRecorder(collect_interval=1, deliver=collected, least_seconds=0.1)
    for step in range(1, 30):
        recorder.record(step, {"x": step})
    deadline = time.monotonic() + 20
    while len(collected.records()) < 29 and time.monotonic() < deadline:
        time.sleep(0.01)  # no later step brings them
    recorder.close()
    assert [r["x"] for r in collected.records()] == list(range(1, 30))
    assert len(collected.blocks) < 29


def test_a_flush_waits_for_no_other_block(collected):
    recorder = MetricsRecorder(collect_interval=1, deliver=collected, least_seconds=100.0)
    for step in range(1, 4):
        recorder.record(step, {"x": step})
        if step != 2:
            recorder.begin_flush().done.result(timeout=50)
    assert [r["x"] for r in collected.records()] == [1, 2, 3]
    recorder.close()


def test_what_follows_a_flush_sees_nothing_later():
    delivered, may_deliver, is_busy = [], threading.Event(), threading.Event()

    def deliver(_, records):
        is_busy.set()
        assert may_deliver.wait(20)
        delivered.extend(record["step"] for record in records)

    recorder = MetricsRecorder(collect_interval=1, deliver=deliver, least_seconds=1e-6)
    recorder.record(1, {"x": 1})
    assert is_busy.wait(20)
    pending = []
    for step in (2, 3):  # both before the thread comes to either
        recorder.record(step, {"x": step})
        pending.append(recorder.begin_flush(lambda: list(delivered)))
    recorder.record(4, {"x": 4})
    may_deliver.set()
    assert [flush.wait() for flush in pending] == [[1, 2], [1, 2, 3]]
    recorder.close()
    assert delivered == [1, 2, 3, 4]


def test_step_of_an_earlier_attempt_is_refused(collected):
    recorder = MetricsRecorder(collect_interval=4, deliver=collected, start_step=6)
    with pytest.raises(ValueError, match="train: step 6 was recorded before"):
        recorder.record(6, {"x": 1})
    recorder.close()


def test_one_reduction_per_block_sees_only_what_asks_for_it(collected):
    calls = []

    def reduce(columns, values):
        """Two ranks; the other one has values ten times ours."""
        calls.append((columns, values.tolist()))
        operations = {"sum": lambda x: 11 * x, "mean": lambda x: 5.5 * x, "max": lambda x: 10 * x}
        pairs = zip(columns, values.tolist(), strict=True)
        return torch.tensor([operations[op](x) for (_, op), x in pairs], dtype=torch.float64)

    recorder = MetricsRecorder(collect_interval=2, deliver=collected, reduce=reduce)
    reductions = {"loss": "mean", "targets": "sum", "wait": "max", "rank": "none"}
    for step in (1, 2):
        values = {
            "loss": torch.tensor(2.0),
            "rank": 0,
            "targets": torch.tensor(3_000_000_007),
            "wait": 0.5,
            "lr": 0.25,
        }
        recorder.record(step, values, reductions)
    recorder.close()
    columns = [("loss", "mean"), ("targets", "sum"), ("wait", "max")]
    assert calls == [(columns * 2, [2.0, 3e9 + 7, 0.5] * 2)]
    assert collected.records()[0] == {
        "step": 1, "loss": 11.0, "rank": 0, "targets": 33_000_000_077, "wait": 5.0, "lr": 0.25,
    }  # fmt: skip
    assert isinstance(collected.records()[0]["targets"], int)


def test_whole_numbers_stay_whole_unless_averaged(collected):
    recorder = MetricsRecorder(collect_interval=1, deliver=collected, reduce=lambda _, x: x * 1.5)
    recorder.record(1, {"a": torch.tensor(2), "b": torch.tensor(3)}, {"a": "sum", "b": "mean"})
    recorder.close()
    assert collected.records() == [{"step": 1, "a": 3, "b": 4.5}]
    assert isinstance(collected.records()[0]["a"], int)


def test_non_finite_values_pass_through(collected):
    recorder = MetricsRecorder(collect_interval=1, deliver=collected, reduce=lambda _, x: x)
    recorder.record(1, {"a": torch.tensor(float("nan")), "b": float("inf")}, {"b": "max"})
    recorder.close()
    record = collected.records()[0]
    assert record["a"] != record["a"]
    assert record["b"] == float("inf")


def test_other_streams_travel_with_the_train_block(collected):
    recorder = MetricsRecorder(collect_interval=2, deliver=collected)
    for step in range(1, 5):
        if step % 2 == 0:
            recorder.record(step, {"norm": float(step)}, stream="network")
        recorder.record(step, {"loss": float(step)})
    recorder.flush()
    assert [r["step"] for r in collected.records("train")] == [1, 2, 3, 4]
    assert collected.records("network") == [{"step": 2, "norm": 2.0}, {"step": 4, "norm": 4.0}]
    recorder.close()


def test_several_evaluations_of_one_step_are_fine_but_not_an_earlier_one(collected):
    recorder = MetricsRecorder(collect_interval=2, deliver=collected, start_step=4)
    recorder.record(6, {"name": "a"}, stream="eval")
    recorder.record(6, {"name": "b"}, stream="eval")
    for step in (4, 5):
        with pytest.raises(ValueError, match=f"eval: step {step} was recorded before"):
            recorder.record(step, {"name": "c"}, stream="eval")
    recorder.close()
    assert [record["name"] for record in collected.records("eval")] == ["a", "b"]


def test_an_evaluation_of_the_step_resumed_from_is_fine(collected):
    recorder = MetricsRecorder(collect_interval=5, deliver=collected, start_step=6)
    recorder.record(6, {"loss": 1.0}, stream="eval")
    with pytest.raises(ValueError, match="eval: step 5 was recorded before"):
        recorder.record(5, {"loss": 1.0}, stream="eval")
    recorder.close()


def test_flush_delivers_all_and_then_syncs_on_the_delivering_thread(collected):
    synced = []

    def sync():
        synced.append((len(collected.records()), threading.current_thread().name))

    recorder = MetricsRecorder(collect_interval=100, deliver=collected, sync=sync)
    for step in (1, 2, 3):
        recorder.record(step, {"x": 1})
    assert collected.blocks == []
    recorder.flush()
    assert synced == [(3, "metrics")]
    recorder.close()


def test_error_of_a_sink_surfaces_at_flush_and_at_the_next_record():
    def deliver(stream, records):
        raise OSError(28, "No space left on device")

    recorder = MetricsRecorder(collect_interval=1, deliver=deliver)
    recorder.record(1, {"x": 1})
    with pytest.raises(TrainingError, match="No space left on device"):
        recorder.flush()
    with pytest.raises(TrainingError, match="No space left on device"):
        recorder.record(2, {"x": 1})
    with pytest.raises(TrainingError):
        recorder.close()
    assert not recorder._worker.is_alive()


def test_our_own_errors_keep_their_words():
    def reduce(columns, values):
        raise TrainingError("rank 1 on host b is gone")

    recorder = MetricsRecorder(collect_interval=1, deliver=Collected(), reduce=reduce)
    recorder.record(1, {"x": 1}, {"x": "sum"})
    with pytest.raises(TrainingError, match=r"^rank 1 on host b is gone$"):
        recorder.flush()
    recorder.close(flush=False)


def test_close_without_flush_starts_no_reduction(collected):
    calls = []
    recorder = MetricsRecorder(
        collect_interval=10, deliver=collected, reduce=lambda c, x: calls.append(c) or x
    )
    recorder.record(1, {"x": 1.0}, {"x": "sum"})
    recorder.close(flush=False)
    recorder.close()  # a second time
    assert (calls, collected.blocks) == ([], [])


def test_a_device_scalar_may_have_one_dimension(collected):
    recorder = MetricsRecorder(collect_interval=1, deliver=collected)
    recorder.record(1, {"x": torch.tensor([2.5])})
    recorder.close()
    assert collected.records() == [{"step": 1, "x": 2.5}]


def test_device_values_travel_in_one_copy_per_block(collected, monkeypatch):
    """The path of an accelerator, with the CPU in its place."""
    copies, waited = [], []

    class Event:
        def synchronize(self):
            waited.append(len(copies))

    def pinned(size):
        copies.append(size)
        return torch.empty(size, dtype=torch.float64)

    monkeypatch.setattr("toolkit.metrics.recorder._on_host", lambda tensor: False)
    monkeypatch.setattr("toolkit.metrics.recorder._pinned", pinned)
    monkeypatch.setattr("toolkit.metrics.recorder._record_event", lambda device: Event())
    recorder = MetricsRecorder(collect_interval=2, deliver=collected)
    for step in range(1, 5):
        loss = torch.tensor([step / 4], requires_grad=True)
        norm = torch.tensor(step, dtype=torch.bfloat16)
        values = {"n": torch.tensor(step * 10**10), "loss": loss, "lr": 0.5, "norm": norm}
        recorder.record(step, values)
    recorder.close()
    assert copies == [6, 6]
    assert len(waited) == 2
    assert collected.records() == [
        {"step": s, "n": s * 10**10, "loss": s / 4, "lr": 0.5, "norm": s} for s in range(1, 5)
    ]
    assert [type(v) for v in collected.records()[0].values()] == [int, int, float, float, float]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_values_arrive_without_a_sync_of_the_training_thread(collected):
    recorder = MetricsRecorder(collect_interval=5, deliver=collected)
    recorder.record(1, {"x": torch.ones((), device="cuda")})  # first use initialises
    recorder.flush()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2, 12):
            loss = torch.full((), step / 4, device="cuda")
            recorder.record(step, {"loss": loss, "n": loss.long(), "lr": 0.5})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    recorder.close()
    assert collected.records()[1:] == [
        {"step": s, "loss": s / 4, "n": int(s / 4), "lr": 0.5} for s in range(2, 12)
    ]
