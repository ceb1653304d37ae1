"""Iterating in a background thread."""

import atexit
import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch

from toolkit.threads import Thread

LEAVING_SECONDS = 5.0
"""Longest wait for the reading thread (a network file system may hang)."""

T = TypeVar("T")


class _Failure(NamedTuple):
    error: BaseException


def read_ahead(
    items: Generator[T, None, None], depth: int, *, size: Callable[[T], int] = lambda item: 1
) -> Generator[T, None, None]:
    """`items`, of which a background thread keeps so many ready that their sizes add up to `depth`;
    its errors are raised in their place. The thread ends when this iterator is closed or collected,
    and with the process. It must not be inside C++ code when the interpreter ends (the process
    would abort), so `items` may not call torch, and leaving waits for the item being read.
    """
    # SimpleQueue is written in C: a hand-over costs about a microsecond when nobody waits.
    ready: queue.SimpleQueue[T | _Failure] = queue.SimpleQueue()
    wanted: queue.SimpleQueue[None] = queue.SimpleQueue()
    closed = threading.Event()

    def read() -> None:
        try:
            wanted.get()
            while not closed.is_set():
                item = next(items)
                ready.put(item)
                for _ in range(size(item)):
                    wanted.get()
                    if closed.is_set():
                        return
        except BaseException as error:
            ready.put(_Failure(error))

    thread = Thread(target=read, name="data-reader", daemon=True)

    def stop() -> None:
        closed.set()
        wanted.put(None)
        if thread is not threading.current_thread():
            thread.join(LEAVING_SECONDS)

    for _ in range(depth):
        wanted.put(None)
    thread.start()
    atexit.register(stop)
    try:
        while True:
            item = ready.get()
            if isinstance(item, _Failure):
                raise item.error
            for _ in range(size(item)):
                wanted.put(None)
            yield item
    finally:
        # Collected after `stop` ran at exit, module globals are gone already.
        if not closed.is_set():
            atexit.unregister(stop)
            stop()


Batch = dict[str, torch.Tensor]


def prefetch_to_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """`batches` on `device`; on CUDA the copy of the next one, from pinned memory on a stream of
    its own, runs while training computes on the current one. Elsewhere they pass as they are."""
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)

    def copy(batch: Batch) -> Batch:
        with torch.cuda.stream(stream):
            return {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}

    for ready, _ in itertools.pairwise(itertools.chain(map(copy, batches), [{}])):
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for tensor in ready.values():
            tensor.record_stream(current)  # its memory is not reused before training is done
        yield ready
