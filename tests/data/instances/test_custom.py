import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.corpus import data_config
from tests.data.instances import custom_examples
from toolkit import get_dataloaders, signals
from toolkit.data.config import CustomDatasetConfig, DatasetConfig
from toolkit.data.corpus import open_corpus
from toolkit.data.instances.custom import UNKNOWN_LENGTH, open_custom
from toolkit.data.prepare.corpus import prepare_corpus
from toolkit.errors import ConfigError, DataError

EXAMPLES = custom_examples.__name__


def opened(name: str, split: str = "train", *, workers: dict[str, Any] | None = None, **args: Any):
    config = CustomDatasetConfig(target=f"{EXAMPLES}:{name}", args=args)
    return open_custom(config, split, 8, **(workers or {}))


def test_items_of_a_map_style_data_set_are_its_instances() -> None:
    instances = opened("Counting", count=20)
    assert instances.num_instances == 20
    assert instances.vocab_size == 1000
    rows = instances.read(np.array([7, 0]))
    assert list(rows) == ["input_ids", "label_mask"]
    assert rows["label_mask"].all()
    assert rows["input_ids"].tolist() == [list(range(7, 15)), list(range(8))]
    assert rows["input_ids"].dtype == np.int64


def test_short_items_are_padded_with_a_document_of_its_own() -> None:
    rows = opened("Short").read(np.array([2, 7]))
    assert rows["input_ids"][0].tolist() == [0, 1, 2, 0, 0, 0, 0, 0]
    assert rows["label_mask"][0].tolist() == [False, True, True] + 5 * [False]
    assert rows["document_ids"][0].tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert rows["document_ids"][1].tolist() == 8 * [0]


@pytest.mark.parametrize("worker_type", ["thread", "process"])
def test_workers_give_the_same_items_in_the_same_order(worker_type: str) -> None:
    instances = opened("Counting", workers={"num_workers": 2, "worker_type": worker_type})
    numbers = np.random.default_rng(0).permutation(40)
    try:
        for part in np.split(numbers, [13, 14]):
            expected = opened("Counting").read(part)["input_ids"]
            assert np.array_equal(instances.read(part)["input_ids"], expected)
    finally:
        instances.close()


def test_the_validation_split_is_asked_for_by_name() -> None:
    assert opened("Counting", "val").num_instances == 5
    assert opened("Short", "val") is None


def test_passes_of_an_iterable_style_data_set_follow_each_other() -> None:
    instances = opened("Lines")
    assert instances.num_instances == UNKNOWN_LENGTH
    for start in (0, 6, 23, 2):
        rows = instances.read(np.arange(start, start + 5))["input_ids"]
        assert rows[:, 0].tolist() == [n % 10 for n in range(start, start + 5)]


def test_an_iterable_style_data_set_may_start_anywhere() -> None:
    custom_examples.Skipping.starts.clear()
    instances = opened("Skipping")
    assert instances.read(np.arange(1_000_003, 1_000_005))["input_ids"][:, 0].tolist() == [3, 4]
    assert instances.read(np.array([1_000_007]))["input_ids"][0, 0] == 7
    assert custom_examples.Skipping.starts == [1_000_003]


