"""One try of `toolkit tune`: real optimizer steps of a config, on random tokens, in a process of
its own, or one of several ranks. Nothing is written but the result.

    python -m toolkit.commands.tune_worker TRY.json

`TRY.json` holds a `Trial`; beside it `result.json` is written by rank 0.
"""

import contextlib
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from toolkit.config.check import check
from toolkit.errors import EXIT_DONE, EXIT_FAILED, RunError
from toolkit.experiment.config import ExperimentConfig
from toolkit.parents import end_with_parent
from toolkit.storage.atomic import write_json_atomic
from toolkit.storage.foreign import read_json, reason_of

RESULT = "result.json"
_WARM_UP = 2
"""Steps that are not counted: the first compiles, the second fills what stays."""
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate")


class Trial(msgspec.Struct, kw_only=True):
    """What a process tries."""

    config: dict[str, Any]
    steps: int
    memory: int | None = None
    """Bytes that it may take on a CPU; None: no limit."""
    parent: int | None = None
    """The process without which it ends."""


class Result(msgspec.Struct, kw_only=True):
    """What came of it."""

    tokens_per_second: float | None = None
    """Of all ranks, by its best step."""
    peak_memory: int | None = None
    """Bytes on rank 0: of torch's allocator on GPUs, of the process on CPUs."""
    failed: str | None = None
    """Why there is no speed."""


def main() -> int:
    """The only argument is the file of the `Trial`."""
    file = Path(sys.argv[1])
    trial = read_json(file, RunError, Trial)
    if trial.parent is not None:
        end_with_parent(trial.parent)  # a killed one asks nobody to stop
    try:
        result = _run(trial)
    except (RuntimeError, MemoryError) as error:
        said = reason_of(error) if str(error) else "out of memory"
        is_short = isinstance(error, MemoryError) or any(t in said.lower() for t in _NO_MEMORY)
        result = Result(failed="out of memory" if is_short else said)
    if os.environ.get("RANK", "0") == "0" or result.failed:
        write_json_atomic(file.parent / RESULT, result, sync=False)
    return EXIT_FAILED if result.failed else EXIT_DONE


def _run(trial: Trial) -> Result:
    import torch

    from toolkit.distributed.devices import wait_for
    from toolkit.distributed.environment import prepare_training_environment
    from toolkit.train.module import Progress

    config: ExperimentConfig = check(trial.config, ExperimentConfig).config
    environment = prepare_training_environment(config)
    device, layout = environment.device, environment.layout
    if device.type == "cpu" and trial.memory is not None:
        # What would exhaust the machine is refused to this process.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_DATA, (trial.memory, trial.memory))
    try:
        model = config.model.build(init_device="meta", seed=config.seed)
        module = config.train_module.build(model, environment=environment)
        length, batch = config.dataset.sequence_length, config.data_loader.global_batch_size
        share = batch // layout.batch_ranks
        micro = min(config.train_module.rank_microbatch_size or share, share)
        passes = share // micro
        some = min(passes, 2)  # others take as long
        generator = torch.Generator().manual_seed(environment.rank)
        size = (some * micro // length, length)
        ids = torch.randint(config.model.vocab_size, size, generator=generator)
        computing, stepping = [], []
        for step in range(_WARM_UP + trial.steps):
            times = [time.perf_counter()]
            module.train_batch({"input_ids": ids})
            wait_for(device)
            times.append(time.perf_counter())
            module.optim_step(Progress(step, step * batch, 10_000, 10_000 * batch, batch))
            wait_for(device)
            times.append(time.perf_counter())
            if step >= _WARM_UP:
                computing.append(times[1] - times[0])
                stepping.append(times[2] - times[1])
        # Other load on the machine only ever adds time.
        seconds = min(computing) * passes / some + min(stepping)
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
        else:  # kilobytes on Linux, bytes on macOS
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return Result(tokens_per_second=batch / seconds, peak_memory=peak)
    finally:
        environment.close(after_error=sys.exc_info()[0] is not None)


if __name__ == "__main__":
    sys.exit(main())
