"""`toolkit convert-hf`: what it prints, refuses, and what its config trains."""

import json
from pathlib import Path

import pytest
import torch

from toolkit.cli import main as cli
from toolkit.commands.convert import finetuning_lr
from toolkit.data.prepare.tokenizers.tokenizer import train_bpe
from toolkit.experiment.load import load_experiment


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("hub") / "tiny"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=300, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, head_dim=8, max_position_embeddings=32,
        tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder)
    train_bpe([" ".join(f"{n} small words" for n in range(900))], 300).save(folder)
    return folder


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_it_writes_is_trained(
    original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["convert-hf", str(original), "out"]) == 0
    first, compared, following = capsys.readouterr().out.splitlines()
    assert first.startswith("out: qwen3, 15,512 parameters, bfloat16, 31 kB, ")
    assert compared.startswith("logits equal those of transformers: largest difference ")
    assert following.startswith("next: toolkit train out/finetune.json --dataset.source=")
    assert cli.run(["verify", "out"]) == 0
    capsys.readouterr()

    config = load_experiment("out/finetune.json").config
    assert config.trainer.load_path == str(tmp_path / "out")
    assert config.dataset.sequence_length == 32
    assert config.train_module.optim.lr == 1e-4
    assert set(json.loads(Path("out/finetune.json").read_text())["trainer"]) > {"load_path"}

    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a small text for a small model. " * 1500)
    code = cli.run(
        [
            "train", "out/finetune.json", "--save-folder", "run",
            "--dataset.source={type: files, paths: [texts/]}", "--dataset.num_processes=1",
            "--trainer.hard_stop={value: 3, unit: steps}", "--train_module.precision=fp32",
            "--train_module.scheduler.warmup=0", "--train_module.optim.lr=1e-2",
        ]
    )  # fmt: skip
    assert code == 0
    rows = [json.loads(line) for line in Path("run/metrics/train.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] if "train/loss" in row else row["loss"] for row in rows]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone/deep/er"], "gone/deep/er: no such folder"),
        (["empty"], "empty: no config.json here"),
        (["alone"], "alone: holds no weights"),
        (["SRC", "--revision", "v1"], "is a local folder, not a hub name"),
        (["SRC", "--vocab-size", "7"], "--vocab-size 7: the model has 300 token ids"),
        (["SRC", "--vocab-size", "0"], "--vocab-size 0: must be greater than 0"),
    ],
)
def test_bad_inputs_are_one_line_and_leave_nothing(
    original: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    Path("alone").mkdir()
    Path("alone/config.json").write_bytes((original / "config.json").read_bytes())
    args = [str(original) if word == "SRC" else word for word in words]
    assert cli.run(["convert-hf", args[0], "out", *args[1:]]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == ["alone", "empty"]


def test_the_learning_rate_falls_with_size() -> None:
    sizes = (1.35e8, 1e9, 7e9, 1.3e10, 7e10)
    assert [finetuning_lr(int(size)) for size in sizes] == [1e-4, 5.3e-5, 2e-5, 1.5e-5, 1e-5]
