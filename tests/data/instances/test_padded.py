from pathlib import Path

import numpy as np

from tests.data.instances.token_corpus import EOS, numbered_documents, write_documents
from toolkit.data.instances.base import DocumentPart
from toolkit.data.instances.planned import PaddedDataset


def test_each_document_has_its_rows_in_file_order(tmp_path: Path) -> None:
    prepared = write_documents(tmp_path, numbered_documents([2, 0, 9, 4]))
    dataset = PaddedDataset(prepared, "train", 4)
    rows = dataset.read(np.arange(dataset.num_instances))
    assert rows["input_ids"].tolist() == [
        [0, 1, EOS, EOS],
        [2, 3, 4, 5],
        [6, 7, 8, 9],
        [10, EOS, EOS, EOS],
        [11, 12, 13, 14],
    ]
    assert rows["label_mask"].sum(axis=1).tolist() == [2, 4, 4, 1, 4]
    assert rows["document_ids"].tolist() == [
        [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]
    ]  # fmt: skip
    assert [dataset.documents(index) for index in range(5)] == [
        [DocumentPart(0, 0, 2, 2)],
        [DocumentPart(2, 0, 4, 9)],
        [DocumentPart(2, 4, 8, 9)],
        [DocumentPart(2, 8, 9, 9)],
        [DocumentPart(3, 0, 4, 4)],
    ]
    assert dataset.header.efficiency == 15 / 20
    assert dataset.header.long_documents == 1


def test_every_token_is_evaluated_once_and_masks_ride_along(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(0, 30, 500).tolist()
    targets = [generator.integers(0, 2, n).tolist() for n in lengths]
    prepared = write_documents(tmp_path, numbered_documents(lengths), targets=targets)
    dataset = PaddedDataset(prepared, "train", 7)
    shuffled = generator.permutation(dataset.num_instances)
    rows = dataset.read(shuffled)
    wanted = np.flatnonzero([flag for flags in targets for flag in flags])
    assert sorted(rows["input_ids"][rows["label_mask"]].tolist()) == wanted.tolist()
    is_token = rows["document_ids"] == 0
    assert sorted(rows["input_ids"][is_token].tolist()) == list(range(sum(lengths)))
