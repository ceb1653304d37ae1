import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.corpus import BYTE_EOS, files_config, write_texts
from toolkit.data.prepare.build import split_files
from toolkit.data.prepare.build.prepare import prepare_dataset
from toolkit.data.prepare.tools import inspect
from toolkit.data.prepare.tools.inspect import inspect_path
from toolkit.data.prepare.tools.report import Inspection
from toolkit.errors import ConfigError, DataError

TEXTS = ["ab", "abcdef", "é" * 10, "x", "0123456789" * 5]
LENGTHS = [3, 7, 21, 2, 51]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = write_texts(tmp_path / "texts", TEXTS)
    return prepare_dataset(files_config(tmp_path / "data", texts), progress=False).folder


def problems(folder: Path, **options: bool) -> list[str]:
    found = inspect_path(folder, progress=False, **options).problems
    return [problem.replace(f"{folder}/", "") for problem in found]


def edit(path: Path, dtype: str, change: Callable[[np.ndarray], None]) -> None:
    array = np.fromfile(path, dtype=dtype)
    change(array)
    array.tofile(path)


def edit_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    data = json.loads((folder / "dataset.json").read_text())
    change(data)
    (folder / "dataset.json").write_text(json.dumps(data))


def test_counts_lengths_and_samples_are_exact(folder: Path) -> None:
    found = inspect_path(folder, num_samples=2, progress=False)
    assert found.problems == []
    assert (found.dtype, found.vocab_size, found.eos_id, found.append_eos) == (
        "uint16", 257, BYTE_EOS, True,
    )  # fmt: skip
    [train] = found.splits
    assert (train.num_tokens, train.num_documents, train.num_bytes) == (84, 5, 168)
    assert (train.shortest, train.longest, train.largest_id) == (2, 51, 256)
    assert train.bytes_per_token == pytest.approx(79 / 84)
    # 2..3: two documents, 4..7: one, 16..31: one, 32..63: one.
    assert train.histogram == [0, 2, 1, 0, 1, 1]
    assert [sample.document for sample in train.samples] == [0, 2]
    assert [sample.num_tokens for sample in train.samples] == [3, 21]
    assert train.samples[0].text == "ab<|endoftext|>"


def test_blocks_give_what_the_whole_gives(folder: Path, monkeypatch) -> None:
    whole = inspect_path(folder, progress=False)
    for size in (1, 2, 3, 5, 84):
        monkeypatch.setattr(split_files, "BLOCK_TOKENS", size)
        assert inspect_path(folder, progress=False) == whole


def test_one_file_of_a_prepared_folder_is_checked_with_its_manifest(folder: Path) -> None:
    found = inspect_path(folder / "train.bin", progress=False)
    assert found.vocab_size == 257
    assert found.splits[0].num_documents == 5
    with pytest.raises(ConfigError, match=r"--dtype: .*dataset\.json tells that"):
        inspect_path(folder / "train.bin", dtype="uint16")


def test_a_cut_off_token_file_is_found(folder: Path) -> None:
    path = folder / "train.bin"
    path.write_bytes(path.read_bytes()[:-21])
    for quick in (False, True):
        found = problems(folder, quick=quick)
        assert found[0] == ("train.bin: has 147 bytes, no multiple of the 2 bytes of one number")
        assert found[1] == (
            "train.bin: holds 73 of the 84 tokens that dataset.json counts: cut off"
        )
        # No line of documents that do not end as they should: their tokens are gone.
        assert [line[: len("train.bin: content differs")] for line in found[2:]] == [
            "train.bin: content differs"
        ]


@pytest.mark.parametrize("quick", [False, True])
def test_an_empty_token_file_is_found(quick: bool, folder: Path) -> None:
    (folder / "train.bin").write_bytes(b"")
    found = problems(folder, quick=quick)
    assert found[0] == "train.bin: holds 0 of the 84 tokens that dataset.json counts: cut off"
    assert len(found) == 2
    assert found[1].startswith("train.bin: content differs from dataset.json")


def test_a_missing_file_is_found(folder: Path) -> None:
    (folder / "train.idx").unlink()
    assert problems(folder) == ["train.idx: is missing; restore it, or prepare the data again"]


def test_an_id_outside_the_vocabulary_is_found(folder: Path) -> None:
    def change(ids: np.ndarray) -> None:
        ids[[5, 50]] = 257, 9000

    edit(folder / "train.bin", "uint16", change)
    assert problems(folder) == [
        "train.bin: token 5 has id 257, outside the vocabulary of 257 (2 such tokens)",
        "train.bin: content differs from dataset.json (hash of the whole file)",
    ]


