import itertools
import math
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.corpus import data_config, files_config, random_text, write_texts
from tests.data.instances import custom_examples
from toolkit import get_dataloaders
from toolkit.data import corpus as corpus_module
from toolkit.data.config import (
    CustomDatasetConfig,
    DataConfig,
    DatasetConfig,
    FixedInstancesConfig,
    PackedInstancesConfig,
    PaddedInstancesConfig,
    VariableInstancesConfig,
)
from toolkit.data.prepare import corpus as prepare_corpus_module
from toolkit.distributed.layout import Layout
from toolkit.errors import ConfigError, DataError

SEQUENCE_LENGTH = 16
BATCH = 8 * SEQUENCE_LENGTH


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetConfig:
    folder = tmp_path_factory.mktemp("loader")
    texts = write_texts(folder / "text", [random_text(12, seed=i) for i in range(40)])
    return files_config(
        folder / "data", texts, sequence_length=SEQUENCE_LENGTH, validation_fraction=0.2
    )


def loaders(dataset: DatasetConfig, *, rank: int = 0, world_size: int = 1, **changes):
    config = data_config(dataset, **{"global_batch_size": BATCH, **changes})
    return get_dataloaders(config, batch_rank=rank, batch_ranks=world_size)


def first_batches(loader, number: int, start: int = 0) -> list[torch.Tensor]:
    iterator = loader.iterate(start)
    return [next(iterator)["input_ids"] for _ in range(number)]


