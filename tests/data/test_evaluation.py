"""Validation instances are read once each, whatever the number of ranks and rows."""

from pathlib import Path

import pytest
import torch

from tests.data.corpus import data_config
from tests.data.instances import custom_examples
from toolkit import get_dataloaders
from toolkit.data.config import CustomDatasetConfig, DatasetConfig


def evaluation(folder: Path, *, rank: int, world_size: int, rows: int, tokens: int | None = None):
    target = f"{custom_examples.__name__}:ReadLines"
    dataset = DatasetConfig(
        root=str(folder), sequence_length=8, custom=CustomDatasetConfig(target=target)
    )
    config = data_config(
        dataset, global_batch_size=64, eval_batch_size=rows * 8, eval_tokens=tokens
    )
    return get_dataloaders(config, batch_rank=rank, batch_ranks=world_size)[1]["val"]


@pytest.mark.parametrize(("world_size", "rows"), [(1, 4), (1, 37), (2, 4), (4, 3), (4, 64)])
def test_items_of_an_iterable_data_set_are_read_once(
    tmp_path: Path, world_size: int, rows: int
) -> None:
    seen: list[int] = []
    for rank in range(world_size):
        custom_examples.ReadLines.given.clear()
        loader = evaluation(tmp_path, rank=rank, world_size=world_size, rows=rows)
        batches = list(loader)
        given = custom_examples.ReadLines.given
        assert given == list(range(len(given)))
        assert len({tuple(batch["input_ids"].shape) for batch in batches}) == 1
        assert len(batches) == loader.num_batches
        for batch in batches:
            real = batch["label_mask"].all(dim=1)
            assert torch.equal(real, batch["label_mask"].any(dim=1))
            seen += batch["input_ids"][real, 0].tolist()
    assert sorted(seen) == list(range(37))


def test_a_rank_without_an_instance_of_its_own_has_masked_rows(tmp_path: Path) -> None:
    custom_examples.ReadLines.given.clear()
    loader = evaluation(tmp_path, rank=3, world_size=4, rows=1, tokens=16)
    (batch,) = list(loader)
    assert batch["input_ids"].tolist() == [[1] * 8]
    assert not batch["label_mask"].any()
    assert custom_examples.ReadLines.given == [0, 1]
