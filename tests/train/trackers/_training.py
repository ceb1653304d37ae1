"""What training does with trackers, without a model: `python -m ... FOLDER CONFIGS HOW FIRST LAST`.

HOW: `finish`; `kill`: this process alone, once all senders are past step 8; `lose`: senders too, as
when the machine is gone.
"""

import logging
import os
import signal
import sys
import time
from pathlib import Path

import msgspec

from tests.train.trackers._runs import keep_priority, open_run, write_steps
from toolkit.metrics.streams import MetricStreams
from toolkit.train.trackers.config import TRACKERS
from toolkit.train.trackers.process import SenderProcess


def main() -> None:
    keep_priority()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    folder, how, first, last = Path(sys.argv[1]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
    configs = {
        field: msgspec.convert(settings, TRACKERS[field])
        for field, settings in msgspec.json.decode(sys.argv[2]).items()
    }
    run = open_run(folder, resume=first > 1)
    resume_step = first - 1 if first > 1 else None
    with MetricStreams(folder, tensorboard=(), resume_step=resume_step) as streams:
        senders = [SenderProcess(c, folder, attempt=run.attempt) for c in configs.values()]
        write_steps(streams, first, last, offset=0.0 if first == 1 else 100.0)
        if how == "finish":
            began = time.monotonic()
            for sender in senders:
                sender.end("finished")
            print(f"seconds {time.monotonic() - began:.2f}")
            return
        while min(sent_row(folder, field) for field in configs) < 8:
            time.sleep(0.05)
        for sender in senders if how == "lose" else ():
            os.killpg(sender._process.pid, signal.SIGKILL)
        print("pids", *(sender._process.pid for sender in senders), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def sent_row(folder: Path, field: str) -> int:
    try:
        return msgspec.json.decode((folder / "trackers" / f"{field}.json").read_bytes())["row"]
    except FileNotFoundError:
        return -1


if __name__ == "__main__":
    main()
