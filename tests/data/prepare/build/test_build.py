"""What `build_dataset` does beyond one document after the other: marks, filters, sources."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.data.corpus import BYTE_EOS, files_config, random_text, write_texts
from toolkit.data.config import (
    ByteTokenizerConfig,
    DatasetConfig,
    FiltersConfig,
    HFTokenizerConfig,
    InstructionsConfig,
    TokenFilesSourceConfig,
)
from toolkit.data.prepare.build import parts
from toolkit.data.prepare.build.prepare import ensure_prepared
from toolkit.data.prepare.build.settings import settings_of
from toolkit.data.prepare.build.vocabulary import sample_texts
from toolkit.data.prepare.text.sources import plan_source
from toolkit.data.prepare.tokenizers.tokenizer import ByteTokenizer
from toolkit.data.prepare.tools.inspect import inspect_path
from toolkit.data.tokens.prepared import MANIFEST_NAME, PreparedDataset, read_prepared
from toolkit.errors import DataError


def text_of(prepared: PreparedDataset, split: str = "train") -> list[str]:
    data = prepared.tokens(split)
    text = bytes(t if t < 256 else 0 for t in data.tolist()).decode()
    return text.split("\0")[:-1]


def token_config(root: Path, *paths: Path, **changes) -> DatasetConfig:
    options = {"vocab_size": 51, "eos_id": 50, **changes.pop("source", {})}
    source = TokenFilesSourceConfig(paths=[str(path) for path in paths], **options)
    changes = {"num_processes": 1, "validation_fraction": 0.0, "tokenizer": None, **changes}
    return DatasetConfig(root=str(root), source=source, **changes)


def test_settings_that_came_later_are_stored_only_when_used(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text", ["ab", "cd"])
    config = files_config(tmp_path / "data", texts)
    assert settings_of(config).keys() == {
        "tokenizer", "append_eos", "validation_fraction", "source",
    }  # fmt: skip
    prepared = ensure_prepared(config)
    # As stored before endings were left out, and with fewer of them.
    path = prepared.folder / MANIFEST_NAME
    stored = json.loads(path.read_text())
    stored["settings"]["source"]["suffixes"] = [".txt", ".jsonl", ".jsonl.gz", ".parquet"]
    del stored["settings"]["source"]["text_template"]
    path.write_text(json.dumps(stored))
    assert ensure_prepared(config).num_tokens("train") == 6
    for change in (
        {"deduplicate": True},
        {"filters": FiltersConfig(min_characters=1)},
        {"prepend_bos": True},
    ):
        with pytest.raises(DataError, match=f"dataset\\.{next(iter(change))}"):
            ensure_prepared(config.replace(**change))


@pytest.mark.parametrize(("num_processes", "batches"), [(1, [5, 3]), (4, [8])])
def test_pieces_of_one_file_are_enough_for_all_threads(
    num_processes: int, batches: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []

    class Watched(parts.TextEncoder):
        def encode(self, pieces):
            found.append(len(pieces))
            return super().encode(pieces)

    monkeypatch.setattr(parts, "TextEncoder", Watched)
    texts = write_texts(tmp_path / "text", ["some words\n" * 170_000])
    prepared = ensure_prepared(files_config(tmp_path, texts, num_processes=num_processes))
    assert found == batches
    assert text_of(prepared) == ["some words\n" * 170_000]


def test_documents_start_with_bos_on_request(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path / "tok")
    (tmp_path / "tok/tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    texts = write_texts(tmp_path / "text", ["ab", "c"])
    path = str(tmp_path / "tok")
    config = files_config(
        tmp_path / "data", texts, prepend_bos=True,
        tokenizer=HFTokenizerConfig(path=path, bos_token="<|endoftext|>"),
    )  # fmt: skip
    prepared = ensure_prepared(config)
    assert prepared.tokens("train").tolist() == [256, 97, 98, 256, 256, 99, 256]
    assert prepared.document_starts("train").tolist() == [0, 4]
    assert prepared.manifest.bos_id == 256
    with pytest.raises(DataError, match=r"no start-of-document token; set dataset\.tokenizer\.bos"):
        ensure_prepared(config.replace(dataset_name="b", tokenizer=HFTokenizerConfig(path=path)))


def chat_lines(path: Path, number: int) -> Path:
    rows = ({"prompt": f"q{i} ", "completion": f"answer {i}"} for i in range(number))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_masks_follow_their_tokens(tmp_path: Path) -> None:
    path = chat_lines(tmp_path / "a.jsonl", 50)
    config = files_config(
        tmp_path / "data", path, instructions=InstructionsConfig(), validation_fraction=0.2
    )
    prepared = ensure_prepared(config)
    for split in ("train", "val"):
        info, mask = prepared.manifest.splits[split], prepared.target_mask(split)
        assert mask is not None
        assert info.num_targets == int(mask.sum())
        assert info.mask_hash
        assert info.index_hash
        tokens = prepared.tokens(split)
        asked = bytes(t for t in tokens[mask == 1].tolist() if t != BYTE_EOS).decode()
        left = bytes(tokens[mask == 0].tolist()).decode()
        assert asked.count("answer") == info.num_documents
        assert left.split() == [w for w in left.split() if w[0] == "q"]


def test_documents_without_a_mask_are_targets_among_others_that_have_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Marking(parts.InstructionEncoder):
        def encode(self, pieces):
            return [
                encoded._replace(eos_is_target=False)
                if piece.row["prompt"]
                else encoded._replace(is_target=None)
                for piece, encoded in zip(pieces, super().encode(pieces), strict=True)
            ]

    monkeypatch.setattr(parts, "InstructionEncoder", Marking)
    monkeypatch.setattr(parts, "BATCH_DOCUMENTS", 1)
    rows = [("", "ab"), ("m", "no"), ("", "c")]
    lines = [json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    config = files_config(tmp_path / "data", tmp_path / "a.jsonl")
    prepared = ensure_prepared(config.replace(instructions=InstructionsConfig()))
    mask = prepared.target_mask("train")
    assert mask is not None
    assert mask.tolist() == [1, 1, 1, 0, 1, 1, 0, 1, 1]
    assert prepared.manifest.splits["train"].num_targets == 7


def test_left_out_documents_are_counted_by_reason(tmp_path: Path) -> None:
    texts = write_texts(
        tmp_path / "text", ["a", "fine text", "same same same " * 30, "fine text", ""]
    )
    prepared = ensure_prepared(
        files_config(
            tmp_path / "data", texts, deduplicate=True,
            filters=FiltersConfig(min_characters=2, max_repetition=0.6),
        )
    )  # fmt: skip
    assert text_of(prepared) == ["fine text"]
    assert prepared.manifest.filtered_documents == {
        "duplicate": 1, "max_repetition": 1, "min_characters": 1,
    }  # fmt: skip
    assert prepared.manifest.skipped_documents == 1
    with pytest.raises(DataError, match=r"no training text \(left out: 4 by min_characters, 1 em"):
        ensure_prepared(
            files_config(tmp_path / "none", texts, filters=FiltersConfig(min_characters=999))
        )
    assert not (tmp_path / "none/corpus/default").exists()


@pytest.mark.parametrize("letter", ["x", "é", "語"])
def test_a_sample_has_the_bytes_asked_for_from_all_shards(letter: str, tmp_path: Path) -> None:
    long = [f"{number} " + letter * 1_200_000 for number in range(3)]
    config = files_config(tmp_path, write_texts(tmp_path / "text", long))
    assert config.source is not None
    plan = plan_source(config.source, 0.0)
    for size in (1, 1000, 500_000):
        texts = list(sample_texts(config, plan, size))
        taken = sum(len(text.encode()) for text in texts)
        assert size - 3 * len(plan.shards) < taken <= size
        if size >= 1000:
            assert len(texts) == len(plan.shards)
    whole = sum(len(text.encode()) for text in long)
    assert sum(len(text.encode()) for text in sample_texts(config, plan, 2 * whole)) == whole


def test_repair_of_one_file_keeps_the_parts_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = write_texts(tmp_path / "text", [random_text(12_000, seed=i) for i in range(4)])
    bad = texts / "9.txt"
    bad.write_bytes(b"fine\n" * 300_000 + b"\xff")
    config = files_config(tmp_path / "data", texts)
    with pytest.raises(DataError, match=r"9\.txt: not UTF-8 at byte 1500000"):
        ensure_prepared(config)
    bad.write_bytes(b"fine\n" * 300_000)
    done: list[str] = []
    original = parts.read_shard

    def watched(shard, reading, counts):
        done.extend(part.name for part in shard)
        return original(shard, reading, counts)

    monkeypatch.setattr(parts, "read_shard", watched)
    prepared = ensure_prepared(config)
    assert set(done) == {"9.txt"}
    assert prepared.num_documents("train") == 5


@pytest.mark.parametrize("work_dir", [None, "work"])
def test_what_a_kill_at_the_end_leaves_is_removed_by_the_next_building(
    work_dir: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    work = str(tmp_path / work_dir) if work_dir is not None else None
    config = files_config(tmp_path / "data", write_texts(tmp_path / "text", ["ab", "cd"]))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", kill)
        with pytest.raises(KeyboardInterrupt):
            ensure_prepared(config, work_dir=work)
    prepared = read_prepared(config)
    assert prepared is not None
    shutil.rmtree(prepared.folder)
    assert text_of(ensure_prepared(config, work_dir=work)) == ["ab", "cd"]
    names = {path.name for path in prepared.folder.parent.iterdir()}
    assert names <= {"default", ".default.lock", ".default.used"}
    assert work is None or list(Path(work).iterdir()) == []


def test_file_that_changes_while_it_is_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = write_texts(tmp_path / "text", ["first", "second", "third"])
    config = files_config(tmp_path / "data", texts)

    class Writing(parts.TextEncoder):
        def encode(self, pieces):
            (texts / "0000.txt").write_text("longer than before")
            return super().encode(pieces)

    with monkeypatch.context() as patch:
        patch.setattr(parts, "TextEncoder", Writing)
        with pytest.raises(
            DataError, match=r"0000\.txt: changed while it was being read \(5 bytes before, 18 now"
        ):
            ensure_prepared(config)
    assert read_prepared(config) is None
    assert text_of(ensure_prepared(config)) == ["longer than before", "second", "third"]


def test_token_files_become_a_data_set_without_a_tokenizer(tmp_path: Path) -> None:
    values = np.array([1, 2, 50, 3, 50, 50, 4, 5], dtype=np.uint32)
    values.tofile(tmp_path / "a.npy")
    config = token_config(tmp_path / "data", tmp_path / "a.npy", source={"dtype": "uint32"})
    prepared = ensure_prepared(config)
    assert prepared.tokens("train").tolist() == [1, 2, 50, 3, 50, 4, 5, 50]
    assert prepared.tokens("train").dtype == np.uint16
    assert prepared.document_starts("train").tolist() == [0, 3, 5]
    assert prepared.tokenizer_folder is None
    assert prepared.bytes_per_token("train") == 0.0
    assert (prepared.manifest.vocab_size, prepared.manifest.eos_id) == (51, 50)
    assert ensure_prepared(config).folder == prepared.folder
    as_they_are = ensure_prepared(config.replace(dataset_name="x", append_eos=False))
    assert as_they_are.tokens("train").tolist() == [1, 2, 50, 3, 50, 4, 5]


def test_token_files_take_the_tokenizer_they_were_made_with(tmp_path: Path) -> None:
    np.array([104, 105, 256, 104, 300], dtype=np.uint16).tofile(tmp_path / "a.bin")
    config = files_config(tmp_path / "data").replace(
        source=TokenFilesSourceConfig(paths=[str(tmp_path / "a.bin")])
    )
    with pytest.raises(DataError, match=r"a\.bin: token 4 has id 300, .* has 257 ids"):
        ensure_prepared(config)
    assert not (tmp_path / "data/corpus/default").exists()
    np.array([104, 105, 256], dtype=np.uint16).tofile(tmp_path / "a.bin")
    prepared = ensure_prepared(config)
    assert text_of(prepared) == ["hi"]
    assert prepared.tokenizer_folder is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": {"vocab_size": None}}, r"dataset\.source\.vocab_size: must be given"),
        ({"source": {"eos_id": None}}, r"dataset\.source\.eos_id: must be given"),
        ({"source": {"eos_id": 51}}, r"eos_id: 51 is outside the vocabulary of 51"),
        ({"source": {"eos_id": -1}}, r"eos_id: -1 is outside the vocabulary of 51"),
        ({"source": {"vocab_size": 1 << 40}}, r"vocab_size: must be at most 4294967296"),
        ({"filters": FiltersConfig(min_characters=2)}, r"dataset\.filters: needs text"),
        ({"prepend_bos": True}, "no start-of-document token"),
    ],
)
def test_settings_that_token_files_cannot_have(tmp_path: Path, changes, message: str) -> None:
    np.array([1, 50], dtype=np.uint16).tofile(tmp_path / "a.bin")
    with pytest.raises(DataError, match=message):
        ensure_prepared(token_config(tmp_path / "data", tmp_path / "a.bin", **changes))


def test_token_files_may_not_contradict_their_tokenizer(tmp_path: Path) -> None:
    np.array([104, 105, 256], dtype=np.uint16).tofile(tmp_path / "a.bin")
    byte = ByteTokenizerConfig()

    def config(**source: int | None) -> DatasetConfig:
        return token_config(tmp_path / "data", tmp_path / "a.bin", tokenizer=byte, source=source)

    for source, message in (
        (
            {"vocab_size": 1000, "eos_id": None},
            r"source\.vocab_size: is 1000, but .* has 257",
        ),
        (
            {"vocab_size": None, "eos_id": 50},
            r"source\.eos_id: is 50, but .* has 256; leave it out",
        ),
        ({"vocab_size": None, "eos_id": 0}, r"source\.eos_id: is 0, but .* has 256; leave it out"),
    ):
        with pytest.raises(DataError, match=message):
            ensure_prepared(config(**source))
    prepared = ensure_prepared(config(vocab_size=257, eos_id=256))
    assert inspect_path(prepared.folder, progress=False).problems == []


def test_token_files_name_the_end_of_documents_where_their_tokenizer_does_not(
    tmp_path: Path,
) -> None:
    np.array([104, 10, 105, 10], dtype=np.uint16).tofile(tmp_path / "a.bin")
    ByteTokenizer().save(tmp_path / "tok")
    (tmp_path / "tok/tokenizer_config.json").write_text("{}")
    config = token_config(
        tmp_path / "data", tmp_path / "a.bin",
        tokenizer=HFTokenizerConfig(path=str(tmp_path / "tok")),
        source={"vocab_size": None, "eos_id": 10},
    )  # fmt: skip
    prepared = ensure_prepared(config)
    assert prepared.document_starts("train").tolist() == [0, 2]
    assert inspect_path(prepared.folder, progress=False).problems == []