def test_changed_content_is_found_quickly_too(folder: Path) -> None:
    edit(folder / "train.bin", "uint16", lambda ids: ids.__setitem__(0, 98))
    assert problems(folder) == [
        "train.bin: content differs from dataset.json (hash of the whole file)"
    ]
    assert problems(folder, quick=True) == [
        "train.bin: content differs from dataset.json (sampled block 0)"
    ]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 1, "document 0 starts at 1, not at 0"),
        (2, 2, "document 2 starts at 2, before document 1 at 3"),
        (4, 85, "document 4 starts at 85, after the 84 tokens"),
    ],
)
@pytest.mark.parametrize("block", [1, 2, 100])
def test_an_index_that_disagrees_is_found(
    place: int, value: int, message: str, block: int, folder: Path, monkeypatch
) -> None:
    monkeypatch.setattr(split_files, "BLOCK_TOKENS", block)
    edit(folder / "train.idx", "uint64", lambda starts: starts.__setitem__(place, value))
    found = problems(folder)
    assert found[0] == f"train.idx: {message}; the index does not belong to these tokens"
    assert found[1] == "train.idx: content differs from dataset.json (hash of the whole file)"


def test_document_ends_that_are_no_eos_are_found(folder: Path) -> None:
    edit(folder / "train.idx", "uint64", lambda starts: starts.__setitem__(3, 30))
    assert problems(folder)[0] == (
        "train.idx: content differs from dataset.json (hash of the whole file)"
    )
    assert (
        "train.bin: 1 of 5 documents do not end with eos id 256 (first: document 2), though "
        "dataset.json says that all do"
    ) in problems(folder)


def test_document_starts_that_are_no_bos_are_found(folder: Path) -> None:
    edit_manifest(folder, lambda data: data.update(bos_id=97, prepend_bos=True))
    assert (
        "train.bin: 3 of 5 documents do not start with bos id 97 (first: document 2), though "
        "dataset.json says that all do"
    ) in problems(folder)


def test_a_wrong_type_is_found(folder: Path) -> None:
    edit_manifest(folder, lambda data: data.update(dtype="uint32"))
    assert problems(folder)[0] == (
        "train.bin: holds 42 of the 84 tokens that dataset.json counts: cut off"
    )


def test_a_mask_is_checked(folder: Path) -> None:
    mask = np.ones(84, dtype=np.uint8)
    mask[:3] = 0
    mask.tofile(folder / "train.mask")
    import xxhash

    digest = xxhash.xxh3_128_hexdigest(mask.tobytes())

    def change(data: dict) -> None:
        data["splits"]["train"].update(mask_hash=digest, num_targets=81)

    edit_manifest(folder, change)
    assert problems(folder) == []
    assert inspect_path(folder, progress=False).splits[0].num_targets == 81
    edit(folder / "train.mask", "uint8", lambda mask: mask.__setitem__(0, 2))
    assert problems(folder) == [
        "train.mask: 1 of its numbers are neither 0 nor 1",
        "train.mask: has 82 targets, dataset.json says 81",
        "train.mask: content differs from dataset.json (hash of the whole file)",
    ]


def test_another_tokenizer_is_found(folder: Path) -> None:
    edit_manifest(folder, lambda data: data.update(tokenizer_fingerprint="other"))
    assert "tokenizer: its fingerprint is " in problems(folder)[0]


