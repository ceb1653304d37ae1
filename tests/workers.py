"""The warm workers of these tests, forked from a server where everything is imported already."""

import atexit
import functools
import multiprocessing as mp
import os
import shutil
import tempfile

from toolkit.testing import WorkerPool, free_port

__all__ = ["SERVER", "WorkerPool", "free_port", "warm_pool"]

SERVER = mp.get_context("forkserver")
"""Forks processes that have imported everything already."""
SERVER.set_forkserver_preload(["tests.preload"])


def warm_pool() -> WorkerPool:
    # What is forked has the server's devices: none but the CPU.
    is_on_cpu = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    return WorkerPool(context=SERVER if is_on_cpu else None, folder=_folder())


@functools.cache
def _folder() -> str:
    """Where jobs begin: what they write by relative names is not the checkout's."""
    folder = tempfile.mkdtemp(prefix="workers-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
