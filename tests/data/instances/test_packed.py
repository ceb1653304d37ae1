import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.instances.token_corpus import (
    EOS,
    numbered_documents,
    overwrite_index,
    write_documents,
)
from toolkit.data.instances import index as index_module
from toolkit.data.instances.packed import PackedDataset, best_fit_decreasing, spreading_step
from toolkit.data.instances.plans import plan_of
from toolkit.errors import DataError


def cut(lengths: list[int], sequence_length: int) -> list[int]:
    return [min(n - at, sequence_length) for n in lengths for at in range(0, n, sequence_length)]


def naive_sums(pieces: list[int], sequence_length: int) -> list[int]:
    """Best fit decreasing, piece by piece; tokens in each row, sorted."""
    rooms: list[int] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [room for room in rooms if room >= piece]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else sequence_length) - piece)
    return sorted(sequence_length - room for room in rooms)


corpora = st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(lambda x: sum(x) > 0)


@settings(max_examples=120, deadline=None)
@given(lengths=corpora, sequence_length=st.integers(2, 24))
def test_rows_are_filled_as_by_best_fit_piece_by_piece(
    lengths: list[int], sequence_length: int
) -> None:
    pieces = cut(lengths, sequence_length)
    counts = np.bincount(pieces, minlength=sequence_length + 1)
    _, groups = best_fit_decreasing(counts, sequence_length)
    rows = [group.lengths().tolist() for group in groups for _ in range(group.num_rows)]
    # Which of two rows with the same room takes a piece is free, and changes no row's room but in
    # name: the sums are those of every best fit.
    assert sorted(sum(row) for row in rows) == naive_sums(pieces, sequence_length)
    assert sorted(piece for row in rows for piece in row) == sorted(pieces)


@settings(max_examples=120, deadline=None)
@given(lengths=corpora, sequence_length=st.integers(2, 24), block=st.sampled_from([1, 3, 1 << 18]))
def test_every_token_is_in_one_row_and_what_fits_is_whole(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sequence_length: int, block: int
) -> None:
    prepared = write_documents(tmp_path_factory.mktemp("packed"), numbered_documents(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "BLOCK_DOCUMENTS", block)
        dataset = PackedDataset(prepared, "train", sequence_length)
    rows = dataset.read(np.arange(dataset.num_instances))
    ids, mask, documents = rows["input_ids"], rows["label_mask"], rows["document_ids"]
    assert ids.shape == mask.shape == documents.shape == (dataset.num_instances, sequence_length)
    assert (ids.dtype, mask.dtype, documents.dtype) == (np.int64, np.bool_, np.int32)
    assert sorted(ids[mask].tolist()) == list(range(sum(lengths)))
    assert (ids[~mask] == EOS).all()
    assert dataset.header.efficiency == pytest.approx(mask.mean())
    assert dataset.header.long_documents == sum(n > sequence_length for n in lengths)

    starts = np.cumsum([0, *lengths])[:-1]
    seen = []
    for number in range(dataset.num_instances):
        parts, position = dataset.documents(number), 0
        for place, part in enumerate(parts):
            stop = position + part.end - part.start
            first = starts[part.document] + part.start
            assert ids[number, position:stop].tolist() == list(
                range(first, first + stop - position)
            )
            assert (documents[number, position:stop] == place).all()
            # A document that fits is whole; of a longer one, full rows come first.
            assert part.num_tokens == lengths[part.document]
            assert part.start % sequence_length == 0
            assert part.end == min(part.num_tokens, part.start + sequence_length)
            seen.append((part.document, part.start))
            position = stop
        assert mask[number].tolist() == [True] * position + [False] * (sequence_length - position)
        assert (documents[number, position:] == len(parts)).all()
    assert len(seen) == len(set(seen))


def test_a_row_shows_its_documents_and_padding(tmp_path: Path) -> None:
    documents = [[10, 11], [], [20, 21, 22, 23, 24], [30, 31, 32]]
    targets = [[0, 1], [], [1, 1, 0, 1, 1], [0, 0, 1]]
    prepared = write_documents(tmp_path, documents, targets=targets)
    dataset = PackedDataset(prepared, "train", 6)
    assert dataset.num_instances == 2
    rows = dataset.read(np.arange(2))
    order = rows["input_ids"][:, 0].argsort().tolist()
    assert rows["input_ids"][order].tolist() == [
        [20, 21, 22, 23, 24, EOS], [30, 31, 32, 10, 11, EOS]
    ]  # fmt: skip
    assert rows["document_ids"][order].tolist() == [[0, 0, 0, 0, 0, 1], [0, 0, 0, 1, 1, 2]]
    assert rows["label_mask"][order].astype(int).tolist() == [
        [1, 1, 0, 1, 1, 0],
        [0, 0, 1, 0, 1, 0],
    ]


def test_no_end_of_document_token_pads_with_zero(tmp_path: Path) -> None:
    prepared = write_documents(tmp_path, [[7, 8, 9]], eos_id=None)
    assert PackedDataset(prepared, "train", 5).read(np.array([0]))["input_ids"].tolist() == [
        [7, 8, 9, 0, 0]
    ]


def test_positions_are_filled_on_a_realistic_distribution(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 1.2, 20_000).astype(int) + 1
    documents = [np.zeros(n, dtype=int).tolist() for n in lengths]
    dataset = PackedDataset(write_documents(tmp_path, documents), "train", 1024)
    assert dataset.header.num_documents == 20_000
    assert dataset.header.efficiency > 0.999
    assert dataset.header.num_instances == pytest.approx(lengths.sum() / 1024, rel=0.001)


def test_first_rows_are_like_the_others(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(1, 65, 20_000)
    documents = [np.zeros(n, dtype=int).tolist() for n in lengths]
    dataset = PackedDataset(write_documents(tmp_path, documents), "train", 64)
    per_row = [len(dataset.documents(index)) for index in range(dataset.num_instances)]
    assert np.mean(per_row[:1000]) == pytest.approx(np.mean(per_row), rel=0.1)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 997, 1000])
