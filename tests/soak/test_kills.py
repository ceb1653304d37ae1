"""`kill -9` at random moments: nothing committed is lost, and the run ends as if undisturbed."""

import dataclasses
from pathlib import Path

import pytest

from tests.checkpoint.exchange import differences, stored
from tests.soak.harness import STEPS, Tally, Torture, records, write_config

FSDP = ("--train_module.dp_config={name: fsdp, param_dtype: float32}",)
ZERO = ("--train_module.dp_config={name: zero1, param_dtype: float32}",)
BLOCKING = ("--trainer.callbacks.checkpointer.asynchronous=false",)


@dataclasses.dataclass(frozen=True)
class Kind:
    """How the runs of a group are started."""

    ranks: int = 1
    torchrun: bool = False
    overrides: tuple[str, ...] = ()

    def torture(self, config: Path, name: str, *, seed: int, max_kills: int = 1000) -> Torture:
        return Torture(
            config,
            name,
            seed=seed,
            ranks=self.ranks,
            torchrun=self.torchrun,
            overrides=self.overrides,
            max_kills=max_kills,
        )


def undisturbed(kind: Kind, config: Path) -> Path:
    """The folder of a run that nobody kills."""
    reference = kind.torture(config, "undisturbed", seed=0, max_kills=0)
    reference.run()
    return reference.folder


def check_equal(found: Path, expected: Path) -> None:
    """Metrics and final state are those of the undisturbed run, bit for bit."""
    assert [record["step"] for record in records(found)] == list(range(1, STEPS + 1))
    assert records(found) == records(expected)
    last = Path("checkpoints") / f"step{STEPS}"
    assert differences(stored(found / last), stored(expected / last)) == []


def soak(kind: Kind, folder: Path, *, kills: int, per_run: int, seed: int) -> Tally:
    """Runs one after the other until `kills` are reached, each compared at its end; by turns they
    save in the background and not."""
    config = write_config(folder)
    expected = undisturbed(kind, config)
    total = Tally()
    while total.kills < kills:
        number = total.runs
        left = min(per_run, kills - total.kills)
        how = dataclasses.replace(kind, overrides=kind.overrides + BLOCKING[: number % 2])
        torture = how.torture(config, f"killed{number}", seed=seed + number, max_kills=left)
        total += torture.run()
        check_equal(torture.folder, expected)
    return total


@pytest.mark.slow
def test_a_run_killed_six_times_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    tally = soak(Kind(), tmp_path, kills=6, per_run=6, seed=11)
    assert tally.kills == 6
    assert tally.inside >= 3


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        pytest.param(Kind(), 160, id="single"),
        pytest.param(Kind(2), 30, id="ddp"),
        pytest.param(Kind(2, overrides=FSDP), 30, id="fsdp"),
        pytest.param(Kind(2, overrides=ZERO), 15, id="zero1"),
        pytest.param(Kind(2, torchrun=True, overrides=FSDP), 15, id="torchrun"),
    ],
)
def test_killed_runs_end_like_undisturbed_ones(kind: Kind, kills: int, tmp_path: Path) -> None:
    tally = soak(kind, tmp_path, kills=kills, per_run=12, seed=1000)
    (tmp_path / "tally.txt").write_text(str(tally))
    assert tally.kills == kills
    assert tally.inside >= 0.7 * kills, tally
