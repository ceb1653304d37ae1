"""Merging and splitting prepared data sets."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.corpus import files_config, write_texts
from toolkit.data.config import BPETokenizerConfig, DatasetConfig, FiltersConfig
from toolkit.data.prepare.build import split_files
from toolkit.data.prepare.build.prepare import ensure_prepared, prepare_dataset
from toolkit.data.prepare.tools import rewrite
from toolkit.data.prepare.tools.inspect import inspect_path
from toolkit.data.prepare.tools.rewrite import (
    _hashed,
    _mix,
    merge_datasets,
    split_parts,
    split_validation,
)
from toolkit.data.tokens.prepared import PreparedDataset
from toolkit.errors import ConfigError, DataError


def prepare(root: Path, name: str, texts: list[str], **changes: Any) -> PreparedDataset:
    config = files_config(
        root / "data", write_texts(root / name, texts), dataset_name=name, **changes
    )
    return prepare_dataset(config, progress=False)


def texts_of(count: int, letter: str = "a") -> list[str]:
    return [letter * (1 + number * 7 % 40) + str(number) for number in range(count)]


def documents(prepared: PreparedDataset, split: Any) -> list[list[int]]:
    if not prepared.has_split(split):
        return []
    starts = prepared.document_starts(split).astype(np.int64).tolist()
    ids = prepared.tokens(split)
    ends = [*starts[1:], len(ids)]
    return [ids[start:end].tolist() for start, end in zip(starts, ends, strict=True)]


def add_mask(prepared: PreparedDataset) -> PreparedDataset:
    """Make every third token no target, as in instruction data."""
    import xxhash

    data = json.loads((prepared.folder / "dataset.json").read_text())
    for split, info in data["splits"].items():
        mask = (np.arange(info["num_tokens"]) % 3 > 0).astype(np.uint8)
        mask.tofile(prepared.folder / f"{split}.mask")
        info["mask_hash"] = xxhash.xxh3_128_hexdigest(mask.tobytes())
        info["num_targets"] = int(mask.sum())
    (prepared.folder / "dataset.json").write_text(json.dumps(data))
    return rewrite._open_source(prepared.folder)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def assert_is_whole(prepared: PreparedDataset) -> None:
    assert inspect_path(prepared.folder, progress=False).problems == []


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_merged_documents_are_those_of_the_sources_in_order(
    block: int, tmp_path: Path, monkeypatch
) -> None:
    one = prepare(tmp_path, "one", texts_of(9), validation_fraction=0.3)
    two = prepare(tmp_path, "two", texts_of(5, "b"), validation_fraction=0.0)
    monkeypatch.setattr(split_files, "BLOCK_TOKENS", block)
    both = merge_datasets([one.folder, two.folder], tmp_path / "both" / "x", progress=False)
    assert documents(both, "train") == documents(one, "train") + documents(two, "train")
    assert documents(both, "val") == documents(one, "val")
    sizes = [p.manifest.splits["train"].text_bytes for p in (one, two, both)]
    assert sizes[2] == sizes[0] + sizes[1]
    assert_is_whole(both)


def test_a_merged_data_set_is_read_with_source_null(tmp_path: Path) -> None:
    one = prepare(tmp_path, "one", texts_of(4))
    two = prepare(tmp_path, "two", texts_of(3, "b"))
    merge_datasets([one.folder, two.folder], tmp_path / "out" / "both" / "x", progress=False)
    config = DatasetConfig(
        root=str(tmp_path / "out"), dataset_name="both", dataset_config="x", source=None
    )
    opened = ensure_prepared(config, progress=False)
    assert opened.num_documents("train") == 7
    assert opened.tokenizer_folder == tmp_path / "out" / "both" / "x" / "tokenizer"


def test_masks_are_merged_and_all_tokens_of_others_are_targets(tmp_path: Path) -> None:
    one = add_mask(prepare(tmp_path, "one", texts_of(4)))
    two = prepare(tmp_path, "two", texts_of(3, "b"))
    both = merge_datasets([one.folder, two.folder], tmp_path / "both", progress=False)
    first, second = one.num_tokens("train"), two.num_tokens("train")
    mask = both.target_mask("train")
    assert mask is not None
    assert mask.tolist() == [*(np.arange(first) % 3 > 0).astype(int).tolist(), *[1] * second]
    assert both.manifest.splits["train"].num_targets == int(mask.sum())
    assert_is_whole(both)


def test_the_type_of_ids_is_the_widest(tmp_path: Path) -> None:
    one = prepare(tmp_path, "one", texts_of(4))
    two = prepare(tmp_path, "two", texts_of(3, "b"))
    wide = two.tokens("train").astype(np.uint32)
    two.folder.joinpath("train.bin").write_bytes(wide.tobytes())
    data = json.loads((two.folder / "dataset.json").read_text())
    import xxhash

    data["dtype"] = "uint32"
    data["splits"]["train"]["content_hash"] = xxhash.xxh3_128_hexdigest(wide.tobytes())
    (two.folder / "dataset.json").write_text(json.dumps(data))
    both = merge_datasets([one.folder, two.folder], tmp_path / "both", progress=False)
    assert both.manifest.dtype == "uint32"
    assert both.tokens("train").tolist() == [*one.tokens("train").tolist(), *wide.tolist()]


def test_what_differs_is_named(tmp_path: Path) -> None:
    one = prepare(tmp_path, "one", texts_of(4))
    bare = prepare(tmp_path, "bare", texts_of(4), append_eos=False)
    with pytest.raises(DataError, match=r"differ in append_eos \(True and False\)"):
        merge_datasets([one.folder, bare.folder], tmp_path / "both")
    other = prepare(tmp_path, "other", texts_of(9), tokenizer=BPETokenizerConfig(vocab_size=260))
    with pytest.raises(DataError, match=r"differ in tokenizer \(.* and .*\), vocabulary size"):
        merge_datasets([one.folder, other.folder], tmp_path / "both")
    with pytest.raises(ConfigError, match="given twice"):
        merge_datasets([one.folder, tmp_path / "data" / ".." / "data" / "one" / "default"], "x")
    with pytest.raises(ConfigError, match="at least two"):
        merge_datasets([one.folder], tmp_path / "both")
    with pytest.raises(DataError, match="no prepared data set there"):
        merge_datasets([one.folder, tmp_path], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def damage_tokens(folder: Path) -> str:
    data = bytearray((folder / "train.bin").read_bytes())
    data[0] ^= 1
    (folder / "train.bin").write_bytes(data)
    return r"train\.bin: content differs"


def damage_index(folder: Path) -> str:
    starts = np.fromfile(folder / "train.idx", dtype=np.uint64)
    starts[1] += 1
    starts.tofile(folder / "train.idx")
    return r"train\.idx: does not agree"


def cut_tokens(folder: Path) -> str:
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-2])
    return r"train\.bin has .* bytes instead of"


@pytest.mark.parametrize("damage", [damage_tokens, damage_index, cut_tokens])
def test_damage_is_not_handed_on_and_nothing_is_left(damage, tmp_path: Path) -> None:
    one = prepare(tmp_path, "one", texts_of(4))
    two = prepare(tmp_path, "two", texts_of(4, "b"))
    message = damage(two.folder)
    out = tmp_path / "out"
    for make in (
        lambda: merge_datasets([one.folder, two.folder], out / "x", progress=False),
        lambda: split_validation(two.folder, out / "x", 0.5, progress=False),
        lambda: split_parts(two.folder, out / "x", 2, progress=False),
    ):
        with pytest.raises(DataError, match=message):
            make()
        assert names_in(out) <= {".x.lock"}


def test_existing_output_is_refused_and_kept(tmp_path: Path) -> None:
    one = prepare(tmp_path, "one", texts_of(4))
    two = prepare(tmp_path, "two", texts_of(4, "b"))
    (tmp_path / "out").mkdir()
    for make in (
        lambda: merge_datasets([one.folder, two.folder], tmp_path / "out"),
        lambda: split_validation(one.folder, tmp_path / "out", 0.5),
        lambda: split_parts(one.folder, tmp_path / "out", 2),
    ):
        with pytest.raises(DataError, match="out: exists already; remove it, or choose another"):
            make()
    assert list((tmp_path / "out").iterdir()) == []


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    one = prepare(tmp_path, "one", texts_of(4))
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(rewrite.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DataError, match=r"needs .* GB, 1e-06 GB are free there; make room"):
        split_parts(one.folder, tmp_path / "out" / "x", 2)
    assert names_in(tmp_path / "out") == {".x.lock"}


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    one = prepare(tmp_path, "one", texts_of(4))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "train.bin")

    monkeypatch.setattr(rewrite.SplitWriter, "append", full)
    with pytest.raises(DataError, match=r"train\.bin: cannot be read or written: No space left"):
        split_validation(one.folder, tmp_path / "out" / "x", 0.5, progress=False)
    assert names_in(tmp_path / "out") == {".x.lock"}


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_split_holds_out_by_number_and_keeps_every_document(
    block: int, tmp_path: Path, monkeypatch
) -> None:
    source = prepare(tmp_path, "one", texts_of(40), validation_fraction=0.2)
    monkeypatch.setattr(split_files, "BLOCK_TOKENS", block)
    every = documents(source, "train") + documents(source, "val")
    some = split_validation(source.folder, tmp_path / "some", 0.25, progress=False)
    more = split_validation(source.folder, tmp_path / "more", 0.5, progress=False)
    held_out = [every.index(document) for document in documents(some, "val")]
    assert held_out == sorted(held_out)
    # A fact of the hash: the same in every version.
    assert held_out == [2, 4, 6, 8, 18, 31, 32, 33, 37]
    kept = [every.index(document) for document in documents(some, "train")]
    assert sorted(kept + held_out) == list(range(40))
    assert set(held_out) <= {every.index(document) for document in documents(more, "val")}
    total = sum(info.text_bytes for info in source.manifest.splits.values())
    assert sum(info.text_bytes for info in some.manifest.splits.values()) == total
    assert_is_whole(some)


def test_the_hash_of_numbers_is_splitmix64_and_its_shares_are_close() -> None:
    assert _mix(np.arange(2, dtype=np.uint64)).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert abs(_hashed(0.1, 0)(slice(0, 1_000_000)).mean() - 0.1) < 0.001
    assert np.array_equal(_hashed(0.1, 5)(slice(0, 100)), _hashed(0.1, 0)(slice(5, 105)))


def test_split_without_held_out_documents_has_no_val(tmp_path: Path) -> None:
    source = prepare(tmp_path, "one", texts_of(9), validation_fraction=0.3)
    assert source.has_split("val")
    made = split_validation(source.folder, tmp_path / "out", 0.0, progress=False)
    assert not made.has_split("val")
    assert not (made.folder / "val.bin").exists()
    assert made.num_documents("train") == 9


def test_split_that_would_hold_out_all_is_refused(tmp_path: Path) -> None:
    source = prepare(tmp_path, "one", texts_of(1))
    with pytest.raises(DataError, match="all 1 document would be held out"):
        split_validation(source.folder, tmp_path / "out", 0.999, progress=False)
    with pytest.raises(ConfigError, match=r"must be in \[0, 1\): 1.5"):
        split_validation(source.folder, tmp_path / "out", 1.5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("block", [1, 50, 1 << 20])
def test_parts_have_whole_documents_in_order_and_about_equal_tokens(
    block: int, tmp_path: Path, monkeypatch
) -> None:
    source = add_mask(prepare(tmp_path, "one", texts_of(60), validation_fraction=0.2))
    monkeypatch.setattr(split_files, "BLOCK_TOKENS", block)
    parts = split_parts(source.folder, tmp_path / "out", 3, progress=False)
    assert [part.folder.name for part in parts] == ["part-0", "part-1", "part-2"]
    for split in ("train", "val"):
        joined = [document for part in parts for document in documents(part, split)]
        assert joined == documents(source, split)
    mask = np.concatenate([part.target_mask("train") for part in parts])  # type: ignore[list-item]
    assert np.array_equal(mask, source.target_mask("train"))
    third = source.num_tokens("train") / 3
    assert all(abs(part.num_tokens("train") - third) <= 44 for part in parts)
    for part in parts:
        assert_is_whole(part)
    again = merge_datasets([part.folder for part in parts], tmp_path / "again", progress=False)
    assert again.fingerprint("train") == source.fingerprint("train")
    assert again.fingerprint("val") == source.fingerprint("val")


def test_parts_that_are_merged_again_count_what_was_left_out_once(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text", [*texts_of(12), "", "x", "y"])
    (texts / "bad.txt").write_bytes(b"some \xff\xfe text")
    config = files_config(
        tmp_path / "data", texts, filters=FiltersConfig(min_characters=2),
        source={"encoding_errors": "replace"},
    )  # fmt: skip
    source = prepare_dataset(config, progress=False)
    parts = split_parts(source.folder, tmp_path / "out", 3, progress=False)
    again = merge_datasets([part.folder for part in parts], tmp_path / "again", progress=False)
    manifest, of_first = again.manifest, parts[0].manifest
    for found in (source.manifest, of_first, manifest):
        assert (found.replaced_bytes, found.skipped_documents) == (2, 1)
        assert found.filtered_documents == {"min_characters": 2}
    assert parts[1].manifest.filtered_documents == {}


def test_more_parts_than_documents_is_an_error(tmp_path: Path) -> None:
    source = prepare(tmp_path, "one", texts_of(3))
    with pytest.raises(DataError, match="its 3 training documents cannot be cut into 9 parts"):
        split_parts(source.folder, tmp_path / "out", 9, progress=False)
    with pytest.raises(ConfigError, match="--parts must be at least 2: 1"):
        split_parts(source.folder, tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_there_may_be_more_parts_than_a_process_may_open_files(tmp_path: Path) -> None:
    source = prepare(tmp_path, "one", ["ab"] * 60)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Besides what this process has open, pipes to warm workers among them, 30 files.
    taken = {int(name) for name in os.listdir("/dev/fd")}
    limit = [number for number in range(len(taken) + 31) if number not in taken][30]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
    try:
        parts = split_parts(source.folder, tmp_path / "out", 60, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [part.num_documents("train") for part in parts] == [1] * 60
    with pytest.raises(DataError, match="its 60 training documents cannot be cut into 99999 parts"):
        split_parts(source.folder, tmp_path / "out", 99_999, progress=False)


def test_a_killed_merge_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    one = prepare(tmp_path, "one", texts_of(4))
    two = prepare(tmp_path, "two", texts_of(4, "b"))
    out = tmp_path / "out" / "both"
    script = (
        "import os, sys\n"
        "from toolkit.data.prepare.tools import rewrite\n"
        "rewrite.write_dataset = lambda *_: os._exit(9)\n"
        "rewrite.merge_datasets(sys.argv[1:3], sys.argv[3])\n"
    )
    words = [sys.executable, "-c", script, str(one.folder), str(two.folder), str(out)]
    for _ in range(2):
        assert subprocess.run(words, check=False).returncode == 9
        assert not out.exists()
        assert names_in(out.parent) == {".both.building", ".both.lock"}
    assert merge_datasets([one.folder, two.folder], out, progress=False).num_documents("train") == 8
    assert names_in(out.parent) == {"both", ".both.lock"}


def test_one_process_at_a_time_makes_a_folder(tmp_path: Path) -> None:
    one = prepare(tmp_path, "one", texts_of(4))
    out = tmp_path / "out" / "x"
    with rewrite.new_folder(out, 0) as unfinished:
        (unfinished / "half").touch()
        with pytest.raises(DataError, match=r"x: another process is making it; wait until it is"):
            split_validation(one.folder, out, 0.5, progress=False)
        assert (unfinished / "half").exists()
    assert names_in(out) == {"half"}