def test_spread_numbers_are_all_rows_evenly(size: int) -> None:
    visited = np.arange(size) * spreading_step(size) % size
    assert sorted(visited.tolist()) == list(range(size))
    if size > 100:
        tenths = np.histogram(visited[: size // 5], bins=10, range=(0, size))[0]
        assert tenths.min() >= size // 50 - 3
    assert spreading_step(10**11) * (10**11 - 1) < 2**63


MAKER = """
import sys, time
import msgspec
from toolkit.data.instances import packed
from toolkit.data.tokens.prepared import Manifest, PreparedDataset
manifest = msgspec.json.decode(open(sys.argv[1] + "/manifest", "rb").read(), type=Manifest)
make, made = packed._make, []
def slowly(*arguments):
    made.append(1)
    time.sleep(0.5)  # the others come while the plan is being made
    return make(*arguments)
packed._make = slowly
print("ready", flush=True)
sys.stdin.readline()
dataset = packed.PackedDataset(PreparedDataset(sys.argv[1], manifest), "train", 64)
print(dataset.num_instances, len(made))
"""


def test_processes_at_once_make_one_plan_that_is_always_the_same(tmp_path: Path) -> None:
    import msgspec

    lengths = np.random.default_rng(0).integers(0, 90, 3000).tolist()
    documents = numbered_documents(lengths)
    documents = [[token % 50_000 for token in document] for document in documents]
    alone = write_documents(tmp_path / "alone", documents)
    together = write_documents(tmp_path / "together", documents)
    (together.folder / "manifest").write_bytes(msgspec.json.encode(together.manifest))
    expected = PackedDataset(alone, "train", 64)
    makers = [
        subprocess.Popen(
            [sys.executable, "-c", MAKER, str(together.folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(3)
    ]  # fmt: skip
    for maker in makers:
        assert maker.stdout is not None
        assert maker.stdout.readline() == "ready\n"
    for maker in makers:
        assert maker.stdin is not None
        maker.stdin.write("go\n")
        maker.stdin.flush()
    answers = sorted(maker.communicate()[0] for maker in makers)
    count = expected.num_instances
    assert answers == [f"{count} 0\n", f"{count} 0\n", f"{count} 1\n"]
    folders = [plan_of(data, "train", "packed", 64).folder for data in (alone, together)]
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]
    visible = [p.name for p in folders[1].parent.iterdir() if not p.name.endswith(".lock")]
    assert visible == [folders[1].name]


def test_a_plan_is_kept_and_what_a_killed_process_left_is_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepared = write_documents(tmp_path, numbered_documents([3, 5, 9]))
    folder = plan_of(prepared, "train", "packed", 8).folder
    leftover = folder.parent / f".{folder.name}.123-abc.tmp"
    leftover.mkdir(parents=True)
    with caplog.at_level("INFO"):
        PackedDataset(prepared, "train", 8)
        PackedDataset(prepared, "train", 8)
    reports = [message for message in caplog.messages if "positions filled" in message]
    assert len(reports) == 1
    assert (
        "3 documents in 3 rows, 70.83% of positions filled, 1 document longer than 8 cut"
        in (reports[0])
    )
    assert not leftover.exists()


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([0, 7, 6], "document 2 starts at 6, before document 1 at 7"),
        ([0, 4, 6], "its content is not what dataset.json beside it says"),
        ([3, 4, 6], "the first document starts at 3, not at 0"),
        ([0, 4, 2**63], "document 2 starts at 9223372036854775808, but the split has 11 tokens"),
    ],
)
def test_a_damaged_index_is_found_before_a_plan_is_made_of_it(
    tmp_path: Path, starts: list[int], message: str
) -> None:
    prepared = write_documents(tmp_path, numbered_documents([5, 3, 3]))
    overwrite_index(prepared, starts)
    with pytest.raises(DataError, match=message):
        PackedDataset(prepared, "train", 4)
    assert not plan_of(prepared, "train", "packed", 4).folder.exists()


def test_a_damaged_plan_names_the_folder_to_delete(tmp_path: Path) -> None:
    prepared = write_documents(tmp_path, numbered_documents([5, 3, 3]))
    PackedDataset(prepared, "train", 4)
    folder = plan_of(prepared, "train", "packed", 4).folder
    (folder / "starts.npy").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"damaged \(starts.npy: .*delete this folder"):
        PackedDataset(prepared, "train", 4)
    (folder / "plan.json").write_text("{")
    with pytest.raises(DataError) as caught:
        PackedDataset(prepared, "train", 4)
    assert str(caught.value) == (
        f"{folder}: damaged (plan.json: not valid JSON: Input data was truncated); delete this "
        "folder, the plan is then made again"
    )


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    prepared = write_documents(tmp_path, numbered_documents([5, 3, 3]))
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(DataError, match=r"cannot write the plan of packed .*: No space left"):
        PackedDataset(prepared, "train", 4)
    folder = plan_of(prepared, "train", "packed", 4).folder.parent
    assert [p.name for p in folder.iterdir() if not p.name.endswith(".lock")] == []
