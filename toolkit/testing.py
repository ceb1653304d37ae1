"""For tests of your own: ranks as processes that stay warm, a tiny run, and what equal runs are.

from toolkit.testing import run_distributed_test

def all_ranks_agree() -> float:  # at the top of a module
    value = torch.ones(3)
    torch.distributed.all_reduce(value)
    return value.sum().item()

def test_sum() -> None:
    assert run_distributed_test(all_ranks_agree, world_size=2) == [6.0, 6.0]
"""

import contextlib
import faulthandler
import gc
import itertools
import json
import multiprocessing as mp
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import psutil

from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load import load_experiment
from toolkit.experiment.sources import recipe_text
from toolkit.metrics.lines import read_records
from toolkit.runs.files import RUN_FILES
from toolkit.storage.atomic import write_atomic

MOST_THREADS = 40
"""Of a worker: ZeRO-3 holds its groups for the life of a process, and the threads of a group whose
other ranks have left spin."""


class WorkerPool:
    """Processes that stay alive between jobs: imports are paid once, not once a test.

    A job is a function at the top of a module, called on every rank as `fn(*args)` with the
    launcher's variables set; its return values come back as a list by rank. A hung or failed job
    kills the pool, so that the next one starts clean.

    `environ` is set in the processes from their first line on: what libraries read once (which
    device DeepSpeed is for) cannot be a matter of a job. `context`: how they are started, of
    `multiprocessing`; default: "spawn". `folder`: where jobs begin; default: the current one.
    """

    def __init__(
        self,
        environ: dict[str, str] | None = None,
        *,
        context: Any = None,
        folder: Path | str | None = None,
    ) -> None:
        self._environ = environ or {}
        self._folder = folder
        self._context = context or mp.get_context("spawn")
        self._workers: list[tuple[Any, Any]] = []

    def run(
        self,
        world_size: int,
        fn: Callable[..., Any],
        *args: Any,
        environ: dict[str, str] | None = None,
        timeout: float = 120,
    ) -> list[Any]:
        """`fn(*args)` on ranks 0 to world_size - 1, with `environ` beside the launcher's variables.

        Raises:
            RuntimeError: a rank failed; with its traceback.
            TimeoutError: not all are done after `timeout` seconds; their stacks are on stderr.
        """
        try:
            return self._run(world_size, fn, args, environ or {}, timeout)
        except BaseException:
            self.close()  # what is under way must not be the answer of the next job
            raise

    def _run(
        self,
        world_size: int,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        environ: Mapping[str, str],
        timeout: float,
    ) -> list[Any]:
        self._ensure(world_size)
        shared = {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "TOOLKIT_NUM_THREADS": "1",
            **environ,
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
                raise TimeoutError(f"ranks {ranks} did not finish {fn.__name__} in {timeout} s")
            pipe: Any
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    ok, value = False, "the process died"
                if not ok:
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
        if not all(process.is_alive() for process, _ in self._workers):
            self.close()
        while len(self._workers) < max(count, 1):
            here, there = self._context.Pipe()
            process = self._context.Process(
                target=_work, args=(there, self._folder or os.getcwd()), daemon=True
            )
            with mock.patch.dict(os.environ, self._environ):
                process.start()
            there.close()
            self._workers.append((process, here))


def _work(pipe: Any, folder: Path | str) -> None:
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


_pool = WorkerPool()


def run_distributed_test(
    fn: Callable[..., Any],
    world_size: int = 2,
    backend: str = "gloo",
    *,
    args: Sequence[Any] = (),
    environ: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> list[Any]:
    """`fn(*args)` on `world_size` ranks of this machine with `torch.distributed` open; the values
    that it returns, by rank.

    `fn` is a function at the top of a module; it, its arguments and values are pickled. `backend`
    "gloo" computes on the CPU, "nccl" gives each rank the GPU of its number. Processes stay for the
    next test, with one thread each.

    Raises:
        RuntimeError: a rank failed; with its traceback.
        TimeoutError: not all ranks are done after `timeout` seconds; their stacks are on stderr.
    """
    job = (fn, tuple(args), backend)
    return _pool.run(world_size, _in_group, *job, environ=dict(environ or {}), timeout=timeout)


def _in_group(fn: Callable[..., Any], args: tuple[Any, ...], backend: str) -> Any:
    import torch
    import torch.distributed as dist

    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)
    try:
        return fn(*args)
    finally:
        dist.destroy_process_group()


def tiny_experiment(folder: Path | str, **sections: Any) -> ExperimentConfig:
    """A config that trains 25,000 parameters on the bytes of a text made in `folder`, in seconds.

    Its runs go to `folder/runs`; the file `folder/tiny.json` holds it for command lines. Each of
    `sections` is laid over it, mapping by mapping: `train_module={"optim": {"lr": 0.1}}`.

    Raises:
        ConfigError: values of `sections` that no config takes.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    text, file = folder / "tiny.txt", folder / "tiny.json"
    if not text.exists():
        lines = (f"{n} and {n} is {2 * n}; {n} times {n} is {n * n}.\n" for n in range(3000))
        write_atomic(text, "".join(lines).encode(), sync=False)
    source = {"type": "files", "paths": [str(text)]}
    own = {
        "run": {"root": str(folder / "runs"), "experiment": "tiny"},
        "dataset": {"root": str(folder / "data"), "dataset_name": "tiny", "source": source},
    }
    data = json.loads(recipe_text("smoke"))
    for layer in (own, sections):
        _lay_over(data, layer)
    # Whole: ranks may call this at once.
    write_atomic(file, json.dumps(data, indent=2).encode(), sync=False)
    return load_experiment(str(file), environ=None).config


def _lay_over(data: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for name, value in layer.items():
        old = data.get(name)
        if not (isinstance(value, Mapping) and isinstance(old, dict)):
            data[name] = value
        elif value.get("type", old.get("type")) == old.get("type"):
            _lay_over(old, value)
        else:
            data[name] = dict(value)


class _Line(msgspec.Struct):
    """What must be equal of a line of metrics."""

    step: int
    name: str = ""
    loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    num_targets: int | None = None


def assert_same_training(run: Path | str, other: Path | str) -> None:
    """Check that two run folders hold the same training, to the last bit: loss, gradient norm and
    learning rate of every step, every evaluation, and the tensors of the newest checkpoint.

    Raises:
        AssertionError: naming the first step, evaluation or tensor that differs.
    """
    import torch

    from toolkit.checkpoint.find import find_checkpoint
    from toolkit.checkpoint.tensors import iterate_tensors

    folders = [Path(run), Path(other)]
    for file in (RUN_FILES.train_metrics, RUN_FILES.eval_metrics):
        mine, theirs = ({(r.step, r.name): r for r in read_records(folder / file, _Line)}
                        for folder in folders)  # fmt: skip
        for key in sorted(mine.keys() | theirs.keys()):
            pair = (mine.get(key), theirs.get(key))
            # NaN is what NaN was.
            assert repr(pair[0]) == repr(pair[1]), f"{file}: {pair[0]} and {pair[1]}"
    steps = [find_checkpoint(folder / "checkpoints").checkpoint for folder in folders]
    assert all(steps), f"no checkpoint in {folders[steps.index(None)]}"
    tensors = [iterate_tensors(step / "model_and_optim", "") for step in steps if step]
    nothing = ("none", torch.empty(0))
    for (name, one), (same, another) in itertools.zip_longest(*tensors, fillvalue=nothing):
        assert name == same, f"tensors {name} and {same}"
        assert torch.equal(one, another), f"{name} differs"
