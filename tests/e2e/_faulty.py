"""`python _faulty.py FAULT RANK STEP arguments...`: the command line, with a fault in one rank.

FAULT: `raise` (an error of our own making), `sleep` (the rank never comes back), `die` (SIGKILL).
"""

import os
import signal
import sys
import time
from typing import Any

from toolkit.cli.main import run
from toolkit.train.trainer import Trainer


def main() -> int:
    fault, rank, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
    train_step = Trainer._train_step

    def faulty(trainer: Trainer, batch: dict[str, Any]) -> None:
        # Only the first time: workers that are started again are sound.
        if (
            os.environ["RANK"] == rank
            and trainer.state.step == step
            and trainer.state.run.attempt == 1
        ):
            if fault == "raise":
                raise ValueError("a fault was asked for")
            if fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            sleep_for_ever()
        train_step(trainer, batch)

    Trainer._train_step = faulty  # type: ignore[method-assign, assignment]
    return run(sys.argv[4:])


def sleep_for_ever() -> None:
    while True:
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
