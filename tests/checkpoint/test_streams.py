"""A background save beside training on a GPU: who waits for the device, shown with streams that
only count."""

import contextlib
import threading
from pathlib import Path

import pytest
import torch

from toolkit.checkpoint import save_plan
from toolkit.checkpoint.save_plan import ShardWriter


class Stream:
    """The stream that training computes on."""

    device_type = "cuda"

    def __init__(self) -> None:
        self.waiting: list[str] = []

    def synchronize(self) -> None:
        self.waiting.append(threading.current_thread().name)

    def wait_stream(self, other: "Stream") -> None:
        self.waiting.append(threading.current_thread().name)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    """What DCP looks at, as on a machine with a GPU."""
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(
        "torch.distributed.checkpoint.filesystem._get_available_device_type", lambda: "cuda"
    )
    return stream


def test_writing_never_waits_for_training(stream: Stream, tmp_path: Path) -> None:
    shards = ShardWriter(None)
    resolve = shards.copy({f"model.{i}": torch.randn(1_000_000) for i in range(10)})
    writer = threading.Thread(target=shards.write, args=(tmp_path, resolve), name="checkpoint")
    writer.start()
    writer.join()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 40_000_000
    assert stream.waiting == []


def test_training_waits_once_for_all_copies_of_a_device(
    stream: Stream, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []

    class Source(torch.Tensor):
        """A host tensor that says it is on a GPU."""

        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda", 0)

        def detach(self) -> torch.Tensor:
            order.append("copy")
            return self.as_subclass(torch.Tensor)

    monkeypatch.setattr(
        save_plan, "_host_buffer", lambda source: torch.empty(source.shape, dtype=source.dtype)
    )
    monkeypatch.setattr(stream, "synchronize", lambda: order.append("wait"))
    shards = ShardWriter(None)
    tensors = {f"model.{i}": torch.randn(10).as_subclass(Source) for i in range(3)}
    # Planned on plain tensors: what DCP asks of a tensor is not the question here.
    shards._planned({name: torch.empty(10) for name in tensors})
    planner = save_plan.DefaultSavePlanner()
    planner.resolve_data = lambda item: tensors[item.index.fqn]  # type: ignore[method-assign]
    monkeypatch.setattr(shards, "_planned", lambda _: planner)
    resolve = shards.copy(tensors)
    assert order == ["copy", "copy", "copy", "wait"]
    for item in shards._plan.items:
        assert torch.equal(resolve(item), tensors[item.index.fqn].as_subclass(torch.Tensor))
