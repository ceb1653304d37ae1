"""`toolkit resume` (or `verify`) of a run of several processes: this one becomes their launcher.

The same agent that `torchrun` uses, inside this process: signals reach the workers, and their exit
codes and messages come back without a launcher's report around them.
"""

import logging
import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolkit.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, TrainingError
from toolkit.runs.status import read_status

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

log = logging.getLogger(__name__)

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
"""What is passed on to the workers; torchrun itself leaves out the last two."""

SECONDS_TO_SAVE = 300
"""How long workers have after such a signal until they are killed; torchrun gives them 30."""


def relaunch(
    folder: Path,
    arguments: Sequence[str],
    processes: int,
    *,
    verb: str = "resume",
    debug: bool = False,
) -> int:
    """`toolkit VERB folder` on `processes` processes of this machine; returns the exit code.

    `arguments` follow the folder, `debug` is `--debug` for them.

    Raises:
        TrainingError: a signal killed a worker.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    log.info("relaunching with %d processes", processes)
    # Workers say themselves what went wrong.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    command = [sys.executable, "-m", "toolkit", verb, str(folder), *arguments]
    if debug:
        command.append("--debug")
    launcher = parse_args(
        [
            *("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", f"--rdzv-id={uuid.uuid4()}"),
            *("--no-python", f"--nproc-per-node={processes}", *command),
        ]
    )
    # As attributes: not every torch knows them as flags, and one that does not ignores them.
    launcher.signals_to_handle = SIGNALS
    launcher.shutdown_timeout = launcher_seconds(os.environ)
    config, entrypoint, entrypoint_arguments = config_from_args(launcher)
    try:
        elastic_launch(config, entrypoint)(*entrypoint_arguments)
    except ChildFailedError as error:
        return _exit_code(error, f"toolkit {verb} {folder}")
    except SignalException as error:
        status = read_status(folder)
        stopped = verb == "resume" and status is not None and status.state == "stopped"
        return EXIT_STOPPED if stopped else 128 + error.sigval.value
    return EXIT_DONE


def launcher_seconds(environ: Mapping[str, str]) -> int:
    """`SECONDS_TO_SAVE`, or what the variable that torchrun reads says instead.

    Raises:
        ConfigError: that is no number.
    """
    text = environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    if not text.isdecimal():
        raise ConfigError(f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT: {text!r} is no number of seconds")
    return int(text)


def _exit_code(error: "ChildFailedError", again: str) -> int:
    """The code of the first worker that ended; the others were stopped because of it."""
    rank, failure = error.get_first_failure()
    if failure.exitcode > 0:
        return failure.exitcode
    raise TrainingError(
        f"rank {rank} was killed ({failure.signal_name()}); if it was not you, look for what ended "
        f"it in the system's log (memory?), then go on with `{again}`"
    )
