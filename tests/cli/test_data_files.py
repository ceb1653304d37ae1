"""`toolkit data inspect`, `tokenize`, `merge` and `split` from the command line."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.data.corpus import write_texts
from toolkit.cli.main import run
from toolkit.errors import EXIT_BAD_INPUT, EXIT_DONE


@pytest.fixture
def folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Path:
    write_texts(tmp_path / "texts", ["ab", "abcdef", "x" * 20, "hello\x1b[31m world"])
    out = tmp_path / "data" / "texts" / "byte"
    words = ["data", "tokenize", str(tmp_path / "texts"), "--out", str(out), "--processes", "1"]
    assert run([*words, "--validation-fraction", "0"]) == EXIT_DONE
    assert capfd.readouterr().out == (
        f"{out}: 48 training tokens in 4 documents, 0 validation tokens in 0, vocabulary of 257 "
        "(uint16)\n"
    )
    return out


def test_inspect_prints_counts_lengths_and_samples(folder: Path, capfd) -> None:
    assert run(["data", "inspect", str(folder), "-n", "4"]) == EXIT_DONE
    out = capfd.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert ["train", "48", "4", "48", "0.92", "256", "96", "B"] in lines
    assert ["2", "to", "3", "1", "#" * 20] in lines
    assert ["16", "to", "31", "2", "#" * 40] in lines
    assert "train, document 1 (7 tokens):\n    abcdef<|endoftext|>" in out
    # Text from files does not steer the terminal.
    assert "hello\\x1b[31m world" in out
    assert out.splitlines()[-1] == "OK"


def test_inspect_lists_all_problems_and_ends_with_the_first(folder: Path, capfd) -> None:
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-2])
    (folder / "train.idx").unlink()
    assert run(["data", "inspect", str(folder)]) == EXIT_BAD_INPUT
    captured = capfd.readouterr()
    listed = [line for line in captured.out.splitlines() if line.startswith("problem: ")]
    assert len(listed) == 3
    assert "train.bin: holds 47 of the 48 tokens" in listed[0]
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"error: {folder / 'train.bin'}: holds 47 of the 48 tokens")
    assert captured.err.endswith("cut off (and 2 more, listed above)\n")


def test_inspect_of_a_bare_file(tmp_path: Path, capfd) -> None:
    path = tmp_path / "tokens.npy"
    np.array([5, 1, 70_000, 1], dtype=np.uint32).tofile(path)
    words = ["data", "inspect", str(path), "--dtype", "uint32", "--eos-id", "1", "--json"]
    assert run(words) == EXIT_DONE
    found = json.loads(capfd.readouterr().out)
    assert found["splits"][0]["num_documents"] == 2
    assert found["splits"][0]["largest_id"] == 70_000
    assert run([*words, "--vocab-size", "70000"]) == EXIT_BAD_INPUT
    assert "token 2 has id 70,000, outside the vocabulary of 70,000" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "last"),
    [
        ([], "OK (size; --vocab-size N checks ids too)"),
        (["--quick"], "OK (size only)"),
        (["--quick", "--vocab-size", "9"], "OK (size only)"),
        (["--vocab-size", "9"], "OK"),
    ],
)
def test_inspect_says_what_of_a_bare_file_was_checked(
    options: list[str], last: str, tmp_path: Path, capfd
) -> None:
    path = tmp_path / "tokens.bin"
    np.array([5, 1, 8], dtype=np.uint16).tofile(path)
    assert run(["data", "inspect", str(path), *options]) == EXIT_DONE
    assert capfd.readouterr().out.splitlines()[-1] == last


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vocab-size", "0"], "--vocab-size: must be at least 1, not 0"),
        (["--vocab-size", "-7"], "--vocab-size: must be at least 1, not -7"),
        (["--eos-id", "-1"], "--eos-id: -1 is negative"),
        (["--vocab-size", "9", "--eos-id", "9"], "--eos-id: 9 is outside the vocabulary of 9"),
    ],
)
def test_inspect_refuses_numbers_that_no_file_can_have(
    options: list[str], message: str, tmp_path: Path, capfd
) -> None:
    path = tmp_path / "tokens.bin"
    np.array([5, 1, 8], dtype=np.uint16).tofile(path)
    assert run(["data", "inspect", str(path), *options]) == EXIT_BAD_INPUT
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("{", "dataset.json: damaged"),
        ('{"format_version": 99}', "dataset.json: damaged"),
        (None, "no dataset.json there; give a prepared folder, or a file"),
    ],
)
def test_inspect_of_a_folder_without_a_readable_manifest(
    damage: str | None, message: str, folder: Path, capfd
) -> None:
    if damage is None:
        (folder / "dataset.json").unlink()
    else:
        (folder / "dataset.json").write_text(damage)
    assert run(["data", "inspect", str(folder)]) == EXIT_BAD_INPUT
    captured = capfd.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_split_and_merge_give_the_tokens_back(folder: Path, tmp_path: Path, capfd) -> None:
    parts = tmp_path / "parts"
    assert run(["data", "split", str(folder), "--parts", "2", "--out", str(parts)]) == EXIT_DONE
    names = [line.split(": ")[0] for line in capfd.readouterr().out.splitlines()]
    assert names == [str(parts / "part-0"), str(parts / "part-1")]
    again = tmp_path / "again"
    assert run(["data", "merge", *names, "--out", str(again)]) == EXIT_DONE
    assert (again / "train.bin").read_bytes() == (folder / "train.bin").read_bytes()
    assert (again / "train.idx").read_bytes() == (folder / "train.idx").read_bytes()
    assert run(["data", "merge", *names, "--out", str(again)]) == EXIT_BAD_INPUT
    assert "again: exists already" in capfd.readouterr().err


def test_split_wants_one_of_its_two_ways(folder: Path, tmp_path: Path, capfd) -> None:
    words = ["data", "split", str(folder), "--out", str(tmp_path / "out")]
    for more in ([], ["--parts", "2", "--validation-fraction", "0.5"]):
        assert run([*words, *more]) == EXIT_BAD_INPUT
        assert "give either --validation-fraction F or --parts N" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ("bpe:many", "--tokenizer bpe:many: give bpe:SIZE with a whole number"),
        ("bpe:12", "vocab_size must be at least 257"),
        ("mine.tiktoken", "its name tells no pattern (known: gpt2,"),
        ("./absent.model", "No such file or directory; give a SentencePiece model"),
        ("./absent", "no such file or folder"),
    ],
)
def test_tokenize_names_a_tokenizer_it_cannot_use(
    tokenizer: str, message: str, tmp_path: Path, capfd
) -> None:
    texts = write_texts(tmp_path / "texts", ["ab"])
    out = tmp_path / "data" / "x" / "y"
    words = ["data", "tokenize", str(texts), "--out", str(out), "--tokenizer", tokenizer]
    assert run(words) == EXIT_BAD_INPUT
    assert message in capfd.readouterr().err
    assert not out.exists()


def test_tokenize_takes_the_common_choices(tmp_path: Path, capfd) -> None:
    rows = [{"body": text} for text in ("the cat " * 30, "the cat " * 30, "a dog " * 9)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "data" / "x" / "y"
    words = ["data", "tokenize", str(path), "--out", str(out), "--text-field", "body"]
    words += ["--tokenizer", "bpe:262", "--validation-fraction", "0", "--deduplicate"]
    assert run([*words, "--processes", "1"]) == EXIT_DONE
    manifest = json.loads((out / "dataset.json").read_text())
    assert manifest["splits"]["train"]["num_documents"] == 2
    assert manifest["vocab_size"] == 262
    assert run(["data", "inspect", str(out)]) == EXIT_DONE


@pytest.mark.parametrize(
    ("name", "data", "options", "message"),
    [
        ("a.txt", b"ab\xff", [], "(0xff); convert the file, or set --encoding-errors replace"),
        ("a.txt", b"ab", ["--encoding-errors", "ignore"], "'ignore' is none of strict, replace"),
        ("a.txt", b"ab", ["--validation-fraction", "2"], "--validation-fraction must be in [0, 1"),
        ("a.txt", b"ab", ["--processes", "0"], "--processes must be greater than 0, not 0"),
        ("a.jsonl", b'{"b": 1}', [], "set --text-field to the key that holds it"),
        ("a.txt", b" ", ["--tokenizer", "./absent"], "--tokenizer: ./absent: no such file or"),
    ],
)
def test_messages_of_tokenize_name_its_own_options(
    name: str, data: bytes, options: list[str], message: str, tmp_path: Path, capfd
) -> None:
    (tmp_path / name).write_bytes(data)
    out = tmp_path / "data" / "x" / "y"
    assert run(["data", "tokenize", str(tmp_path / name), "--out", str(out), *options]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert message in error
    assert "dataset." not in error


def test_tokenize_replaces_what_is_not_utf8_on_request(tmp_path: Path, capfd) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab\xffc")
    out = tmp_path / "data" / "x" / "y"
    words = ["data", "tokenize", str(tmp_path / "a.txt"), "--out", str(out)]
    words += ["--validation-fraction", "0"]
    assert run([*words, "--encoding-errors", "replace"]) == EXIT_DONE
    assert json.loads((out / "dataset.json").read_text())["replaced_bytes"] == 1
    capfd.readouterr()
    assert run([*words, "--tokenizer", "bpe:300"]) == EXIT_BAD_INPUT
    error = capfd.readouterr().err
    assert "--encoding-errors: replace there, strict now; --tokenizer: " in error
    assert "--tokenizer: byte there, bpe now" in error
    assert "To keep them, give another --out" in error
    assert "as they are with dataset.source=null" in error
    (out / "dataset.json").unlink()
    assert run(words) == EXIT_BAD_INPUT
    assert "; give another --out\n" in capfd.readouterr().err
