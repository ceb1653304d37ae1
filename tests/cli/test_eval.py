"""`toolkit eval`: the numbers of training, files, and what is wrong with them."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from toolkit.cli import main as cli
from toolkit.data.prepare.tokenizers.tokenizer import ByteTokenizer

TEXT = "".join(f"line {n}: ünd so weiter, and {n * n}\n" for n in range(20))
SMALL: dict[str, Any] = {
    "vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": None,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(TEXT, encoding="utf-8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`known` and `unknown`: models of `transformers`, one of them of a family without a table."""
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(0)
    configs = {
        "known": LlamaConfig(intermediate_size=24, **SMALL),
        "unknown": OPTConfig(ffn_dim=24, word_embed_proj_dim=16, **SMALL),
    }
    for name, config in configs.items():
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder / name)
        ByteTokenizer().save(folder / name)
    return folder


def lines(capsys: pytest.CaptureFixture[str], *args: str) -> list[dict[str, Any]]:
    assert cli.run(["eval", *args, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_run_has_the_numbers_of_its_training(
    tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = [
        json.loads(line) for line in (tiny_run / "metrics/eval.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in recorded] == [2, 4]
    names = [tiny_run / "checkpoints/step2", tiny_run]
    for expected, name in zip(recorded, names, strict=True):
        (found,) = lines(capsys, str(name))
        for key in ("step", "name", "loss", "ppl", "bits_per_byte", "num_targets"):
            assert found[key] == expected[key], key
        (other,) = lines(capsys, str(name), "--batch-tokens", "128")
        assert other["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_files_of_a_run_are_scored_each_and_together(
    tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("b.jsonl").write_text(json.dumps({"body": "one"}) + "\n" + json.dumps({"body": "two"}))
    Path("c.jsonl").write_text(json.dumps({"body": TEXT}))
    args = [str(tiny_run), "--files", "b.jsonl", "c.jsonl", "--text-field", "body"]
    first, second, total = lines(capsys, *args)
    assert [first["name"], second["name"], total["name"]] == ["b.jsonl", "c.jsonl", "total"]
    assert first["settings"]["sequence_length"] == 64
    assert first["settings"]["append_eos"] is True
    # "one", the end of a document, "two", the end of a document: the first byte has no predecessor.
    assert (first["num_targets"], first["num_bytes"]) == (7, 5)
    assert total["num_targets"] == first["num_targets"] + second["num_targets"]
    losses = [line["loss"] * line["num_targets"] for line in (first, second, total)]
    assert losses[0] + losses[1] == pytest.approx(losses[2])
    bits = losses[2] / math.log(2) / (first["num_bytes"] + second["num_bytes"])
    assert total["bits_per_byte"] == pytest.approx(bits)


@pytest.mark.parametrize("name", ["known", "unknown"])
def test_a_hugging_face_folder_has_the_numbers_of_transformers(
    name: str, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders / name).eval()
    ids = torch.tensor([[*TEXT.encode(), 256]])
    loss, count = 0.0, 0
    for start in range(0, ids.shape[1], 64):
        row = ids[:, start : start + 64]
        with torch.no_grad():
            loss += model(row, labels=row).loss.item() * (row.shape[1] - 1)
        count += row.shape[1] - 1
    assert cli.run(["eval", str(folders / name), "--files", "a.txt", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["num_targets"] == count
    assert found["loss"] == pytest.approx(loss / count, rel=1e-5)
    assert ("evaluated through transformers: " in err) == (name == "unknown")


def test_bf16_is_near_fp32(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [str(folders / "known"), "--files", "a.txt"]
    (low,), (full,) = lines(capsys, *args, "--dtype", "bf16"), lines(capsys, *args)
    assert low["loss"] != full["loss"]
    assert low["loss"] == pytest.approx(full["loss"], rel=0.02)


def test_the_table_names_the_settings(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["eval", str(tiny_run), "--files", "a.txt", "--stride", "16"]) == 0
    settings, header, row = capsys.readouterr().out.splitlines()
    assert settings.startswith(f"{tiny_run}, step 4: data files, sequence_length 64, stride 16,")
    names = ["data", "loss", "ppl", "bits/byte", "targets", "bytes", "seconds"]
    assert header.split() == names
    num_bytes = len(TEXT.encode())
    assert row.split()[0] == "a.txt"
    assert row.split()[4:6] == [str(num_bytes), str(num_bytes - 1)]


def test_a_converted_checkpoint_needs_files(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_run / "checkpoints/step4", tmp_path / "alone")
    assert cli.run(["eval", "alone"]) == 2
    assert "alone: not a run, so it has no validation data of its own" in capsys.readouterr().err
    assert cli.run(["eval", "alone", "--files", "a.txt"]) == 2
    assert "alone: no tokenizer here; give one with --tokenizer PATH" in capsys.readouterr().err
    ByteTokenizer().save(tmp_path / "bytes")
    (found,) = lines(capsys, "alone", "--files", "a.txt", "--tokenizer", "bytes")
    assert found["settings"]["sequence_length"] == 128
    num_bytes = len(TEXT.encode())
    assert found["num_bytes"] == num_bytes - (num_bytes // 128 + 1)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("--files none.txt", "--files: none.txt: no such file or folder"),
        ("--files empty.txt", "--files: empty.txt: the file is empty"),
        ("--files one.jsonl", "one.jsonl: 0 tokens and none that another predicts"),
        ("--files a.txt --tokenizer nope/x/y", "--tokenizer: nope/x/y: no such file or folder"),
        ("--files a.jsonl", "a.jsonl: line 1 (byte 0): no text under 'text'"),
        ("--files a.txt --stride 65", "--stride 65: rows of 64 tokens can begin 1 to 64 tokens"),
        ("--files a.txt --sequence-length 129", "--sequence-length 129: the model takes at most"),
        ("--files a.txt --batch-tokens 0", "--batch-tokens 0: give a number of tokens, 1 or"),
        ("--stride 3", "--stride goes with --files"),
        ("a.txt", "a.txt: one model at a time; texts go behind --files"),
        ("--files a.txt --device tpu9", "--device tpu9: not a device of this machine"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    args: str, expected: str, tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.txt").touch()
    Path("a.jsonl").write_text('{"body": "a"}\n')
    Path("one.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    capsys.readouterr()
    assert cli.run(["eval", str(tiny_run), *args.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {expected}")
    assert err.count("\n") == 1


def test_ids_beyond_the_vocabulary_are_named(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LlamaConfig(intermediate_size=24, **{**SMALL, "vocab_size": 120, "eos_token_id": 1})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "small")
    args = ["eval", "small", "--files", "a.txt", "--tokenizer", str(folders / "known")]
    assert cli.run(args) == 2
    message = "a.txt: its tokens go up to id 256, but the model knows ids below 120"
    assert message in capsys.readouterr().err
