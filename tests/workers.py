"""Warm worker processes for multi-rank tests: imports are paid once per session, not per test, nor
per worker.

A job is a module-level function called on every rank as `fn(*args)` with the launcher's variables
set, in an empty folder; its return values come back as a list by rank. A hung or failed job kills
the pool, so that the next test starts clean.
"""

import contextlib
import faulthandler
import gc
import multiprocessing as mp
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from typing import Any
from unittest import mock

import psutil

SERVER = mp.get_context("forkserver")
"""Forks processes that have imported everything already."""
SERVER.set_forkserver_preload(["tests.preload"])

MOST_THREADS = 40
"""Of a worker: ZeRO-3 holds its groups for the life of a process, and the threads of a group whose
other ranks have left spin."""


class WorkerPool:
    """Up to `size` processes that stay alive between jobs.

    `environ` is set in them from their first line on: what libraries read once (which device
    DeepSpeed is for) cannot be a matter of a job.
    """

    def __init__(self, size: int = 4, environ: dict[str, str] | None = None) -> None:
        self._size = size
        self._environ = environ or {}
        self._folder = tempfile.TemporaryDirectory(prefix="workers-")
        """Where jobs begin: what they write by relative names is not the checkout's."""
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
            "MASTER_PORT": str(free_port()),
            "TOOLKIT_NUM_THREADS": "1",
            **(environ or {}),
        }
        for rank in range(world_size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._workers[rank][1].send((fn, args, shared | own))
        results: dict[int, Any] = {}
        waiting = {self._workers[rank][1]: rank for rank in range(world_size)}
        deadline = time.monotonic() + timeout
        while waiting:
            ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                ranks = sorted(waiting.values())
                self._show_stacks(ranks)
                self.close()
                raise TimeoutError(f"ranks {ranks} did not finish {fn.__name__} in {timeout} s")
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    ok, value = False, "the process died"
                if not ok:
                    self.close()
                    raise RuntimeError(f"rank {rank} failed in {fn.__name__}:\n{value}")
                results[rank] = value
        if any(
            psutil.Process(process.pid).num_threads() > MOST_THREADS for process, _ in self._workers
        ):
            self.close()
        return [results[rank] for rank in range(world_size)]

    def _show_stacks(self, ranks: list[int]) -> None:
        """Let workers that hang write the stacks of all their threads to stderr, and end."""
        for rank in ranks:
            process = self._workers[rank][0]
            if process.pid is not None:
                os.kill(process.pid, signal.SIGABRT)
            process.join(5.0)

    def close(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []

    def _ensure(self, count: int) -> None:
        # What is forked has the server's devices: none but the CPU.
        is_like_all = not self._environ and os.environ.get("CUDA_VISIBLE_DEVICES") == ""
        context: Any = SERVER if is_like_all else mp.get_context("spawn")
        while len(self._workers) < max(count, 1):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, self._folder.name), daemon=True)
            with mock.patch.dict(os.environ, self._environ):
                process.start()
            there.close()
            self._workers.append((process, here))


def _work(pipe: Any, folder: str) -> None:
    import torch

    faulthandler.enable()
    torch.set_num_threads(1)
    clean, modules = dict(os.environ), 0
    while True:
        try:
            fn, args, environ = pipe.recv()
        except EOFError:
            return
        os.environ.update(environ)
        os.chdir(folder)
        _restart_deepspeed_ids()
        try:
            pipe.send((True, fn(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        finally:
            os.environ.clear()
            os.environ.update(clean)
            _leave_groups()
            if len(sys.modules) > modules:
                # Later collections pass over what was imported.
                gc.collect()
                gc.freeze()
                modules = len(sys.modules)


def _leave_groups() -> None:
    """The end of a rank closes its connections, which those that wait for it notice; a worker lives
    on."""
    groups: Any = sys.modules.get("toolkit.distributed.process_groups")
    if groups is None or not groups._closed_backends:
        return
    # What holds the groups of a job: the threads of a group whose other ranks have left spin.
    import torch

    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor import DTensor

        torch._C._clear_DTensor_sharding_propagator_cache()
        DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache.cache_clear()
    if "deepspeed" in sys.modules:
        from deepspeed import DeepSpeedEngine

        gc.collect()
        for found in [o for o in gc.get_objects() if type(o) is DeepSpeedEngine]:
            with contextlib.suppress(AssertionError):  # it says on rank 0 that its hooks are gone
                found.optimizer.destroy()
    gc.collect()
    groups._closed_backends.clear()


def _restart_deepspeed_ids() -> None:
    """ZeRO-3 numbers modules and parameters over the life of a process and compares the numbers
    across ranks; workers that ran different jobs before must start level."""
    offload: Any = sys.modules.get("deepspeed.runtime.zero.parameter_offload")
    partition: Any = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if offload is not None and partition is not None:
        partition.Init.param_id = 0
        register = offload.DeepSpeedZeRoOffload._register_deepspeed_module
        register.__defaults__[0][0] = 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
