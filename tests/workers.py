"""Warm worker processes for multi-rank tests: imports are paid once per session, not per test.

A job is a module-level function called on every rank as `fn(*args)` with the launcher's variables
set; its return values come back as a list by rank. A hung or failed job kills the pool, so that
the next test starts clean.
"""

import multiprocessing as mp
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any


class WorkerPool:
    """Up to `size` processes that stay alive between jobs."""

    def __init__(self, size: int = 4) -> None:
        self._size = size
        self._workers: list[tuple[mp.Process, Any]] = []

    def run(
        self,
        world_size: int,
        fn: Callable[..., Any],
        *args: Any,
        environ: dict[str, str] | None = None,
        timeout: float = 120,
    ) -> list[Any]:
        """`fn(*args)` on ranks 0 to world_size - 1; raises with the first rank's traceback."""
        self._ensure(world_size)
        shared = {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "TOOLKIT_NUM_THREADS": "1",
            **(environ or {}),
        }
        for rank in range(world_size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._workers[rank][1].send((fn, args, shared | own))
        results = []
        for rank in range(world_size):
            process, pipe = self._workers[rank]
            if not pipe.poll(timeout):
                self.close()
                raise TimeoutError(f"rank {rank} did not finish {fn.__name__} in {timeout} s")
            try:
                ok, value = pipe.recv()
            except EOFError:
                self.close()
                raise RuntimeError(f"rank {rank} died in {fn.__name__}: {process}") from None
            if not ok:
                self.close()
                raise RuntimeError(f"rank {rank} failed in {fn.__name__}:\n{value}")
            results.append(value)
        return results

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []

    def _ensure(self, count: int) -> None:
        context = mp.get_context("spawn")
        while len(self._workers) < max(count, 1):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there,), daemon=True)
            process.start()
            there.close()
            self._workers.append((process, here))


def _work(pipe: Any) -> None:
    import torch

    torch.set_num_threads(1)
    clean = dict(os.environ)
    while True:
        try:
            fn, args, environ = pipe.recv()
        except EOFError:
            return
        os.environ.update(environ)
        try:
            pipe.send((True, fn(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        finally:
            os.environ.clear()
            os.environ.update(clean)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