def test_a_damaged_or_missing_manifest_is_an_error(folder: Path, tmp_path: Path) -> None:
    (folder / "dataset.json").write_text("{")
    with pytest.raises(DataError, match=r"dataset\.json: damaged"):
        inspect_path(folder)
    with pytest.raises(DataError, match=r"no dataset\.json there"):
        inspect_path(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        inspect_path(tmp_path / "absent.bin")


def bare(path: Path, **options: object) -> Inspection:
    return inspect_path(path, progress=False, **options)  # type: ignore[arg-type]


def test_a_bare_file_is_counted_by_its_eos(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "tokens.bin"
    np.array([1, 2, 9, 3, 9, 4, 5, 6, 7], dtype=np.uint16).tofile(path)
    for block in (1, 2, 3, 100):
        monkeypatch.setattr(split_files, "BLOCK_TOKENS", block)
        found = bare(path, eos_id=9, vocab_size=10, num_samples=2)
        [report] = found.splits
        assert found.problems == []
        assert (report.num_tokens, report.num_documents, report.largest_id) == (9, 3, 9)
        assert (report.shortest, report.longest, report.histogram) == (2, 4, [0, 2, 1])
        assert [sample.ids for sample in report.samples] == [[1, 2, 9], [3, 9]]


@pytest.mark.parametrize("block", [1, 7, 500, 1 << 20])
@pytest.mark.parametrize("last", [9, 5])
def test_samples_of_a_bare_file_are_spread_and_have_their_length(
    block: int, last: int, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(split_files, "BLOCK_TOKENS", block)
    lengths = [500, 1, 3, 130, 2, 1, 40, 7, 300]
    ids = np.full(sum(lengths), 5, dtype=np.uint16)
    ids[np.cumsum(lengths) - 1] = 9
    ids[-1] = last
    path = tmp_path / "tokens.bin"
    ids.tofile(path)
    for count in (0, 1, 2, 4, 9, 20):
        samples = bare(path, eos_id=9, num_samples=count).splits[0].samples
        numbers = [sample.document for sample in samples]
        assert numbers == sorted({turn * 9 // count for turn in range(count)})
        assert [sample.num_tokens for sample in samples] == [lengths[n] for n in numbers]
        assert [len(sample.ids) for sample in samples] == [min(120, lengths[n]) for n in numbers]
    [sample] = bare(path, eos_id=9, quick=True).splits[0].samples
    assert (sample.document, sample.num_tokens, len(sample.ids)) == (0, 500, 120)
    [sample] = bare(path).splits[0].samples
    assert (sample.document, sample.num_tokens, len(sample.ids)) == (0, 984, 120)


def test_a_quick_look_does_not_search_for_the_end_of_a_document(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(inspect, "BLOCK_TOKENS", 300)
    path = tmp_path / "tokens.bin"
    np.full(301, 5, dtype=np.uint16).tofile(path)
    [sample] = bare(path, eos_id=9, quick=True).splits[0].samples
    assert (sample.num_tokens, len(sample.ids)) == (None, 120)


def test_a_bare_file_with_ids_outside_or_cut_off_is_told(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    np.array([1, 70_000, 3], dtype=np.uint32).tofile(path)
    path.write_bytes(path.read_bytes() + b"\x01")
    assert bare(path, dtype="uint32", vocab_size=70_000).problems == [
        f"{path}: has 13 bytes of numbers, no multiple of the 4 bytes of a uint32: cut off, or "
        "--dtype is wrong",
        f"{path}: token 1 has id 70,000, outside the vocabulary of 70,000 (1 such tokens)",
    ]
    path.write_bytes(b"")
    assert bare(path).problems == [f"{path}: holds no tokens"]
    with pytest.raises(ConfigError, match="--dtype: 'int8' is none of uint8, uint16"):
        bare(path, dtype="int8")


def test_a_numpy_header_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    np.save(path, np.array([1, 70_000, 3], dtype=np.uint32))
    found = bare(path)
    assert (found.dtype, found.splits[0].num_tokens, found.splits[0].largest_id) == (
        "uint32", 3, 70_000,
    )  # fmt: skip
    assert bare(path, dtype="uint16").problems == [
        f"{path}: its numpy header says uint32, not uint16"
    ]
    np.save(path, np.arange(6, dtype=np.uint16).reshape(2, 3))
    assert bare(path).splits[0].num_tokens == 6
    np.save(path, np.zeros((2, 2), dtype=np.float32))
    with pytest.raises(DataError, match=r"its numpy header says float32; token files hold uint8,"):
        bare(path)


@pytest.mark.parametrize("quick", [False, True])
def test_a_numpy_file_that_is_cut_off_or_big_endian_is_told(quick: bool, tmp_path: Path) -> None:
    path = tmp_path / "tokens.npy"
    np.save(path, np.arange(1000, dtype=np.uint16))
    whole = path.read_bytes()
    for cut, left in ((1000, 500), (1001, 499)):
        path.write_bytes(whole[:-cut])
        assert bare(path, quick=quick).problems == [
            f"{path}: its numpy header tells of 1000 numbers, it holds {left}; the file is cut "
            "short or damaged"
        ]
    np.save(path, np.arange(1000, dtype=">u2"))
    with pytest.raises(DataError, match=r"header says >u2: the numbers are big-endian; convert"):
        bare(path, quick=quick)
