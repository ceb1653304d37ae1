"""`MetricsRecorder`: values of every step, delivered without ever making the device wait.

What happens to one value:

1. `record` keeps a reference, nothing else; a device scalar stays on the device.
2. Every `collect_interval` steps the scalars of the block are stacked into one tensor, whose copy
   to pinned host memory is started but not awaited.
3. A background thread waits for that copy, reduces the whole block over ranks with one call of
   `reduce`, and gives the block, one dict per step in step order, to `deliver`.

Every rank must record the same names in the same order at the same steps: the blocks of all ranks
are then alike, and so are the calls of `reduce`.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch

from toolkit.errors import ToolkitError, TrainingError, reason_of_machine
from toolkit.threads import Thread

Reduction = Literal["sum", "mean", "max", "none"]
Value = torch.Tensor | float | int | str | None
Column = tuple[str, str]
"""Name of a value and its reduction over ranks."""
Reduce = Callable[[list[Column], torch.Tensor], torch.Tensor]
"""`reduce(columns, values)`: `values` is a float64 CPU tensor `(len(columns),)`, the answer too."""
Deliver = Callable[[str, list[dict[str, Any]]], None]
"""`deliver(stream, records)`: records in step order, each with "step" first."""

TRAIN = "train"
"""The stream whose steps close blocks."""


class _Record(NamedTuple):
    stream: str
    step: int
    values: Mapping[str, Value]
    reductions: Mapping[str, Reduction]


class _Copy(NamedTuple):
    """A transfer under way: the host tensor, the groups inside it, what to wait for."""

    host: torch.Tensor
    groups: list[tuple[torch.dtype, int]]
    event: Any


class _Block(NamedTuple):
    records: list[_Record]
    copies: dict[torch.device, _Copy]


class PendingFlush:
    """What `begin_flush` started."""

    def __init__(self, recorder: "MetricsRecorder", after: Callable[[], Any] | None) -> None:
        self._recorder = recorder
        self._after = after
        self._done = threading.Event()
        self._result: Any = None

    def wait(self) -> Any:
        """Block until it is done; the result of `after`. Any thread may call it.

        Raises:
            TrainingError: when delivering failed.
        """
        while not self._done.wait(timeout=1.0):
            self._recorder._check_alive()
        self._recorder._check_error()
        return self._result

    def _finish(self, *, succeeded: bool) -> None:
        try:
            if succeeded and self._after is not None:
                self._result = self._after()
        finally:
            self._done.set()


class MetricsRecorder:
    """See the head of this module.

    `collect_interval` is in steps. `reduce` is None for a single rank. `sync`, if given, is called
    by `flush` after the last delivery, to bring the sinks' files to disk. `start_step` is the last
    step that an earlier attempt recorded: only later ones may come, in other streams that one too.
    """

    def __init__(
        self,
        *,
        collect_interval: int,
        deliver: Deliver,
        reduce: Reduce | None = None,
        sync: Callable[[], None] | None = None,
        start_step: int = 0,
    ) -> None:
        self._interval = collect_interval
        self._reduce = reduce
        self._deliver = deliver
        self._sync = sync
        self._start_step = start_step
        self._boundary = self._next_boundary(start_step)
        self._last_step: dict[str, int] = {}
        self._pending: list[_Record] = []
        self._error: BaseException | None = None
        self._queue: queue.SimpleQueue[_Block | PendingFlush | None] = queue.SimpleQueue()
        self._thread = Thread(target=self._work, name="metrics", daemon=True)
        self._thread.start()

    def record(
        self,
        step: int,
        values: Mapping[str, Value],
        reductions: Mapping[str, Reduction] | None = None,
        *,
        stream: str = TRAIN,
    ) -> None:
        """Keep the values of one step; a name without a reduction is not reduced.

        Tensors hold one element, are detached, and must not be changed afterwards; neither must
        the mappings. Other streams' records go out with the block of the train record that
        follows. Steps must grow in train, and not shrink in other streams.

        Raises:
            TrainingError: when delivering earlier values failed.
        """
        self._check_error()
        last = self._last_step.get(stream, self._start_step)
        if stream != TRAIN:
            last -= 1
        if step <= last:
            raise ValueError(f"{stream}: step {step} was recorded before")
        self._last_step[stream] = step
        self._pending.append(_Record(stream, step, values, reductions or {}))
        if stream == TRAIN and step >= self._boundary:
            self._boundary = self._next_boundary(step)
            self._hand_over()

    def flush(self) -> None:
        """Block until everything recorded so far is delivered and synced to disk.

        All ranks must call it at the same step: the block it closes is reduced like any other.

        Raises:
            TrainingError: when delivering failed.
        """
        self.begin_flush().wait()

    def begin_flush(self, after: Callable[[], Any] | None = None) -> PendingFlush:
        """Like `flush`, but without waiting: that is done by whoever needs it.

        `after` is called in the delivering thread when everything up to here, and nothing later, is
        delivered.
        """
        self._hand_over()
        pending = PendingFlush(self, after)
        self._queue.put(pending)
        return pending

    def close(self, *, flush: bool = True) -> None:
        """Flush and stop the thread.

        `flush=False` is for a rank that fails: other ranks may not come to a reduction any more,
        so values that were not handed over yet are dropped and a stuck one is not awaited.
        """
        try:
            if flush and self._thread.is_alive():
                self.flush()
        finally:
            self._pending = []
            self._queue.put(None)
            self._thread.join(timeout=None if flush and self._error is None else 2.0)

    def _next_boundary(self, step: int) -> int:
        return (step // self._interval + 1) * self._interval

    def _check_alive(self) -> None:
        if not self._thread.is_alive():
            raise TrainingError("metrics: the delivering thread is gone; see the log")

    def _check_error(self) -> None:
        error = self._error
        if error is None:
            return
        if isinstance(error, ToolkitError):
            raise error
        if isinstance(error, OSError):
            reason = reason_of_machine(error) or f"{error}: look at the run folder"
            text = f"metrics cannot be written: {reason}; then go on with `toolkit resume`"
        else:
            text = f"metrics: recording failed: {type(error).__name__}: {error}"
        raise TrainingError(text) from error

    def _hand_over(self) -> None:
        if self._pending:
            records, self._pending = self._pending, []
            self._queue.put(_Block(records, _start_copies(records)))

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if isinstance(item, PendingFlush):
                    if self._sync is not None and self._error is None:
                        self._sync()
                elif self._error is None:
                    self._finish(item)
            except BaseException as error:
                self._error = error
            finally:
                if isinstance(item, PendingFlush):
                    item._finish(succeeded=self._error is None)

    def _finish(self, block: _Block) -> None:
        rows = _host_values(block)
        if self._reduce is not None:
            _reduce_rows(block.records, rows, self._reduce)
        pairs = zip(block.records, rows, strict=True)
        by_stream = sorted(pairs, key=lambda pair: pair[0].stream)  # stable: steps stay in order
        for stream, group in groupby(by_stream, key=lambda pair: pair[0].stream):
            self._deliver(stream, [{"step": record.step} | row for record, row in group])


def _start_copies(records: list[_Record]) -> dict[torch.device, _Copy]:
    """Start one copy per accelerator; values on the CPU are read later, by the thread."""
    found: dict[torch.device, dict[torch.dtype, list[torch.Tensor]]] = {}
    for record in records:
        for value in record.values.values():
            if isinstance(value, torch.Tensor) and not _on_host(value):
                found.setdefault(value.device, {}).setdefault(value.dtype, []).append(value)
    return {device: _start_copy(device, groups) for device, groups in found.items()}


def _start_copy(device: torch.device, groups: dict[torch.dtype, list[torch.Tensor]]) -> _Copy:
    with torch.no_grad():
        # float64 holds every integer count up to 2^53 and every smaller float exactly.
        parts = [
            torch.stack([t.reshape(()) if t.dim() else t for t in tensors]).to(torch.float64)
            for tensors in groups.values()
        ]
        stacked = torch.cat(parts) if len(parts) > 1 else parts[0]
        host = _pinned(len(stacked))
        host.copy_(stacked, non_blocking=True)
    sizes = [(dtype, len(tensors)) for dtype, tensors in groups.items()]
    return _Copy(host, sizes, _record_event(device))


def _on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _pinned(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.float64, pin_memory=True)


def _record_event(device: torch.device) -> Any:
    """An event after everything queued on `device`; who waits for it sleeps instead of spinning."""
    module = torch.get_device_module(device)
    with module.device(device):
        event = module.Event(blocking=True)
        event.record()
    return event


def _host_values(block: _Block) -> list[dict[str, Any]]:
    """Each record's values as Python numbers, in their order."""
    arrived: dict[tuple[torch.device, torch.dtype], Iterator[float | int]] = {}
    for device, copy in block.copies.items():
        copy.event.synchronize()
        sizes = [size for _, size in copy.groups]
        for (dtype, _), part in zip(copy.groups, copy.host.split(sizes), strict=True):
            numbers = part if dtype.is_floating_point else part.long()
            arrived[device, dtype] = iter(numbers.tolist())
    rows = []
    for record in block.records:
        row: dict[str, Any] = {}
        for name, value in record.values.items():
            if isinstance(value, torch.Tensor):
                if _on_host(value):
                    value = value.item()
                else:
                    value = next(arrived[value.device, value.dtype])
            row[name] = value
        rows.append(row)
    return rows


def _reduce_rows(records: list[_Record], rows: list[dict[str, Any]], reduce: Reduce) -> None:
    """Replace the values that have a reduction by what one call of `reduce` makes of them."""
    columns: list[Column] = []
    places: list[tuple[dict[str, Any], str]] = []
    for record, row in zip(records, rows, strict=True):
        for name in row:
            operation: str = record.reductions.get(name, "none")
            if operation != "none":
                columns.append((name, operation))
                places.append((row, name))
    if not columns:
        return
    before = [float(row[name]) for row, name in places]
    after = reduce(columns, torch.tensor(before, dtype=torch.float64)).tolist()
    for (row, name), (_, applied), value in zip(places, columns, after, strict=True):
        keep_whole = isinstance(row[name], int) and applied != "mean"
        row[name] = int(value) if keep_whole else value
