"""Tokens are read once, in one order, whatever a schedule makes of batches and rows."""

from typing import Any

import pytest
import torch

from tests.data.corpus import data_config, files_config, random_text, write_texts
from toolkit import get_dataloaders
from toolkit.data import loader as loader_module
from toolkit.data.config import (
    BatchSizeChangeConfig,
    DatasetConfig,
    FixedInstancesConfig,
    SequenceLengthChangeConfig,
)
from toolkit.data.loader import TrainLoader
from toolkit.errors import DataError

LENGTH = 16
ROW = 4 * LENGTH
"""Tokens of the smallest batch that four ranks share."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> DatasetConfig:
    folder = tmp_path_factory.mktemp("schedules")
    texts = write_texts(folder / "text", [random_text(12, seed=i) for i in range(30)])
    kind = FixedInstancesConfig(intra_document_masking=True)
    return files_config(folder / "data", texts, sequence_length=LENGTH, instances=kind)


SIZES: Any = (
    BatchSizeChangeConfig(tokens=3 * ROW),
    BatchSizeChangeConfig(tokens=9 * ROW, global_batch_size=6 * ROW),
    BatchSizeChangeConfig(tokens=40 * ROW, global_batch_size=ROW),
)
LENGTHS: Any = (
    SequenceLengthChangeConfig(tokens=0, sequence_length=4),
    SequenceLengthChangeConfig(tokens=5 * ROW),
    SequenceLengthChangeConfig(tokens=15 * ROW),
)


def loader_of(dataset: DatasetConfig, rank: int = 0, ranks: int = 1, **changes: Any) -> TrainLoader:
    settings = {"global_batch_size": ROW, "batch_size_schedule": SIZES}
    settings |= {"sequence_length_schedule": LENGTHS, **changes}
    config = data_config(dataset, **settings)
    return get_dataloaders(config, batch_rank=rank, batch_ranks=ranks)[0]


@pytest.mark.parametrize("chunk_tokens", [1, 1 << 16])
def test_every_prefix_holds_the_tokens_of_one_order_on_any_number_of_ranks(
    dataset: DatasetConfig, monkeypatch: pytest.MonkeyPatch, chunk_tokens: int
) -> None:
    monkeypatch.setattr(loader_module, "CHUNK_TOKENS", chunk_tokens)
    plain = loader_of(dataset, batch_size_schedule=(), sequence_length_schedule=())
    steps = 40
    alone = loader_of(dataset)
    lengths = [alone.batches.row_length(n) for n in range(steps)]
    assert {4, 8, 16} == set(lengths)
    for ranks in (1, 2, 4):
        loaders = [loader_of(dataset, rank, ranks, prefetch_factor=0) for rank in range(ranks)]
        # Ranks stop at other places, and go on from the state of the run.
        for stop in (0, 7, 13):
            state = {**alone.state_dict(), "batch": stop}
            for one in loaders:
                one.load_state_dict(state)
            streams = [one.iterate(stop) for one in loaders]
            for n in range(stop, steps):
                batch = [next(stream)["input_ids"] for stream in streams]
                together = torch.cat(batch)
                assert together.shape[1] == lengths[n]
                assert together.numel() == alone.batches.batch_tokens(n)
                if stop == 0:
                    whole = alone.dataset.read(alone.instance_indices(n))["input_ids"]
                    assert together.reshape(-1).tolist() == whole.reshape(-1).tolist()
                assert torch.equal(together, alone.global_batch(n)["input_ids"])
    # The union is a prefix of what batches of one size read.
    read = [i for n in range(steps) for i in alone.instance_indices(n)]
    straight = [i for n in range(int(plain.steps_per_epoch)) for i in plain.instance_indices(n)]
    assert read == straight[: len(read)]


def test_documents_are_cut_with_their_rows(dataset: DatasetConfig) -> None:
    cut, whole = loader_of(dataset), loader_of(dataset, sequence_length_schedule=())
    for name, values in cut.global_batch(0).items():
        assert values.shape == (16, 4)
        assert torch.equal(values.reshape(4, LENGTH), whole.global_batch(0)[name])


def test_another_schedule_on_resume_changes_only_what_is_to_come(dataset: DatasetConfig) -> None:
    before, after = loader_of(dataset), loader_of(dataset, batch_size_schedule=SIZES[:1])
    before.batches_done = 7
    after.load_state_dict(before.state_dict())
    assert after.notice is not None
    assert "384 -> 128 tokens: batch 7 starts at the next unseen" in after.notice
    for n in range(7):
        assert torch.equal(after.global_batch(n)["input_ids"], before.global_batch(n)["input_ids"])
    joined = torch.tensor([i for n in (7, 8, 9) for i in after.instance_indices(n)])
    assert joined.tolist() == before.instance_indices(7).tolist()
    same = loader_of(dataset)
    same.load_state_dict(before.state_dict())
    assert same.notice is None
    assert same.state_dict() == before.state_dict()


def test_a_batch_larger_than_an_epoch_is_refused(dataset: DatasetConfig) -> None:
    huge = (BatchSizeChangeConfig(tokens=ROW, global_batch_size=1 << 20),)
    with pytest.raises(
        DataError,
        match=r"global_batch_size 1048576 needs 65536; data_loader\.global_batch_size 17296 fits",
    ):
        loader_of(dataset, batch_size_schedule=huge)
