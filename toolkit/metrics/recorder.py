"""`MetricsRecorder`: values of every step, delivered without ever making the device wait.

What happens to one value:

1. `record` keeps a reference, nothing else; a device scalar stays on the device.
2. Every `collect_interval` steps the scalars of the block are stacked into one tensor, whose copy
   to pinned host memory is started but not awaited.
3. A background thread waits for that copy, reduces the whole block over ranks with one call of
   `reduce`, and gives the block, one dict per step in step order, to `deliver`. A single rank may
   take the blocks of `least_seconds` at once, so that its work does not grow as steps get short.

Every rank must record the same names in the same order at the same steps: the blocks of all ranks
are then alike, and so are the calls of `reduce`.
"""

import collections
import concurrent.futures
import functools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal, NamedTuple

import torch

from toolkit.errors import ToolkitError, TrainingError, reason_of_machine
from toolkit.threads import Worker

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


_Block = tuple[list[_Record], Callable[[], list[dict[str, Any]]]]
"""Records, and what waits for their values and gives them."""


class _Waiting:
    """Blocks handed over between two flushes and not delivered yet, where `least_seconds` may
    pass."""

    def __init__(self) -> None:
        self.blocks: collections.deque[_Block] = collections.deque()
        self.is_asked = False
        """Whether the thread will look for them."""
        self.hurry = threading.Event()
        """Somebody waits for them."""


class PendingFlush(NamedTuple):
    """What `begin_flush` started."""

    recorder: "MetricsRecorder"
    done: Future[Any]

    def wait(self) -> Any:
        """Block until it is done; the result of `after`. Any thread may call it. Raises
        TrainingError when delivering failed."""
        concurrent.futures.wait([self.done])
        self.recorder._check_error()
        return self.done.result()


