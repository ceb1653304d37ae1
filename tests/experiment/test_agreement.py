"""Ranks that would train on other data, or with another config, are found before the first step."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.workers import WorkerPool
from toolkit.distributed.environment import prepare_training_environment
from toolkit.errors import ConfigError, DataError
from toolkit.experiment.agreement import RankView, _hash, check_agreement, compare
from toolkit.experiment.common import common_of
from toolkit.experiment.load import load_experiment

SAME = RankView(host="node0", config="c", train="t", val="v")


def other(**changes: Any) -> RankView:
    return RankView(**{"host": "node1", "config": "c", "train": "t", "val": "v", **changes})


def test_equal_ranks_agree() -> None:
    compare([SAME, SAME, other(), other()])


@pytest.mark.parametrize(
    ("odd", "kind", "expected"),
    [
        (other(config="d"), ConfigError, "the config differs between machines: rank 2 on node1 ag"),
        (other(train="u"), DataError, "dataset: the training tokens differ between machines: rank"),
        (other(val=None), DataError, "dataset: the validation tokens differ between machines: ra"),
    ],
)
def test_hosts_that_differ_are_named(odd: RankView, kind: type[Exception], expected: str) -> None:
    with pytest.raises(kind) as error:
        compare([SAME, SAME, odd, odd])
    assert str(error.value).startswith(expected)
    assert str(error.value).count("rank 2 on node1 against rank 0 on node0") == 1


def test_folders_may_differ_and_settings_may_not() -> None:
    def hashed(*flags: str) -> str:
        return _hash(load_experiment("smoke", flags).config, None)

    assert hashed() == hashed("--dataset.root=/local", "--run.work_dir=/scratch")
    assert hashed() != hashed("--train_module.optim.lr=3e-2")
    assert hashed() != hashed("--dataset.sequence_length=32")


def _check(fingerprints: list[str]) -> str:
    config = load_experiment("smoke").config
    environment = prepare_training_environment(config)
    loader: Any = SimpleNamespace(fingerprint=fingerprints[environment.rank])
    try:
        check_agreement(config, environment, loader, {})
    except DataError as error:
        return str(error)
    finally:
        environment.close()
    return "agreed"


def test_every_rank_learns_of_a_difference(workers: WorkerPool) -> None:
    assert workers.run(2, _check, ["a", "a"]) == ["agreed", "agreed"]
    messages = workers.run(2, _check, ["a", "b"])
    assert messages[0] == messages[1]
    assert "the training tokens differ between machines: rank 1 on" in messages[0]


def test_machines_tell_numbers_as_they_are_and_texts_as_hashes() -> None:
    told = common_of(load_experiment("smoke", ["--seed=7", "--description=s3cret"]).config).config
    assert told["seed"] == "7"
    assert told["trainer.max_duration.unit"].startswith("#")
    assert not any("smoke" in value for value in told.values())