def test_a_start_makes_plans_once_and_data_that_nobody_prepared_gets_them_when_it_is_opened(
    dataset: DatasetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for module in (prepare_corpus_module, corpus_module):
        monkeypatch.setattr(module, "ensure_plans", lambda *_, m=module: calls.append(m.__name__))
    config = data_config(dataset, global_batch_size=BATCH)
    corpus_module.open_corpus(config, prepare_corpus_module.prepare_corpus(config))
    assert calls == [prepare_corpus_module.__name__]
    corpus_module.open_corpus(config)
    assert calls == [prepare_corpus_module.__name__, corpus_module.__name__]


def test_batches_are_rows_of_the_token_file(dataset: DatasetConfig) -> None:
    train, _ = loaders(dataset)
    tokens = np.fromfile(Path(dataset.root) / "corpus/default/train.bin", dtype=np.uint16)
    assert train.num_instances == len(tokens) // SEQUENCE_LENGTH
    assert train.steps_per_epoch == train.num_instances // 8
    assert train.dropped_instances == train.num_instances % 8
    batch = next(train.iterate())["input_ids"]
    assert batch.dtype == torch.int64
    for row, index in zip(batch, train.instance_indices(0), strict=True):
        first = index * SEQUENCE_LENGTH
        assert row.tolist() == tokens[first : first + SEQUENCE_LENGTH].tolist()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_read_the_global_batches_of_one(
    dataset: DatasetConfig, world_size: int
) -> None:
    alone = first_batches(loaders(dataset)[0], 80)
    ranks = [
        first_batches(loaders(dataset, rank=rank, world_size=world_size)[0], 80)
        for rank in range(world_size)
    ]
    for batch, *slices in zip(alone, *ranks, strict=True):
        assert torch.equal(batch, torch.cat(slices))


@pytest.mark.parametrize("prefetch_factor", [0, 1, 7])
def test_batch_n_directly_is_batch_n_in_turn(dataset: DatasetConfig, prefetch_factor: int) -> None:
    train, _ = loaders(dataset, prefetch_factor=prefetch_factor)
    number = 2 * train.steps_per_epoch + 3
    for n, batch in enumerate(first_batches(train, number)):
        assert torch.equal(batch, train.global_batch(n)["input_ids"])
    for n, batch in enumerate(first_batches(train, 3, start=number - 5), start=number - 5):
        assert torch.equal(batch, train.global_batch(n)["input_ids"])
    assert train.batches_done == number - 2


def test_small_chunks_read_the_same(
    dataset: DatasetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = first_batches(loaders(dataset)[0], 50)
    monkeypatch.setattr("toolkit.data.loader.CHUNK_TOKENS", 3 * BATCH)
    found = first_batches(loaders(dataset, prefetch_factor=2)[0], 50)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_each_epoch_is_another_order_of_each_instance_once(dataset: DatasetConfig) -> None:
    train, _ = loaders(dataset)
    steps = train.steps_per_epoch
    epochs = [
        np.concatenate([train.instance_indices(e * steps + n) for n in range(steps)])
        for e in range(2)
    ]
    for indices in epochs:
        assert len(np.unique(indices)) == steps * 8 == len(indices)
        assert indices.max() < train.num_instances
    assert not np.array_equal(epochs[0], epochs[1])


def test_seed_changes_the_order_and_no_shuffle_is_file_order(dataset: DatasetConfig) -> None:
    first, other = loaders(dataset)[0], loaders(dataset, seed=1)[0]
    assert not np.array_equal(first.instance_indices(0), other.instance_indices(0))
    in_order = loaders(dataset, shuffle=False)[0]
    assert in_order.instance_indices(1).tolist() == list(range(8, 16))
    assert in_order.instance_indices(in_order.steps_per_epoch).tolist() == list(range(8))


def test_experiment_seed_is_the_default(dataset: DatasetConfig) -> None:
    config = data_config(dataset, global_batch_size=BATCH)
    seeded = DataConfig(dataset=dataset, data_loader=config.data_loader, seed=5)
    explicit = loaders(dataset, seed=5)[0].instance_indices(3)
    assert np.array_equal(get_dataloaders(seeded)[0].instance_indices(3), explicit)


def test_state_is_the_next_unseen_batch(dataset: DatasetConfig) -> None:
    train, _ = loaders(dataset)
    iterator = train.iterate()
    for _ in range(5):
        next(iterator)
    state = train.state_dict()
    assert state["batch"] == 5
    again, _ = loaders(dataset)
    again.load_state_dict(state)
    continued = next(again.iterate(again.batches_done))["input_ids"]
    assert torch.equal(continued, next(iterator)["input_ids"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("fingerprint", "other", r"the training data \(was other, is \w+\).*load_weights_only"),
        ("seed", 7, r": seed, which data_loader\.seed follows \(was 7, is 0\)"),
        ("shuffle", False, r"data_loader\.shuffle \(was False, is True\)"),
        ("sequence_length", 8, r"dataset\.sequence_length \(was 8, is 16\)"),
    ],
)
def test_state_of_other_data_is_refused(
    dataset: DatasetConfig, key: str, value: object, message: str
) -> None:
    train, _ = loaders(dataset)
    with pytest.raises(DataError, match=message):
        train.load_state_dict({**train.state_dict(), key: value})


def test_another_batch_size_goes_on_with_the_next_unseen_instance(dataset: DatasetConfig) -> None:
    large, _ = loaders(dataset, shuffle=False)
    first_batches(large, 3)
    small, _ = loaders(dataset, shuffle=False, global_batch_size=BATCH // 4, world_size=2)
    small.load_state_dict(large.state_dict())
    assert small.notice == (
        "data_loader.global_batch_size 128 -> 32 tokens: batch 3 starts at the next unseen "
        "instance, 24 of the data stream"
    )
    iterator = small.iterate(small.batches_done)
    rows = [next(iterator)["input_ids"] for _ in range(4)]
    # Rank 0 of 2 reads the first of each two rows.
    assert torch.equal(torch.cat(rows), large.global_batch(3)["input_ids"][::2])
    assert small.batches_done == 7

    again, _ = loaders(dataset, shuffle=False)
    again.load_state_dict(small.state_dict())
    assert again.instance_indices(7).tolist() == list(range(32, 40))
    assert again.instance_indices(2).tolist() == list(range(16, 24))
    assert again.instance_indices(5).tolist() == [28, 29]


def test_an_epoch_ends_where_it_does_after_a_change_of_the_batch_size(
    dataset: DatasetConfig,
) -> None:
    large, _ = loaders(dataset)
    seen = [large.instance_indices(n) for n in range(4)]
    large.batches_done = 4
    small, _ = loaders(dataset, global_batch_size=BATCH // 2)
    small.load_state_dict(large.state_dict())
    end = small.batches.steps_of(1, "epochs")
    assert small.batches.epochs_done(end) == 1.0
    assert small.batches.epochs_done(4) == pytest.approx(4 * 8 / (4 * 8 + (end - 4) * 4))
    seen += [small.instance_indices(n) for n in range(4, end)]
    numbers = np.concatenate(seen)
    assert len(np.unique(numbers)) == len(numbers)
    assert small.num_instances - len(numbers) < 4
    iterator = small.iterate(4)
    for n in range(4, end + 3):
        assert torch.equal(next(iterator)["input_ids"], small.global_batch(n)["input_ids"])


def test_ranks_of_one_model_parallel_group_read_the_same_rows(dataset: DatasetConfig) -> None:
    config = data_config(dataset, global_batch_size=BATCH)
    layout = Layout(dp_shard=2, tp=2, is_fsdp=True)
    shares = [(layout.batch_rank(rank), layout.batch_ranks) for rank in range(layout.world_size)]
    loaders_of_ranks = [
        get_dataloaders(config, batch_rank=share, batch_ranks=number)[0] for share, number in shares
    ]
    rows = [next(loader.iterate())["input_ids"] for loader in loaders_of_ranks]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[2], rows[3])
    alone = loaders(dataset)[0].global_batch(0)["input_ids"]
    assert torch.equal(torch.cat([rows[0], rows[2]]), alone)


@pytest.mark.parametrize("instances", ["packed", "padded", "fixed"])
def test_masks_and_documents_come_with_the_rows(dataset: DatasetConfig, instances: str) -> None:
    config = {
        "packed": PackedInstancesConfig(),
        "padded": PaddedInstancesConfig(),
        "fixed": FixedInstancesConfig(intra_document_masking=True),
    }[instances]
    train, evaluation = loaders(dataset.replace(instances=config), prefetch_factor=2)
    expected = {"input_ids", "document_ids"} | ({"label_mask"} if instances != "fixed" else set())
    for batch in [next(train.iterate(3)), train.global_batch(3)]:
        assert set(batch) == expected
        assert batch["document_ids"].dtype == torch.int32
        assert {value.shape for value in batch.values()} == {(8, SEQUENCE_LENGTH)}
    assert torch.equal(
        next(train.iterate(3))["document_ids"], train.global_batch(3)["document_ids"]
    )
    assert "document_ids" in next(iter(evaluation["val"]))


def test_rows_of_variable_length_have_the_same_tokens_a_batch(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text", ["x" * (3 + n % 40) for n in range(300)])
    config = VariableInstancesConfig(min_sequence_length=4, num_cycles=2)
    dataset = files_config(
        tmp_path / "data", texts, sequence_length=SEQUENCE_LENGTH, instances=config
    )
    train, _ = loaders(dataset)
    iterator = train.iterate()
    shapes = []
    for n in range(int(train.steps_per_epoch)):
        batch = next(iterator)["input_ids"]
        assert torch.equal(batch, train.global_batch(n)["input_ids"])
        shapes.append(tuple(batch.shape))
    assert {rows * length for rows, length in shapes} == {BATCH}
    assert set(shapes) == {(32, 4), (16, 8), (8, 16)}
    lengths = [length for _, length in shapes]
    assert sum(after < before for before, after in itertools.pairwise(lengths)) == 1
    other, _ = loaders(dataset.replace(instances=config.replace(curriculum="shrink")))
    with pytest.raises(DataError, match=r"dataset\.instances \(was grow x 2, is shrink x 2\)"):
        other.load_state_dict(train.state_dict())
    other, _ = loaders(dataset, global_batch_size=2 * BATCH)
    with pytest.raises(ConfigError, match="cannot change in the middle of a run"):
        other.load_state_dict(train.state_dict())


def test_a_custom_data_set_is_shuffled_and_resumed_like_any(tmp_path: Path) -> None:
    config = DatasetConfig(
        root=str(tmp_path),
        sequence_length=SEQUENCE_LENGTH,
        custom=CustomDatasetConfig(target=f"{custom_examples.__name__}:Counting"),
    )
    train, evaluation = loaders(config)
    assert train.steps_per_epoch == 5
    assert train.vocab_size == 1000
    seen = torch.cat(first_batches(train, 5))[:, 0]
    assert sorted(seen.tolist()) == list(range(40))
    assert seen.tolist() != list(range(40))
    assert evaluation["val"].num_instances == 5
    again, _ = loaders(config)
    again.load_state_dict(train.state_dict())
    assert again.batches_done == 5
    other, _ = loaders(config.replace(custom=config.custom.replace(args={"count": 48})))
    with pytest.raises(DataError, match="the training data"):
        other.load_state_dict(train.state_dict())


def test_an_iterable_data_set_keeps_its_order_over_ranks(tmp_path: Path) -> None:
    config = DatasetConfig(
        root=str(tmp_path),
        sequence_length=SEQUENCE_LENGTH,
        custom=CustomDatasetConfig(target=f"{custom_examples.__name__}:Lines"),
    )
    ranks = [loaders(config, rank=r, world_size=2)[0] for r in range(2)]
    assert ranks[0].steps_per_epoch == math.inf
    batches = [first_batches(loader, 4, start=2) for loader in ranks]
    for n, pair in enumerate(zip(*batches, strict=True), start=2):
        items = torch.cat(pair)[:, 0].tolist()
        assert items == [i % 10 for i in range(n * 8, n * 8 + 8)]


@pytest.mark.parametrize(("size", "nearest"), [(100, "96 or 128"), (24, "32 or 64")])
def test_indivisible_batch_names_both_keys_and_the_nearest_sizes(
    dataset: DatasetConfig, size: int, nearest: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        loaders(dataset, world_size=2, global_batch_size=size)
    message = str(caught.value)
    assert f"data_loader.global_batch_size {size}" in message
    assert "dataset.sequence_length 16 x 2 data-parallel ranks" in message
    assert message.endswith(nearest)


def test_too_little_data_for_one_batch_gives_the_counts(dataset: DatasetConfig) -> None:
    with pytest.raises(DataError, match=r"not enough data for one batch.*needs 10000;") as caught:
        loaders(dataset, global_batch_size=10_000 * SEQUENCE_LENGTH)
    fits = re.search(r"; data_loader.global_batch_size (\d+) fits", str(caught.value))
    assert fits is not None
    assert loaders(dataset, global_batch_size=int(fits[1]))[0].steps_per_epoch == 1
    with pytest.raises(DataError, match="not enough data for one batch"):
        loaders(dataset, global_batch_size=int(fits[1]) + SEQUENCE_LENGTH)


def test_error_of_the_reading_thread_reaches_the_caller(
    dataset: DatasetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, _ = loaders(dataset)

    def fail(indices: np.ndarray) -> np.ndarray:
        raise OSError("disk gone")

    monkeypatch.setattr(train.dataset, "read", fail)
    with pytest.raises(OSError, match="disk gone"):
        next(train.iterate())


def test_an_id_beyond_the_vocabulary_is_named_before_the_model_meets_it(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text", [random_text(400, seed=i) for i in range(4)])
    dataset = files_config(
        tmp_path / "data", texts, sequence_length=SEQUENCE_LENGTH, validation_fraction=0.4
    )
    train, evaluation = loaders(dataset, shuffle=False)
    for split in ("train", "val"):
        path = tmp_path / f"data/corpus/default/{split}.bin"
        tokens = np.fromfile(path, dtype=np.uint16)
        tokens[200 * SEQUENCE_LENGTH + 7] = 999  # in no sampled block
        path.write_bytes(tokens.tobytes())
    train, evaluation = loaders(dataset, shuffle=False)
    message = r"instance 200, token 7: id 999, but the vocabulary has 257.*toolkit data inspect"
    with pytest.raises(DataError, match=message):
        next(train.iterate(200 * SEQUENCE_LENGTH // BATCH))
    with pytest.raises(DataError, match=message):
        list(evaluation["val"])


def readers_alive() -> int:
    return sum(thread.name == "data-reader" for thread in threading.enumerate())


def test_reading_thread_ends_with_its_iterator(dataset: DatasetConfig) -> None:
    train, _ = loaders(dataset)
    before = readers_alive()
    closed, dropped = train.iterate(), train.iterate()
    next(closed)
    next(dropped)
    assert readers_alive() == before + 2
    closed.close()
    del dropped
    for _ in range(500):
        if readers_alive() == before:
            break
        time.sleep(0.01)
    assert readers_alive() == before


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("eval_batch_size", [SEQUENCE_LENGTH, 5 * SEQUENCE_LENGTH, 10**6])
def test_each_validation_instance_is_evaluated_exactly_once(
    dataset: DatasetConfig, world_size: int, eval_batch_size: int
) -> None:
    wanted = 23
    ranks = [
        loaders(
            dataset, rank=rank, world_size=world_size, eval_batch_size=eval_batch_size,
            eval_tokens=wanted * SEQUENCE_LENGTH + 3, global_batch_size=12 * SEQUENCE_LENGTH,
        )[1]["val"]
        for rank in range(world_size)
    ]  # fmt: skip
    shapes, rows = set(), []
    for step in zip(*ranks, strict=True):
        for batch in step:
            shapes.add(tuple(batch["input_ids"].shape))
            assert batch["label_mask"].dtype == torch.bool
            real = batch["label_mask"].all(dim=1)
            assert torch.equal(real, batch["label_mask"].any(dim=1))
            rows.append(batch["input_ids"][real])
    tokens = np.fromfile(Path(dataset.root) / "corpus/default/val.bin", dtype=np.uint16)
    expected = tokens[: wanted * SEQUENCE_LENGTH].reshape(wanted, -1).astype(np.int64)
    assert len(shapes) == 1
    assert {len(loader) for loader in ranks} == {ranks[0].num_batches}
    assert np.array_equal(torch.cat(rows).numpy(), expected)
    assert ranks[0].num_instances == wanted


def test_bytes_per_token_are_those_of_the_instances_evaluated(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text", ["ab" * 20, "c" * 64, "d" * 30] * 10)
    dataset = files_config(
        tmp_path / "data", texts, sequence_length=SEQUENCE_LENGTH, validation_fraction=0.5
    )
    evaluation = loaders(dataset, eval_tokens=2 * SEQUENCE_LENGTH)[1]["val"]
    everything = loaders(dataset, eval_tokens=None)[1]["val"]
    ids = evaluation.dataset.read(np.arange(2))["input_ids"]
    assert evaluation.bytes_per_token == (ids < 256).sum() / ids.size
    assert everything.bytes_per_token == everything.dataset.bytes_per_token
    assert evaluation.bytes_per_token != everything.bytes_per_token


def test_evaluation_batch_defaults_to_the_callers_size(dataset: DatasetConfig) -> None:
    config = data_config(dataset, global_batch_size=BATCH)
    _, evaluation = get_dataloaders(config, eval_batch_tokens=3 * SEQUENCE_LENGTH)
    assert next(iter(evaluation["val"]))["input_ids"].shape == (3, SEQUENCE_LENGTH)


def test_no_validation_split_means_no_evaluation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = write_texts(tmp_path / "text", ["a" * 400])
    config = files_config(tmp_path / "data", texts, sequence_length=SEQUENCE_LENGTH)
    assert loaders(config)[1] == {}
    config = config.replace(dataset_config="tail", validation_fraction=0.01)
    assert loaders(config)[1] == {}
    assert "validation split" in caplog.text
    assert "less than one instance of dataset.sequence_length 16" in caplog.text


def test_importing_the_package_imports_no_torch() -> None:
    code = (
        "import sys, toolkit.data, toolkit.data.prepare.build.prepare; "
        "import toolkit.data.tokens.prepared; "
        "toolkit.read_prepared; "
        "print([m for m in ('torch', 'datasets', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_process_ends_cleanly_while_the_thread_reads(dataset: DatasetConfig) -> None:
    code = (
        "import sys, msgspec\n"
        "from toolkit import get_dataloaders\n"
        "from toolkit.data.config import DataConfig\n"
        "config = msgspec.json.decode(sys.argv[1], type=DataConfig)\n"
        "iterators = [get_dataloaders(config)[0].iterate() for _ in range(8)]\n"
        "[next(iterator) for iterator in iterators]\n"
        "iterators[0].close()\n"
    )
    config = data_config(dataset, global_batch_size=BATCH, prefetch_factor=64)
    result = subprocess.run(
        [sys.executable, "-c", code, config.to_json().decode()], capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
