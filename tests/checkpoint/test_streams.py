"""A background save beside training on a GPU: who waits for the device, shown with streams that
only count."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.checkpoint import host_copy
from toolkit.checkpoint.host_copy import HostCopy, Shard, changed_by_optimizer
from toolkit.checkpoint.save_plan import ShardWriter
from toolkit.distributed import devices

GPU = torch.device("cuda", 0)


class Stream:
    """A stream of a GPU that writes down what is asked of it."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(f"{self.name} after {other.name}")

    def wait_event(self, event: "Event") -> None:
        self.log.append(f"{self.name} after event")

    def synchronize(self) -> None:
        self.log.append(f"{threading.current_thread().name} waits for {self.name}")


class Event:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def record(self, stream: Stream) -> None:
        self.log.append(f"event on {stream.name}")

    def synchronize(self) -> None:
        self.log.append(f"{threading.current_thread().name} waits")


class OnGPU(torch.Tensor):
    """A host tensor that says it is on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of a machine with a GPU."""
    log: list[str] = []
    training = Stream("training", log)

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        log.append(f"copies on {stream.name}")
        yield

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: training)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream("side", log))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: Event(log))
    monkeypatch.setattr(
        "torch.distributed.checkpoint.filesystem._get_available_device_type", lambda: "cuda"
    )
    return log


def shards_on_gpu(*names: str) -> list[Shard]:
    sources = [torch.randn(10).as_subclass(OnGPU) for _ in names]
    return [
        Shard(host_copy.MetadataIndex(name), source, torch.empty(10))
        for name, source in zip(names, sources, strict=True)
    ]


def in_thread(action: Any) -> None:
    writer = threading.Thread(target=action, name="writer")
    writer.start()
    writer.join()


def test_writing_never_waits_for_training(log: list[str], tmp_path: Path) -> None:
    shards = ShardWriter(None)
    resolve = shards.copy({f"model.{i}": torch.randn(1_000_000) for i in range(10)})
    in_thread(lambda: shards.write(tmp_path, resolve))
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 40_000_000
    assert log == []


COPIES = ["side after training", "copies on side", "event on side"]


def test_copies_of_a_gpu_are_waited_for_by_the_writer_alone(log: list[str]) -> None:
    shards = shards_on_gpu("model.a", "model.b")
    copy = HostCopy(shards)
    # Training's own stream goes on when they are done, its thread at once.
    assert log == [*COPIES, "training after event"]
    in_thread(copy.finish)
    assert log[4:] == ["writer waits"]
    for shard in shards:
        assert torch.equal(shard.buffer, shard.source.as_subclass(torch.Tensor))


def test_late_copies_of_a_gpu_run_beside_the_next_forward(log: list[str]) -> None:
    copy = HostCopy(shards_on_gpu("model.a", "optim.a.x"), late={"optim.a.x"})
    assert log == [*COPIES, "training after event", *COPIES]
    log.clear()
    copy.hold_back()
    assert log == ["training after event"] * 2


def test_late_copies_on_the_cpu_are_made_by_the_writer() -> None:
    source = torch.ones(10)
    shard = Shard(host_copy.MetadataIndex("optim.a.x"), source, torch.zeros(10))
    copy = HostCopy([shard], late={"optim.a.x"})
    assert not shard.buffer.any()
    changed = threading.Event()

    def train() -> None:
        copy.hold_back()
        source.zero_()
        changed.set()

    trainer = threading.Thread(target=train)
    trainer.start()
    assert not changed.wait(0.05)
    copy.finish()
    trainer.join(10)
    assert changed.is_set()
    assert shard.buffer.all()


def test_a_late_copy_that_fails_lets_training_go_on(tmp_path: Path) -> None:
    shards = ShardWriter(None)
    copy = shards.copy({"optim.a.x": torch.ones(10)}, late={"optim.a.x"})
    (late,) = copy._late_on_cpu
    copy._late_on_cpu = [late._replace(buffer=torch.zeros(9))]
    copy.finish()
    copy.hold_back()
    for _ in range(2):  # in what all ranks of a save agree about
        with pytest.raises(RuntimeError, match="size"):
            shards.write(tmp_path, copy)


def test_what_a_forward_may_change_is_never_late() -> None:
    names = ["model.a.weight", "model.a.mean", "optim.a.weight.exp_avg", "callback.ema.a.weight"]
    assert changed_by_optimizer(names) == {"model.a.weight", "optim.a.weight.exp_avg"}


def test_host_memory_for_a_gpu_is_locked_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[int] = []

    class Runtime:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
            locked.append(address)
            return 0

        def cudaHostUnregister(self, address: int) -> int:
            locked.remove(address)
            return 0

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "check_error", lambda code: None)
    memory = devices.host_memory(3_000_000, {GPU})
    assert memory.nbytes == 3_000_000  # not a power of two
    assert locked == [memory.data_ptr()]
    del memory
    assert locked == []
    devices.host_memory(1000, {torch.device("cpu")})
    assert locked == []
