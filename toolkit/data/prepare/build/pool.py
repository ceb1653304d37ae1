"""Encode shards in parallel: one worker process per core, or this process when there is little."""

import contextlib
import os
import queue
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from pathlib import Path

import msgspec

import toolkit
from toolkit import errors, signals
from toolkit.data.prepare.build.worker import Job, Reply, WorkerSetup, encode_shard, make_encoder
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer
from toolkit.errors import DataError
from toolkit.threads import ThreadPool

SMALL_BYTES = 2 << 20
"""Below this, starting processes costs more than they save."""


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_shards(
    jobs: Sequence[Job], setup: WorkerSetup, tokenizer: Tokenizer | None, *, num_processes: int
) -> Iterator[Job]:
    """Encode all jobs, yielding each when its part is complete, in no particular order.

    Raises:
        ToolkitError: the first one of any worker; the parts that are complete stay.
    """
    sizes = [part.num_bytes for job in jobs for part in job.shard]
    is_small = sum(sizes) < SMALL_BYTES and all(sizes)
    if num_processes == 1 or is_small:
        encoder = make_encoder(setup, tokenizer)
        for job in jobs:
            encode_shard(job, setup, encoder)
            yield job
        return
    num_workers = min(num_processes, len(jobs))
    workers: list[_Worker] = []
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def encode(job: Job) -> Job:
        worker = idle.get()
        try:
            worker.encode(job)
        finally:
            idle.put(worker)
        return job

    pool = ThreadPool(num_workers)
    try:
        for _ in range(num_workers):
            workers.append(_Worker(setup, threads=num_processes // num_workers))
            idle.put(workers[-1])
        for future in as_completed([pool.submit(encode, job) for job in jobs]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()


class _Worker:
    """A process that runs `toolkit.data.prepare.build.worker`."""

    def __init__(self, setup: WorkerSetup, *, threads: int) -> None:
        environment = dict(os.environ)
        # The package of this process, wherever it was imported from; -P keeps the current folder
        # from shadowing it.
        root = str(Path(toolkit.__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [root, environment.get("PYTHONPATH")])
        )
        environment["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
        environment["RAYON_NUM_THREADS"] = str(threads)
        with signals.starting_workers():
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "toolkit.data.prepare.build.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
        self._send(setup)

    def encode(self, job: Job) -> None:
        """Have one job done; blocks until it is."""
        assert self._process.stdout is not None
        self._send(job)
        line = self._process.stdout.readline()
        if not line:
            raise DataError(
                f"preparing data: a worker process ended with code {self._process.wait()} "
                "(-9: killed, often for lack of memory); run again to continue with the finished "
                "parts, with a smaller dataset.num_processes if memory is short"
            )
        reply = msgspec.json.decode(line, type=Reply)
        if reply.error is not None:
            if reply.kind is not None:
                raise getattr(errors, reply.kind, DataError)(reply.error)
            raise RuntimeError(f"a worker of prepare failed:\n{reply.error}")

    def kill(self) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _send(self, message: WorkerSetup | Job) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # `encode` finds that there is no answer and says why
