from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.corpus import files_config, write_texts
from tests.data.instances.token_corpus import (
    numbered_documents,
    overwrite_index,
    write_documents,
)
from toolkit.data.config import FixedInstancesConfig
from toolkit.data.instances.base import DocumentPart
from toolkit.data.instances.fixed import TokenDataset
from toolkit.data.instances.open import ensure_plans
from toolkit.data.prepare.build.prepare import prepare_dataset
from toolkit.errors import DataError


def test_rows_are_the_tokens_in_file_order(tmp_path: Path) -> None:
    prepared = write_documents(tmp_path, numbered_documents([5, 3, 3]))
    dataset = TokenDataset(prepared, "train", 4)
    rows = dataset.read(np.array([1, 0]))
    assert dataset.num_instances == 2
    assert list(rows) == ["input_ids"]
    assert rows["input_ids"].dtype == np.int64
    assert rows["input_ids"].tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]


def test_document_ids_count_the_documents_of_a_row(tmp_path: Path) -> None:
    # Empty documents at the start, in the middle, at a row's border and at the end.
    lengths = [0, 3, 0, 0, 2, 3, 0, 7, 1, 0]
    prepared = write_documents(tmp_path, numbered_documents(lengths))
    dataset = TokenDataset(prepared, "train", 8, intra_document_masking=True)
    rows = dataset.read(np.array([0, 1]))
    assert rows["document_ids"].dtype == np.int32
    assert rows["document_ids"].tolist() == [[0, 0, 0, 1, 1, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 1]]
    assert dataset.documents(0) == [
        DocumentPart(1, 0, 3, 3), DocumentPart(4, 0, 2, 2), DocumentPart(5, 0, 3, 3)
    ]  # fmt: skip
    assert dataset.documents(1) == [DocumentPart(7, 0, 7, 7), DocumentPart(8, 0, 1, 1)]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=40).filter(lambda x: sum(x) > 0),
    sequence_length=st.integers(2, 9),
)
def test_document_ids_agree_with_the_documents_listed(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sequence_length: int
) -> None:
    folder = tmp_path_factory.mktemp("fixed")
    prepared = write_documents(folder, numbered_documents(lengths))
    dataset = TokenDataset(prepared, "train", sequence_length, intra_document_masking=True)
    ids = dataset.read(np.arange(dataset.num_instances))["document_ids"]
    for index, row in enumerate(ids):
        parts = dataset.documents(index)
        sizes = [part.end - part.start for part in parts]
        assert row.tolist() == np.repeat(np.arange(len(parts)), sizes).tolist()


def test_masks_ride_along(tmp_path: Path) -> None:
    targets = [[0, 1, 1], [1, 0, 1, 1, 0]]
    prepared = write_documents(tmp_path, numbered_documents([3, 5]), targets=targets)
    mask = TokenDataset(prepared, "train", 4).read(np.array([1, 0]))["label_mask"]
    assert mask.dtype == np.bool_
    assert mask.tolist() == [[False, True, True, False], [False, True, True, True]]


def test_fingerprint_without_masking_is_that_of_the_tokens(tmp_path: Path) -> None:
    prepared = write_documents(tmp_path, numbered_documents([5, 9]))
    other = write_documents(tmp_path / "other", numbered_documents([6, 8]))
    plain = TokenDataset(prepared, "train", 4).fingerprint
    masked = TokenDataset(prepared, "train", 4, intra_document_masking=True).fingerprint
    moved = TokenDataset(other, "train", 4, intra_document_masking=True).fingerprint
    assert plain == prepared.fingerprint("train") == other.fingerprint("train")
    assert len({plain, masked, moved}) == 3


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([1, 4, 6], "the first document starts at 1, not at 0"),
        ([0, 4, 12], "document 2 starts at 12, but the split has 11 tokens"),
    ],
)
def test_an_index_that_cannot_be_of_these_tokens_is_refused(
    tmp_path: Path, starts: list[int], message: str
) -> None:
    prepared = write_documents(tmp_path, numbered_documents([5, 3, 3]))
    overwrite_index(prepared, starts)
    with pytest.raises(DataError, match=message):
        TokenDataset(prepared, "train", 4, intra_document_masking=True)


def test_an_index_that_disagrees_is_found_before_masks_are_made_of_it(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text", ["x" * (5 + n) for n in range(40)])
    masked = FixedInstancesConfig(intra_document_masking=True)
    config = files_config(tmp_path / "data", texts, sequence_length=16, instances=masked)
    prepared = prepare_dataset(config)
    ensure_plans(prepared, config)
    path = prepared.folder / "train.idx"
    starts = np.fromfile(path, dtype=np.uint64)
    starts[[7, 8]] = starts[[8, 7]]
    path.write_bytes(starts.tobytes())
    with pytest.raises(DataError, match=r"train\.idx.*document 8 starts at"):
        ensure_plans(prepared, config)
    ensure_plans(prepared, config.replace(instances=FixedInstancesConfig()))