class MetricsRecorder:
    """Collects records and delivers them in blocks.

    `collect_interval` is in steps. `reduce` is None for a single rank. `sync` is called by `flush`
    after the last delivery, to bring files to disk. `start_step` is the last step that an earlier
    attempt recorded: only later ones may come, in other streams that one too.
    Deliveries begin at least `least_seconds` after one another, unless `flush` waits for them; with
    `reduce` it is 0, since blocks of all ranks are alike.
    """

    def __init__(
        self,
        *,
        collect_interval: int,
        deliver: Deliver,
        reduce: Reduce | None = None,
        sync: Callable[[], None] = lambda: None,
        start_step: int = 0,
        least_seconds: float = 0.0,
    ) -> None:
        self._interval = collect_interval
        self._least_seconds = least_seconds
        self._reduce = reduce
        self._deliver = deliver
        self._sync = sync
        self._start_step = start_step
        self._boundary = self._next_boundary(start_step)
        self._last_step: dict[str, int] = {}
        self._pending: list[_Record] = []
        self._error: BaseException | None = None
        self._is_closed = False
        self._worker = Worker("metrics")
        self._waiting = _Waiting()
        self._delivered_at = -math.inf

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
        follows. Steps must grow in train, and not shrink in other streams. Raises TrainingError
        when delivering earlier values failed.
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

    def add(
        self,
        step: int,
        values: Mapping[str, Value],
        reductions: Mapping[str, Reduction] | None = None,
        *,
        stream: str,
        shared: Mapping[str, Value],
    ) -> None:
        """`record`, where several parts of a program record values of one step: they join the
        record that the step has, if it was not handed over yet. `shared` is what a record begins
        with. Raises ValueError for a name that the record has already."""
        same = (n for n, r in enumerate(self._pending) if (r.stream, r.step) == (stream, step))
        if (place := next(same, None)) is None:
            self.record(step, {**shared, **values}, reductions, stream=stream)
            return
        before = self._pending[place]
        if twice := sorted(before.values.keys() & values.keys()):
            raise ValueError(f"{stream}: {twice[0]} of step {step} was recorded before")
        self._pending[place] = before._replace(
            values={**before.values, **values},
            reductions={**before.reductions, **(reductions or {})},
        )

    def flush(self) -> None:
        """Block until everything recorded so far is delivered and synced to disk. All ranks must
        call it at the same step: the block it closes is reduced like any other."""
        self.begin_flush().wait()

    def begin_flush(self, after: Callable[[], Any] | None = None) -> PendingFlush:
        """`flush` without waiting. `after` is called in the delivering thread when everything up to
        here, and nothing later, is delivered."""
        self._hand_over()
        self._waiting.hurry.set()
        self._waiting = _Waiting()  # what comes later comes after `after`

        def finish() -> Any:
            self._sync()
            return None if after is None else after()

        return PendingFlush(self, self._submit(finish))

    def close(self, *, flush: bool = True) -> None:
        """Flush and stop the thread; more than once is fine.

        `flush=False` is for a rank that fails: other ranks may not come to a reduction any more,
        so values that were not handed over yet are dropped and a stuck one is not awaited.
        """
        try:
            if flush and not self._is_closed:
                self.flush()
        finally:
            self._is_closed, self._pending = True, []
            self._waiting.hurry.set()
            self._worker.stop(None if flush and self._error is None else 2.0)

    def _next_boundary(self, step: int) -> int:
        return (step // self._interval + 1) * self._interval

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
            block = records, _start_reading(records)
            if not self._least_seconds:
                self._submit(lambda: self._deliver_blocks([block]))
                return
            waiting = self._waiting
            waiting.blocks.append(block)
            if not waiting.is_asked:
                waiting.is_asked = True
                self._submit(functools.partial(self._deliver_waiting, waiting))

    def _deliver_waiting(self, waiting: _Waiting) -> None:
        waiting.hurry.wait(self._delivered_at + self._least_seconds - time.monotonic())
        self._delivered_at = time.monotonic()
        waiting.is_asked = False  # before the blocks are taken: one that comes now is taken too
        blocks: list[_Block] = []
        while waiting.blocks:
            blocks.append(waiting.blocks.popleft())
        self._deliver_blocks(blocks)

    def _submit(self, job: Callable[[], Any]) -> Future[Any]:
        """Run `job` in the delivering thread; after an error nothing runs any more."""

        def run() -> Any:
            if self._error is not None:
                return None
            try:
                return job()
            except BaseException as error:
                self._error = error

        return self._worker.submit(run)

    def _deliver_blocks(self, found: Sequence[_Block]) -> None:
        streams: dict[str, list[dict[str, Any]]] = {}
        for records, read in found:
            rows = read()
            if self._reduce is not None:
                _reduce_rows(records, rows, self._reduce)
            for record, row in zip(records, rows, strict=True):
                streams.setdefault(record.stream, []).append({"step": record.step} | row)
        for stream in sorted(streams):
            self._deliver(stream, streams[stream])


@torch.no_grad()
def _start_reading(records: list[_Record]) -> Callable[[], list[dict[str, Any]]]:
    """Start one copy per accelerator. What it returns waits for them, and gives each record's
    values as Python numbers, in their order."""
    found: dict[torch.device, dict[torch.dtype, list[torch.Tensor]]] = {}
    for record in records:
        for value in record.values.values():
            if isinstance(value, torch.Tensor) and not _on_host(value):
                found.setdefault(value.device, {}).setdefault(value.dtype, []).append(value)
    copies = []
    for device, by_type in found.items():
        # float64 holds every integer count up to 2^53 and every smaller float exactly.
        parts = [torch.stack([t.reshape(()) for t in same]).double() for same in by_type.values()]
        stacked = torch.cat(parts)
        host = _pinned(len(stacked)).copy_(stacked, non_blocking=True)
        copies.append((device, by_type, host, _record_event(device)))

    def read() -> list[dict[str, Any]]:
        arrived: dict[tuple[torch.device, torch.dtype], Iterator[float | int]] = {}
        for device, by_type, host, event in copies:
            event.synchronize()
            for dtype, part in zip(by_type, host.split([*map(len, by_type.values())]), strict=True):
                numbers = part if dtype.is_floating_point else part.long()
                arrived[device, dtype] = iter(numbers.tolist())

        def number(value: Value) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return value.item() if _on_host(value) else next(arrived[value.device, value.dtype])

        return [{name: number(v) for name, v in record.values.items()} for record in records]

    return read


def _on_host(tensor: torch.Tensor) -> bool:
    # Apple's GPUs share the memory of the host, and have neither float64 nor events to sleep for.
    return tensor.device.type in ("cpu", "mps")


def _pinned(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.float64, pin_memory=True)


def _record_event(device: torch.device) -> Any:
    """An event after everything queued on `device`; who waits for it sleeps instead of spinning."""
    module = torch.get_device_module(device)
    with module.device(device):
        event = module.Event(blocking=True)
        event.record()
    return event


def _reduce_rows(records: list[_Record], rows: list[dict[str, Any]], reduce: Reduce) -> None:
    """Replace the values that have a reduction by what one call of `reduce` makes of them."""
    places = [
        (row, name, record.reductions[name])
        for record, row in zip(records, rows, strict=True)
        for name in row
        if record.reductions.get(name, "none") != "none"
    ]
    if not places:
        return
    values = torch.tensor([float(row[name]) for row, name, _ in places], dtype=torch.float64)
    after = reduce([(name, operation) for _, name, operation in places], values).tolist()
    for (row, name, operation), value in zip(places, after, strict=True):
        keep_whole = isinstance(row[name], int) and operation != "mean"
        row[name] = int(value) if keep_whole else value
