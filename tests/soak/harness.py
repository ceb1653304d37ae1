"""Kill a run again and again, and look at what is left each time.

    start or resume -> wait -> SIGKILL -> look at the folder -> resume -> ... -> the end

Moments come from a seeded generator: most lie inside a save (between the first sign of `step*.tmp`
and the commit), the others anywhere.
"""

import contextlib
import dataclasses
import json
import random
import time
from pathlib import Path

from tests.e2e._run import ROOT, read_lines
from tests.soak.processes import Family
from toolkit.checkpoint.folder import METADATA_FILE, check_files, read_metadata, saved_steps

STEPS = 30
INTERVAL = 2
KEEP = 3
SAVED_EXACTLY = ("step", "tokens", "loss", "ppl", "lr", "grad_norm", "skipped", "epoch")

_INSIDE = 0.9
"""Share of the kills that aim at a save; some come too late."""


@dataclasses.dataclass
class Tally:
    """What happened."""

    kills: int = 0
    inside: int = 0
    """Kills that left an unfinished save behind."""
    victims: dict[str, int] = dataclasses.field(default_factory=dict)
    starts: int = 0
    runs: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        names = self.victims.keys() | other.victims.keys()
        return Tally(
            self.kills + other.kills,
            self.inside + other.inside,
            {n: self.victims.get(n, 0) + other.victims.get(n, 0) for n in names},
            self.starts + other.starts,
            self.runs + other.runs,
        )


def write_config(folder: Path) -> Path:
    """The smoke recipe in fp32, saving every other step; data and runs below `folder`."""
    config = json.loads((ROOT / "toolkit" / "recipes" / "smoke.json").read_text())
    config["run"] |= {"experiment": "soak", "root": str(folder / "runs")}
    config["dataset"]["root"] = str(folder / "data")
    config["train_module"]["precision"] = "fp32"
    config["trainer"]["max_duration"]["value"] = STEPS
    config["trainer"]["metrics_collect_interval"] = 3
    config["trainer"]["callbacks"] |= {
        "network_monitor": {"interval": 10},
        "lm_evaluator": {"interval": 15},
        "checkpointer": {"interval": INTERVAL, "keep_last": KEEP},
    }
    path = folder / "soak.json"
    path.write_text(json.dumps(config))
    return path


def records(run_folder: Path) -> list[dict[str, float]]:
    """The exact part of train.jsonl."""
    lines = read_lines(run_folder / "metrics" / "train.jsonl")
    return [{name: line[name] for name in SAVED_EXACTLY} for line in lines]


class Torture:
    """One run, killed until it has reached its end or `max_kills`; then left in peace."""

    def __init__(
        self,
        config: Path,
        name: str,
        *,
        seed: int,
        ranks: int = 1,
        torchrun: bool = False,
        overrides: tuple[str, ...] = (),
        max_kills: int = 1000,
    ) -> None:
        self.folder = config.parent / "runs" / "soak" / name
        self.checkpoints = self.folder / "checkpoints"
        self.tally = Tally(runs=1)
        self._log = config.parent / f"{name}.log"
        self._train = ("train", str(config), "--name", name, *overrides)
        self._random = random.Random(seed)
        self._ranks = ranks
        self._torchrun = torchrun
        self._max_kills = max_kills
        self._committed: set[int] = set()
        self._save_seconds = 0.02
        self._started = 0

    def start(self) -> Family:
        words = self._train
        if (self.folder / "metadata" / "config.json").exists():
            words = ("resume", str(self.folder))
            if not saved_steps(self.checkpoints):  # killed before the first one: nothing to lose
                words += ("--trainer.start_anew",)
        self.tally.starts += 1
        self._started = time.time_ns()
        return Family(words, ranks=self._ranks, log=self._log, torchrun=self._torchrun)

    def run(self) -> Tally:
        """Kill and resume to the end; every look at the folder asserts."""
        while self.tally.kills < self._max_kills:
            family = self.start()
            if not self._await_moment(family):
                break
            victims = self._random.choice(("all", "one", "launcher")) if self._ranks > 1 else "all"
            family.kill(victims, chosen=self._random.randrange(self._ranks))
            # What one worker leaves behind is seen at once: the others may tidy up.
            unfinished = self._unfinished()
            family.wait(60)
            self.tally.kills += 1
            self.tally.victims[victims] = self.tally.victims.get(victims, 0) + 1
            self.tally.inside += unfinished
            self.check_folder()
        else:
            family = self.start()
        code = family.wait(120)
        assert code == 0, f"exit code {code}:\n{family.output()}"
        self.check_folder()
        return self.tally

    def check_folder(self) -> None:
        """Every committed checkpoint is whole, and none of the newest was lost."""
        now = saved_steps(self.checkpoints)
        for step in now:
            checkpoint = self.checkpoints / f"step{step}"
            check_files(checkpoint, read_metadata(checkpoint), hashes=True)
        self._committed |= set(now)
        newest = sorted(self._committed)[-KEEP:]
        assert set(newest) <= set(now), f"committed {newest}, found {now}\n{self._tail()}"

    def _await_moment(self, family: Family) -> bool:
        """Wait as the generator says; False when the run ended first."""
        if self._random.random() > _INSIDE:
            return self._pass_time(family, self._random.uniform(0.0, 1.5))
        for _ in range(self._random.randint(0, 3)):
            if not self._await_save(family):
                return False
            self._watch_save(family)
        # Into the save: mostly before its usual end.
        delay = self._random.uniform(0.0, 0.8 * self._save_seconds)
        return self._await_save(family) and self._pass_time(family, delay)

    def _pass_time(self, family: Family, seconds: float) -> bool:
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline:
            if seconds > 0.1:
                self._note_committed()
                time.sleep(0.002)
        return family.is_running()

    def _await_save(self, family: Family) -> bool:
        """Until a save is under way; False when the run ended before."""
        while family.is_running():
            if self._is_saving():
                return True
            time.sleep(0.0005)
        return False

    def _watch_save(self, family: Family) -> None:
        """To the end of a save; the next one is expected to last about as long."""
        started = time.perf_counter()
        while self._is_saving() and family.is_running():
            time.sleep(0.0005)
        self._save_seconds += 0.5 * (time.perf_counter() - started - self._save_seconds)
        self._note_committed()

    def _is_saving(self) -> bool:
        """Whether this process writes a checkpoint; what a killed one left does not count."""
        for folder in self.checkpoints.glob("step*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if folder.stat().st_ctime_ns > self._started:
                    return True
        return False

    def _unfinished(self) -> bool:
        """Whether a save is cut short: its folder, or a renamed one without metadata."""
        folders = list(self.checkpoints.glob("step*"))
        return any(f.suffix == ".tmp" or not (f / METADATA_FILE).exists() for f in folders)

    def _note_committed(self) -> None:
        self._committed |= set(saved_steps(self.checkpoints))

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-3000:] if self._log.exists() else ""
