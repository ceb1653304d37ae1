"""`kill -9` of a mirrored run at random moments: an empty machine goes on from the URL alone, and
the run ends as if undisturbed, with all of its metrics."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.checkpoint.exchange import differences, stored
from tests.forked import run_to_the_end
from tests.soak.harness import STEPS, records, write_config
from tests.workers import SERVER
from toolkit.checkpoint.folder import check_files, read_metadata, saved_steps
from toolkit.launch.remote_run import local_copy
from toolkit.metrics.lines import last_record
from toolkit.runs.files import RUN_FILES


def start(words: list[str], log: str) -> None:
    """In the forked process; the mirror looks often, for a run of seconds."""
    from toolkit.launch import mirror

    mirror.INTERVAL_SECONDS = 0.1
    run_to_the_end(words, log)


class MirroredTorture:
    """One run at a URL, and a machine for each of its starts."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        self._folder, self._random = folder, random.Random(seed)
        folder.mkdir(parents=True)
        self._config = write_config(folder)
        self._store = folder / "store" / "run"
        self.url = f"file://{self._store}"
        self._log = folder / "log"
        self._starts = 0

    def go(self, *, kills: int) -> int:
        """To the end, killed up to `kills` times; how often it was."""
        for number in range(kills):
            process = self._start()
            self._await_moment(process)
            process.kill()
            process.join()
            self.check_store()
            if process.exitcode != -signal.SIGKILL:
                assert process.exitcode == 0, self._log.read_text()[-4000:]
                return number
        process = self._start()
        process.join()
        assert process.exitcode == 0, self._log.read_text()[-4000:]
        return kills

    def check_store(self) -> None:
        """The newest checkpoint is whole, and the metrics lead to it."""
        steps = saved_steps(self._store / "checkpoints")
        if not steps:
            return
        newest = self._store / "checkpoints" / f"step{steps[-1]}"
        check_files(newest, read_metadata(newest), hashes=True)
        assert last_record(self._store / RUN_FILES.train_metrics)["step"] >= steps[-1]

    def _start(self):  # type: ignore[no-untyped-def]
        self._starts += 1
        words = ["--work-dir", str(self._folder / f"machine{self._starts}")]
        if (self._store / RUN_FILES.config).exists():
            words = ["resume", self.url, *words]
            if not saved_steps(self._store / "checkpoints"):
                words.append("--trainer.start_anew")
        else:
            words = ["train", str(self._config), "--save-folder", self.url, *words]
        process = SERVER.Process(target=start, args=(words, str(self._log)))
        process.start()
        return process

    def _await_moment(self, process) -> None:  # type: ignore[no-untyped-def]
        """Mostly soon after a checkpoint has come, or begun to come."""
        before = len(list(self._store.glob("checkpoints/*/*")))
        deadline = time.monotonic() + 60
        if self._random.random() < 0.2:
            deadline = time.monotonic() + self._random.uniform(0.0, 2.0)
        changes = self._random.randint(1, 3)
        while process.exitcode is None and time.monotonic() < deadline:
            now = len(list(self._store.glob("checkpoints/*/*")))
            changes, before = changes - (now != before), now
            if changes == 0:
                time.sleep(self._random.uniform(0.0, 0.1))
                break
            time.sleep(0.001)


def soak(folder: Path, *, kills: int, seed: int) -> int:
    """Kills of one run, which is then compared with one that nobody killed."""
    torture = MirroredTorture(folder / "killed", seed=seed)
    done = torture.go(kills=kills)
    reference = MirroredTorture(folder / "undisturbed", seed=0)
    reference.go(kills=0)
    found, expected = (
        local_copy(one.url, str(folder / name)) for one, name in ((torture, "a"), (reference, "b"))
    )
    assert [record["step"] for record in records(found)] == list(range(1, STEPS + 1))
    assert records(found) == records(expected)
    last = f"checkpoints/step{STEPS}"
    assert differences(stored(found / last), stored(expected / last)) == []
    return done


@pytest.mark.slow
def test_a_mirrored_run_killed_twice_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    assert soak(tmp_path, kills=2, seed=5) >= 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_mirrored_runs_killed_thirty_times_end_like_undisturbed_ones(tmp_path: Path) -> None:
    kills = number = 0
    while kills < 30:
        kills += soak(tmp_path / str(number), kills=min(8, 30 - kills), seed=100 + number)
        number += 1
    assert kills == 30
