import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.data.corpus import BYTE_EOS, files_config, random_text, write_texts
from toolkit import read_prepared
from toolkit.data.config import BPETokenizerConfig, DatasetConfig, HFTokenizerConfig
from toolkit.data.prepare.build.parts import is_validation
from toolkit.data.prepare.build.prepare import ensure_prepared, prepare_dataset
from toolkit.data.prepare.store.cache import build_lock
from toolkit.data.prepare.tokenizers.tokenizer import ByteTokenizer, load_tokenizer
from toolkit.data.tokens.prepared import PreparedDataset, check_vocabulary, token_dtype
from toolkit.errors import ConfigError, DataError
from toolkit.storage.locks import locked


def test_files_hold_the_documents_one_after_the_other(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text", ["ab", "", "c"])
    prepared = ensure_prepared(files_config(tmp_path / "data", texts))
    assert prepared.tokens("train").tolist() == [97, 98, BYTE_EOS, 99, BYTE_EOS]
    assert prepared.document_starts("train").tolist() == [0, 3]
    assert prepared.tokens("train").dtype == np.uint16
    assert prepared.bytes_per_token("train") == 3 / 5
    assert not prepared.has_split("val")
    assert sorted(p.name for p in prepared.folder.iterdir()) == [
        "dataset.json", "tokenizer", "train.bin", "train.idx",
    ]  # fmt: skip


def test_eos_is_left_out_on_request(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text", ["ab", "c"])
    prepared = ensure_prepared(files_config(tmp_path / "data", texts, append_eos=False))
    assert prepared.tokens("train").tolist() == [97, 98, 99]
    assert prepared.document_starts("train").tolist() == [0, 2]


def test_split_is_by_hash_of_each_document(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text", [f"document {i}" for i in range(200)])
    prepared = ensure_prepared(files_config(tmp_path / "data", texts, validation_fraction=0.2))
    held_out = [i for i in range(200) if is_validation(f"{i:04d}.txt", 0.2)]
    assert 20 < len(held_out) < 60
    text = bytes(t if t < 256 else 0 for t in prepared.tokens("val").tolist()).decode()
    assert text.split("\0")[:-1] == [f"document {i}" for i in held_out]
    assert prepared.num_documents("train") == 200 - len(held_out)


def test_number_of_processes_changes_nothing(tmp_path: Path) -> None:
    texts = tmp_path / "text"
    write_texts(texts, [random_text(20, seed=i) for i in range(30)])
    (texts / "big.jsonl").write_text(
        "".join(json.dumps({"text": random_text(30, seed=i)}) + "\n" for i in range(2000))
    )
    (texts / "long.txt").write_text(random_text(40_000))
    bpe = BPETokenizerConfig(vocab_size=400, sample_bytes=200_000)
    one, two = (
        ensure_prepared(
            files_config(
                tmp_path / f"data{n}", texts, tokenizer=bpe, num_processes=n,
                validation_fraction=0.1,
            )
        )
        for n in (1, 2)
    )  # fmt: skip
    for split in ("train", "val"):
        assert one.fingerprint(split) == two.fingerprint(split)
        assert np.array_equal(one.document_starts(split), two.document_starts(split))
    tokenizer = load_tokenizer(one.tokenizer_folder)
    starts = one.document_starts("val")
    text = tokenizer.decode(one.tokens("val")[: int(starts[1]) - 1])
    assert text in {random_text(20, seed=i) for i in range(30)} | {
        random_text(30, seed=i) for i in range(600)
    }


def test_ids_above_two_bytes_never_wrap(tmp_path: Path) -> None:
    assert token_dtype(65_536) == "uint16"
    assert token_dtype(65_537) == "uint32"
    ByteTokenizer().save(tmp_path / "tok")
    data = json.loads((tmp_path / "tok/tokenizer.json").read_text())
    data["model"]["vocab"]["zz"] = 70_000
    data["model"]["merges"] = [["z", "z"]]
    (tmp_path / "tok/tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "tok/tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    texts = write_texts(tmp_path / "text", ["azz"])
    config = files_config(
        tmp_path / "data", texts, tokenizer=HFTokenizerConfig(path=str(tmp_path / "tok"))
    )
    prepared = ensure_prepared(config)
    assert prepared.tokens("train").dtype == np.uint32
    assert prepared.tokens("train").tolist() == [97, 70_000, prepared.manifest.eos_id]


def test_tokenizer_without_eos_needs_one(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path / "tok")
    (tmp_path / "tok/tokenizer_config.json").unlink()
    texts = write_texts(tmp_path / "text", ["azz"])
    tokenizer = HFTokenizerConfig(path=str(tmp_path / "tok"))
    with pytest.raises(DataError, match=r"set dataset\.tokenizer\.eos_token"):
        ensure_prepared(files_config(tmp_path / "data", texts, tokenizer=tokenizer))
    assert read_prepared(files_config(tmp_path / "data", texts)) is None


def test_existing_files_are_used_and_other_settings_refused(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text", ["ab", "cd"])
    config = files_config(tmp_path / "data", texts)
    first = ensure_prepared(config)
    changed_at = first.folder.stat().st_mtime_ns
    assert ensure_prepared(config).folder.stat().st_mtime_ns == changed_at
    with pytest.raises(DataError, match=r"dataset\.append_eos: True there, False now"):
        ensure_prepared(config.replace(append_eos=False))
    with pytest.raises(DataError, match=r"dataset\.tokenizer\.type: byte there, bpe now"):
        ensure_prepared(config.replace(tokenizer=BPETokenizerConfig()))
    (texts / "0001.txt").write_text("ce")
    with pytest.raises(DataError, match=r"the text of dataset\.source has changed"):
        ensure_prepared(config)
    assert ensure_prepared(config, check_text=False).num_tokens("train") == 6
    assert ensure_prepared(config.replace(source=None, append_eos=False)).num_tokens("train") == 6


@pytest.mark.parametrize("gone", ["file", "folder"])
def test_a_missing_source_does_not_train_on_older_data_of_its_name(
    tmp_path: Path, gone: str
) -> None:
    texts = write_texts(tmp_path / "text", ["ab"])
    config = files_config(tmp_path / "data", texts)
    folder = ensure_prepared(config).folder
    (texts / "0000.txt").unlink()
    if gone == "folder":
        texts.rmdir()
    what = "no file with text" if gone == "file" else "no such file or folder"
    with pytest.raises(DataError, match=f"{what}.*{folder} holds .*dataset.source=null"):
        ensure_prepared(config)
    assert ensure_prepared(config.replace(source=None)).num_tokens("train") == 3
    assert ensure_prepared(config, check_text=False).num_tokens("train") == 3


def test_no_source_and_no_files_is_an_error(tmp_path: Path) -> None:
    config = DatasetConfig(root=str(tmp_path / "data"))
    assert read_prepared(config) is None
    with pytest.raises(DataError, match=r"dataset\.source is null"):
        ensure_prepared(config)
    assert not (tmp_path / "data").exists()


def test_bad_text_leaves_no_data_set_and_repair_continues(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text", ["ab", "cd"])
    (texts / "bad.txt").write_bytes(b"\xff")
    config = files_config(tmp_path / "data", texts)
    with pytest.raises(DataError, match=r"bad\.txt: not UTF-8 at byte 0"):
        ensure_prepared(config)
    assert read_prepared(config) is None
    replacing = files_config(tmp_path / "data", texts, source={"encoding_errors": "replace"})
    assert ensure_prepared(replacing).manifest.replaced_bytes == 1
    names = {p.name for p in (tmp_path / "data" / "corpus").iterdir()}
    assert "default" in names
    assert ".default.building" not in names


def test_bad_text_in_a_worker_process_is_the_same_line(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text", [random_text(12_000, seed=i) for i in range(6)])
    (texts / "bad.txt").write_bytes(b"fine\n\xff")
    with pytest.raises(DataError, match=r"^\S*bad\.txt: not UTF-8 at byte 5"):
        ensure_prepared(files_config(tmp_path / "data", texts, num_processes=2))


def test_text_without_content_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    with pytest.raises(DataError, match="gave no training text"):
        ensure_prepared(files_config(tmp_path / "data", tmp_path / "a.jsonl"))


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text", ["ab"])
    mine = tmp_path / "data/corpus/default/train.bin"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(DataError, match="exists, but is no prepared data set"):
        ensure_prepared(files_config(tmp_path / "data", texts))
    assert mine.read_bytes() == b"mine"


def test_unusable_root_is_one_line(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text", ["ab"])
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/corpus\S*: .*Not a directory"):
        ensure_prepared(files_config(tmp_path / "file", texts))


def test_damaged_files_are_recognised(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text", [random_text(300)])
    config = files_config(tmp_path / "data", texts)
    prepared = ensure_prepared(config)
    path = prepared.folder / "train.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=rf"has {len(whole) - 2} bytes instead of {len(whole)}"):
        ensure_prepared(config)
    path.write_bytes(b"\x07" + whole[1:])
    with pytest.raises(DataError, match="content differs"):
        ensure_prepared(config).tokens("train")
    path.unlink()
    with pytest.raises(DataError, match="is missing"):
        read_prepared(config)
    (prepared.folder / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        read_prepared(config)


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    fingerprints = []
    for number, text in enumerate(["abcd", "abcd", "abce"]):
        texts = write_texts(tmp_path / f"text{number}", [text])
        prepared = ensure_prepared(files_config(tmp_path / f"data{number}", texts))
        fingerprints.append(prepared.fingerprint("train"))
    assert fingerprints[0] == fingerprints[1]
    assert fingerprints[0] != fingerprints[2]


def test_small_model_vocabulary_is_refused(tmp_path: Path) -> None:
    prepared = ensure_prepared(
        files_config(tmp_path / "data", write_texts(tmp_path / "text", ["ab"]))
    )
    check_vocabulary(prepared, 257)
    with pytest.raises(ConfigError, match=r"model\.vocab_size is 256.*at least 257"):
        check_vocabulary(prepared, 256)


PREPARE = """
import sys, msgspec
from toolkit.data.config import DatasetConfig
from toolkit.data.prepare.store.cache import build_lock
from toolkit.data.prepare.build.prepare import ensure_prepared
config = msgspec.json.decode(sys.argv[1], type=DatasetConfig)
prepared = ensure_prepared(config, work_dir=sys.argv[2] or None)
assert "torch" not in sys.modules
print(prepared.fingerprint("train"))
"""


def start(config: DatasetConfig, work_dir: Path | str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREPARE, config.to_json().decode(), str(work_dir)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path.cwd()
    )


def wait_for_parts(folder: Path, number: int) -> list[Path]:
    for _ in range(2000):
        parts = sorted(folder.glob("**/part.json"))
        parts = [part.parent for part in parts if part.parent.name.isdigit()]
        if len(parts) >= number:
            return parts
        time.sleep(0.01)
    raise AssertionError("no parts appeared")


def test_killed_preparation_continues_with_its_parts(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text", [random_text(12_000, seed=i) for i in range(8)])
    tokenizer = BPETokenizerConfig(vocab_size=500, sample_bytes=300_000)
    config = files_config(tmp_path / "data", texts, tokenizer=tokenizer, num_processes=2)
    work = tmp_path / "work"
    process = start(config, work)
    kept = wait_for_parts(work, 3)
    process.kill()
    process.communicate()
    assert read_prepared(config) is None
    (kept[-1] / "train.bin").write_bytes(b"torn")  # a power cut may do this
    process = start(config, work)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "parts were finished before" in err
    assert not list(work.iterdir()), "parts are gone after success, with their folder"
    fresh = prepare_dataset(config.replace(root=str(tmp_path / "fresh")), progress=False)
    assert out.strip() == fresh.fingerprint("train")


@pytest.mark.parametrize("work_dir", [None, "work"])
@pytest.mark.parametrize("opening", [ensure_prepared, prepare_dataset])
def test_parts_left_beside_a_whole_data_set_go_when_it_is_opened(
    tmp_path: Path,
    opening: Callable[..., PreparedDataset],
    work_dir: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = files_config(tmp_path / "data", write_texts(tmp_path / "text", ["ab"]))
    work = str(tmp_path / work_dir) if work_dir is not None else None

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", kill)
        with pytest.raises(KeyboardInterrupt):
            prepare_dataset(config, work_dir=work, progress=False)
    folder = tmp_path / "data" / "corpus"
    left = Path(work) if work is not None else folder / ".default.building"
    assert any(left.iterdir())
    with locked(build_lock(folder / "default")):
        ensure_prepared(config, work_dir=work, progress=False)
        assert any(left.iterdir())
    opening(config, work_dir=work, progress=False)
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["default"]
    assert work is None or not any(Path(work).iterdir())


def test_workers_end_silently_with_the_process_that_was_killed(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text", [random_text(12_000, seed=i) for i in range(40)])
    config = files_config(tmp_path / "data", texts, num_processes=2)
    process = start(config, tmp_path / "work")
    wait_for_parts(tmp_path / "work", 1)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    process.kill()
    _, err = process.communicate(timeout=60)  # ends when no process holds its output any more
    assert psutil.wait_procs(children, timeout=60)[1] == []
    assert "Traceback" not in err


def test_a_killed_worker_is_one_line_and_its_parts_are_kept(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text", [random_text(12_000, seed=i) for i in range(40)])
    config = files_config(tmp_path / "data", texts, num_processes=2)
    process = start(config, tmp_path / "work")
    wait_for_parts(tmp_path / "work", 1)
    for child in psutil.Process(process.pid).children():
        if "spawn_main" in " ".join(child.cmdline()):
            child.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "DataError: preparing data: a worker process ended with code -9 (-9: killed" in err
    assert wait_for_parts(tmp_path / "work", 1)


def test_a_script_needs_no_main_guard_and_is_not_run_by_workers(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text", [random_text(12_000, seed=i) for i in range(6)])
    config = files_config(tmp_path / "data", texts, num_processes=2)
    script = tmp_path / "script.py"
    script.write_text(f"print('run')\n{PREPARE}")
    command = [sys.executable, str(script), config.to_json().decode(), ""]
    ended = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())}
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split()[0] == "run"
    assert len(ended.stdout.split()) == 2


def test_files_of_killed_workers_do_not_pile_up(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text", ["good"])
    (texts / "bad.txt").write_bytes(b"\xff")
    config = files_config(tmp_path / "data", texts)
    work = tmp_path / "work"
    with pytest.raises(DataError, match="not UTF-8"):
        prepare_dataset(config, work_dir=str(work), progress=False)
    [parts] = work.glob("*/*")
    before = sorted(path.name for path in parts.iterdir())
    for name in ("000000.4584", "000007.12", ".000003.4-ab.tmp", ".000003.9.4-ab.tmp"):
        (parts / name).mkdir()
        (parts / name / "train.bin").write_bytes(b"half")
    with pytest.raises(DataError, match="not UTF-8"):
        prepare_dataset(config, work_dir=str(work), progress=False)
    assert sorted(path.name for path in parts.iterdir()) == before


def test_two_processes_prepare_once_and_agree(tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "text", [random_text(12_000, seed=i) for i in range(5)])
    tokenizer = BPETokenizerConfig(vocab_size=500, sample_bytes=300_000)
    config = files_config(tmp_path / "data", texts, tokenizer=tokenizer)
    processes = [start(config) for _ in range(2)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert results[0][0] == results[1][0]
    errors = [err for _, err in results]
    assert sum("prepared " in err for err in errors) == 1
    assert sum("waiting for another process" in err for err in errors) <= 1
    assert os.listdir(tmp_path / "data/corpus/default")
