"""`toolkit schedule`: what is plotted is what training does."""

import json
from pathlib import Path

import pytest

from toolkit.cli import main as cli
from toolkit.commands.chart import png, text, ticks
from toolkit.errors import ConfigError

FLAGS = [
    "--train_module.scheduler={type: wsd, units: tokens, warmup: 2048, decay: 8192}",
    "--train_module.schedules={weight_decay: {type: linear, warmup: 0}}",
    "--data_loader.batch_size_schedule=[{tokens: 6000}]",
    "--data_loader.sequence_length_schedule=[{tokens: 0, sequence_length: 16}, {tokens: 9000}]",
]


@pytest.mark.slow
def test_the_points_are_what_a_run_records(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = tmp_path / "text.txt"
    texts.write_text("".join(f"line {n}: é and {n * n}\n" for n in range(1500)), encoding="utf-8")
    flags = [
        *FLAGS, "--trainer.max_duration={value: 20480, unit: tokens}",
        f"--dataset.source={{type: files, paths: ['{texts}']}}", "--dataset.num_processes=1",
    ]  # fmt: skip
    assert cli.run(["schedule", "smoke", *flags, "--out", "plot.png", "--json"]) == 0
    plot = json.loads(capsys.readouterr().out)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    curves = {curve["name"]: curve["values"] for curve in plot["curves"]}
    assert curves.keys() == {"lr", "weight_decay", "global_batch_size", "sequence_length"}
    quiet = ["--trainer.no_checkpoints", "--trainer.no_evals", "--save-folder", "run"]
    assert cli.run(["train", "smoke", *flags, *quiet]) == 0
    lines = (tmp_path / "run/metrics/train.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert plot["steps"] == [record["step"] for record in records]
    assert curves["lr"] == [record["lr"] for record in records]
    assert curves["weight_decay"] == [record["weight_decay"] for record in records]
    for name in ("global_batch_size", "sequence_length"):
        assert curves[name] == [record[name] for record in records]
    assert plot["total_steps"] == len(records)
    ends = [*plot["tokens"][1:], plot["total_tokens"]]
    assert ends == [record["tokens"] for record in records]


def test_the_picture_in_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["schedule", "smoke", *FLAGS]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("20 steps, 34,816 tokens\n\nlr\n")
    assert all(f"\n{name}\n" in shown for name in ("weight_decay", "global_batch_size"))
    assert max(map(len, shown.splitlines())) <= 72
    assert cli.run(["schedule", "smoke", "--train_module.scheduler={type: wsdd}"]) == 2
    assert "did you mean 'wsd'" in capsys.readouterr().err


def test_a_chart_of_a_line() -> None:
    drawn = text("x", [0, 1], [0.0, 1.0], axis=("a", "b"), width=20).splitlines()
    assert drawn[0] == "x"
    assert drawn[1].startswith("1 ┤")
    assert drawn[8].startswith("0 ┤")
    assert drawn[9] == "   a" + " " * 15 + "b"
    top, bottom = drawn[1][3:], drawn[8][3:]
    assert top[-1] != "\u2800" == top[0]
    assert bottom[0] != "\u2800" == bottom[-1]
    assert text("x", [0, 1], [2.0, 2.0], axis=("a", "b")) == "x: 2 throughout"


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [
        (0.0, 0.003, [0, 0.0005, 0.001, 0.0015, 0.002, 0.0025, 0.003]),
        (1, 400, [0, 100, 200, 300, 400]),
        (1, 10, [0, 2, 4, 6, 8, 10]),
        (0, 6656, [0, 2000, 4000, 6000, 8000]),
        (0, 0, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-0.5, 1e-9, [-0.5, -0.4, -0.3, -0.2, -0.1, 0, 0.1]),
    ],
)
def test_marks_of_an_axis_are_round_numbers(low: float, high: float, marks: list[float]) -> None:
    assert ticks(low, high) == marks


def test_an_image_without_pillow_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ConfigError, match=r'--out: .* pip install "toolkit\[plot\]"'):
        png([0, 1], {"x": [0, 1]}, axis="step")