def test_the_fingerprint_is_of_class_arguments_and_what_it_says_itself() -> None:
    prints = {
        opened("Counting").fingerprint,
        opened("Counting", count=41).fingerprint,
        opened("Counting", "val").fingerprint,
        opened("Short").fingerprint,
    }
    assert len(prints) == 4
    assert opened("Counting").fingerprint == opened("Counting").fingerprint


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("raises", "custom_examples:Bad: item 3 cannot be made: KeyError: 'text'"),
        ("long", "item 3: input_ids has shape (99,); give 1 to 8 (dataset.sequence_length) ids"),
        ("floats", "item 3: input_ids holds float64, not integers"),
        ("key", "item 3: unknown key 'labels'; known are input_ids, label_mask, document_ids"),
        ("shapes", "item 3: label_mask has shape (1,), input_ids (2,)"),
        ("nothing", "item 3: has no input_ids"),
        ("ragged", "custom_examples:Bad: item 3: input_ids is no array of numbers: setting an"),
        ("words", "item 3: document_ids holds <U1, not integers"),
        ("huge", "item 3: ids from 9223372036854775808 to 9223372036854775808, the vocabulary"),
    ],
)
def test_an_item_that_cannot_be_used_is_named(what: str, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        opened("Bad", what=what).read(np.array([1, 3]))


@pytest.mark.parametrize(
    ("name", "what", "message"),
    [
        ("BadLines", "raises", "BadLines: item 2 cannot be made: ValueError: no more memory"),
        ("BadLines", "stops", "BadLines: item 2 cannot be made: RuntimeError: generator raised"),
        ("Ending", "", "Ending: iterate() ends before item 3; it must go on without end"),
    ],
)
def test_an_iterable_style_data_set_that_fails_names_the_item(
    name: str, what: str, message: str
) -> None:
    instances = opened(name, what=what)
    assert len(instances.read(np.arange(2))["input_ids"]) == 2
    for _ in range(2):
        with pytest.raises(DataError, match=re.escape(message)):
            instances.read(np.arange(2, 5))


def test_a_data_set_without_items_or_length_is_named() -> None:
    with pytest.raises(DataError, match="Nothing: gave no items"):
        opened("Nothing").read(np.array([0]))
    with pytest.raises(DataError, match=r"Unmeasurable: len\(\) of it fails: OSError: index is"):
        opened("Unmeasurable")


def test_an_id_beyond_the_vocabulary_is_an_error() -> None:
    message = "item 999: ids from 999 to 1006, the vocabulary has 1000"
    with pytest.raises(DataError, match=message):
        opened("Counting", count=2000).read(np.array([999]))


def test_a_worker_that_dies_ends_in_a_message() -> None:
    instances = opened("Bad", what="dies", workers={"num_workers": 1, "worker_type": "process"})
    with pytest.raises(DataError, match="a worker process ended suddenly"):
        instances.read(np.array([3]))


TRAINING = f"""
import sys, time
import numpy as np
from toolkit import get_dataloaders
from toolkit.data.config import CustomDatasetConfig
from toolkit.data.instances.custom import open_custom

if __name__ == "__main__":
    config = CustomDatasetConfig(target="{EXAMPLES}:ProcessIds")
    instances = open_custom(config, "train", 8, num_workers=2, worker_type="process")
    ids = instances.read(np.arange(2))["input_ids"][:, 0]
    print(*ids, flush=True)
    sys.stdin.readline()
    print(*instances.read(np.arange(2))["input_ids"][:, 0], flush=True)
    time.sleep(600)
"""


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_worker_processes_leave_signals_to_training_and_end_with_it(tmp_path: Path) -> None:
    (tmp_path / "training.py").write_text(TRAINING)
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "training.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    ) as training:  # fmt: skip
        assert training.stdin is not None
        assert training.stdout is not None
        workers = {int(word) for word in training.stdout.readline().split()}
        assert workers
        for worker in workers:
            os.kill(worker, signal.SIGINT)
            os.kill(worker, signal.SIGTERM)
            os.kill(worker, signal.SIGUSR1)
        print(file=training.stdin, flush=True)
        assert training.stdout.readline()
        assert all(map(is_running, workers))
        training.kill()
        training.wait()
    for _ in range(200):
        if not any(map(is_running, workers)):
            break
        time.sleep(0.1)
    assert not any(map(is_running, workers))


@pytest.mark.parametrize("asked", [None, "SIGTERM"])
def test_workers_that_die_with_a_request_to_stop_are_part_of_the_stop(
    asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch under way is still made: other ranks train on theirs."""
    expected = opened("Counting").read(np.arange(5, 9))["input_ids"]
    instances = opened("Counting", workers={"num_workers": 2, "worker_type": "process"})
    instances.read(np.arange(4))
    processes = list(instances._reader._processes.values())
    monkeypatch.setattr(signals, "asked", lambda: asked)
    processes[0].kill()
    processes[0].join()
    if asked is None:
        with pytest.raises(DataError, match="a worker process ended suddenly"):
            instances.read(np.arange(5, 9))
    else:
        assert np.array_equal(instances.read(np.arange(5, 9))["input_ids"], expected)
    deadline = time.monotonic() + 30
    for process in processes:
        # Not `join`: the pool's thread waits too, and who of the two comes second learns nothing.
        while process.exitcode is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.exitcode is not None
    instances.close()


@pytest.mark.parametrize(
    ("target", "args", "message"),
    [
        ("no.such.module:X", {}, "No module named 'no'"),
        (f"{EXAMPLES}:Absent", {}, "has no attribute 'Absent'"),
        (EXAMPLES, {}, "write it as module:Class"),
        (f"{EXAMPLES}:NO_CLASS", {}, "is no class: 3"),
        (f"{EXAMPLES}:Lines", {"size": 3}, "check dataset.custom.args"),
    ],
)
def test_a_class_that_cannot_be_made_is_a_config_error(
    target: str, args: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_custom(CustomDatasetConfig(target=target, args=args), "train", 8)


def test_a_process_makes_a_data_set_once_for_each_split(tmp_path: Path) -> None:
    custom_examples.Made.splits.clear()
    custom = CustomDatasetConfig(target=f"{EXAMPLES}:Made", args={"count": 24})
    dataset = DatasetConfig(root=str(tmp_path), sequence_length=8, custom=custom)
    config = data_config(dataset, global_batch_size=64)
    assert prepare_corpus(config).rows == [(8, 24)]
    for _ in range(2):
        assert open_corpus(config).evaluation["val"].num_instances == 5
    assert custom_examples.Made.splits == ["train", "val"]
    other = config.replace(dataset=dataset.replace(custom=custom.replace(args={"count": 25})))
    assert prepare_corpus(other).rows == [(8, 25)]
    assert custom_examples.Made.splits == ["train", "val", "train"]


@pytest.mark.parametrize("prefetch_factor", [0, 2])
def test_no_more_batches_are_read_than_asked_for(tmp_path: Path, prefetch_factor: int) -> None:
    custom_examples.Reads.items.clear()
    custom = CustomDatasetConfig(target=f"{EXAMPLES}:Reads", args={"count": 900})
    dataset = DatasetConfig(root=str(tmp_path), sequence_length=8, custom=custom)
    config = data_config(dataset, global_batch_size=64, prefetch_factor=prefetch_factor)
    with contextlib.closing(get_dataloaders(config)[0].iterate()) as batches:
        for _ in range(3):
            next(batches)
    assert 3 * 8 <= len(custom_examples.Reads.items) <= (3 + prefetch_factor) * 8


def test_readers_of_one_iterable_style_object_do_not_disturb_each_other() -> None:
    custom_examples.MadeLines.made.clear()
    one, two = opened("MadeLines"), opened("MadeLines")
    assert len(custom_examples.MadeLines.made) == 1
    for start in range(0, 30, 3):
        for instances in (one, two):
            found = instances.read(np.arange(start, start + 3))["input_ids"][:, 0]
            assert found.tolist() == [n % 10 for n in range(start, start + 3)]


def test_what_is_no_data_set_is_refused() -> None:
    with pytest.raises(DataError, match="neither __len__ and __getitem__"):
        opened("Neither")
    with pytest.raises(ConfigError, match=r"data_loader\.num_workers 2.*one reader reads in order"):
        opened("Lines", workers={"num_workers": 2})
