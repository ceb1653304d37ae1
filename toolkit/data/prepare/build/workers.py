"""Encode shards in parallel: one worker process per core, or this process when there is little."""

import contextlib
import functools
import multiprocessing
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar

from toolkit import signals
from toolkit.data.prepare.build.parts import Job, Part, PartsSetup, encode_shard, make_encoder
from toolkit.data.prepare.tokenizers.tokenizer import Tokenizer, load_tokenizer
from toolkit.errors import DataError, ToolkitError
from toolkit.parents import end_with_parent

SMALL_BYTES = 2 << 20
"""Below this, starting processes costs more than they save."""


class Errand(NamedTuple):
    """Other work that a worker does first, while others encode."""

    work: Callable[[], Any]
    """Runs in any process."""
    finish: Callable[[Any], object]
    """Takes what it gave, in this process."""


def encode_shards(
    jobs: Sequence[Job],
    setup: PartsSetup,
    tokenizer: Tokenizer | None,
    *,
    num_processes: int,
    errand: Errand | None = None,
) -> Iterator[tuple[Job, Part]]:
    """Encode all jobs, yielding each with its part when that is complete, in no particular order.
    The first error of any worker is raised; the parts that are complete stay."""
    sizes = [job.num_bytes for job in jobs]
    if num_processes == 1 or (sum(sizes) < SMALL_BYTES and all(sizes)):
        if errand is not None:
            errand.finish(errand.work())
        encoder = make_encoder(setup, tokenizer)
        for job in jobs:
            yield job, encode_shard(job, setup, encoder, threads=num_processes)
        return
    # Where there are fewer shards than processes, threads of the tokenizer use the other cores.
    num_workers = min(num_processes, len(jobs) + (errand is not None))
    pool = ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(os.getpid(), setup, num_processes // num_workers),
    )
    processes = pool._processes  # filled as they start
    try:
        with _without_main(), signals.starting_workers():
            first = None if errand is None else pool.submit(_without_torch, errand.work)
            futures = {pool.submit(_work, job): job for job in jobs}
        for future in as_completed([*futures, *([first] if first else [])]):
            if future is first:
                assert errand is not None
                errand.finish(future.result())
            else:
                yield futures[future], future.result()
    except BrokenProcessPool:
        codes = [code for p in processes.values() if (code := p.exitcode) is not None]
        _end(pool, processes)
        raise DataError(
            f"preparing data: a worker process ended with code {min(codes, default=-9)} "
            "(-9: killed, often for lack of memory); run again to continue with the finished "
            "parts, with a smaller dataset.num_processes if memory is short"
        ) from None
    except BaseException:
        _end(pool, processes)
        raise
    # They have nothing to do any more and end by themselves, with what their libraries do then.
    pool.shutdown(wait=False)


def _end(pool: ProcessPoolExecutor, processes: Mapping[int, BaseProcess]) -> None:
    """End workers whose work is of no use any more; they ignore SIGTERM."""
    for process in list(processes.values()):
        process.kill()
    # Else a job that is half sent is waited for (gh-94777).
    pool._call_queue._reader.close()  # type: ignore[attr-defined]
    pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Processes spawned inside do not import the caller's main module: a script needs no
    `__main__` guard, and costs no import of torch."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


Result = TypeVar("Result")

_encode: Callable[[Job], Part]
"""Of a worker."""


def _start(parent: int, setup: PartsSetup, threads: int) -> None:
    """Make this process a worker."""
    global _encode
    signals.ignore_in_worker()
    end_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    folder = setup.tokenizer_folder
    encoder = make_encoder(setup, None if folder is None else load_tokenizer(folder))
    _encode = functools.partial(encode_shard, setup=setup, encoder=encoder, threads=threads)


def _work(job: Job) -> Part:
    return _named(functools.partial(_encode, job))


def _without_torch(work: Callable[[], Result]) -> Result:
    """`transformers` imports it where it can, which takes longer than all else that it is asked
    for: tokenizers do without, and so does whatever a worker does later."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    # It would say that it found none.
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    return _named(work)


def _named(work: Callable[[], Result]) -> Result:
    try:
        return work()
    except (ToolkitError, OSError):
        raise
    except Exception:  # not every exception can be sent to another process
        raise RuntimeError(f"a worker of prepare failed:\n{traceback.format_exc()}") from None
