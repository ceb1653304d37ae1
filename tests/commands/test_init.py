"""`toolkit init`: the file that it writes is one that trains."""

import io
from pathlib import Path

import pytest

from toolkit.cli import main as cli
from toolkit.commands.init import Answers, first_config
from toolkit.errors import ConfigError
from toolkit.experiment.checks import check_experiment
from toolkit.experiment.load import load_experiment

ASKED = Answers("python_stdlib", "bpe", "2M", "10m")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("once upon a time\n" * 1000)
    (tmp_path / "empty").mkdir()


@pytest.mark.parametrize("file", ["my.json", "my.yaml"])
def test_options_write_a_config(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--data=texts", "--tokenizer=gpt2", "--size=5M", "--time=2h", "--device=h100"]
    assert cli.run(["init", file, *words]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{file}: ")
    assert "the data has about 4.05k tokens" in said
    assert "teaches less" in said
    config = load_experiment(file).config
    assert config.dataset.tokenizer is not None
    assert config.dataset.tokenizer.to_dict()["path"] == "openai-community/gpt2"
    assert config.model.to_transformer().vocab_size == 50_257
    assert config.dataset.source is not None
    assert config.dataset.source.to_dict()["paths"] == ["texts"]
    assert cli.run(["init", file, *words]) == 2
    assert "exists; give another file name" in capsys.readouterr().err


def test_all_mistakes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data=nowhere", "--tokenizer=gpt3", "--size=huge", "--time=soon"]
    assert cli.run(["init", *words]) == 2
    said = capsys.readouterr().err
    assert [f"--{name} " in said for name in Answers._fields] == [True] * 4


def test_at_a_terminal_it_asks_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = io.StringIO("nowhere\ntexts\nBPE\nhuge\n2M\nsoon\n1m\n")
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    assert cli.run(["init", "--device=cpu"]) == 0
    said = capsys.readouterr().out
    assert "nowhere: no such file or folder" in said
    assert "huge: neither a preset nor a number" in said
    assert load_experiment("my.json").config.dataset.source is not None


@pytest.mark.parametrize(("size", "device"), [("200k", "cpu"), ("gpt2_124M", "h100")])
def test_what_is_written_fits_more_ranks_and_its_own_rows(size: str, device: str) -> None:
    first = first_config(ASKED._replace(size=size), device)
    assert first.config.model.max_sequence_length == first.config.dataset.sequence_length
    check_experiment(first.config, 8)
    assert first.config.train_module.rank_microbatch_size in (None, 16_384)


def test_it_asks_for_what_is_not_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("texts\n\n\n"))
    assert cli.run(["init", "--time", "1h", "--device", "cpu"]) == 0
    config = load_experiment("my.json").config
    assert config.dataset.tokenizer is not None
    assert config.dataset.tokenizer.to_dict()["type"] == "bpe"
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert cli.run(["init", "b.json", "--time=1h", "--size=2M", "--device=cpu"]) == 2
    assert "give --data, --tokenizer as options" in capsys.readouterr().err
    for file, problem in (("my.json", "exists; give"), ("my.toml", "TOML is not read")):
        assert cli.run(["init", file]) == 2  # before anything is asked
        assert problem in capsys.readouterr().err


def test_steps_follow_time_and_rates_follow_size() -> None:
    short, long = (first_config(ASKED._replace(time=t), "cpu") for t in ("10m", "20m"))
    assert long.steps == pytest.approx(2 * short.steps, abs=2)
    assert short.seconds == pytest.approx(600, rel=0.05)
    large = first_config(ASKED._replace(size="20M", time="1d"), "cpu").config
    assert large.data_loader.global_batch_size > short.config.data_loader.global_batch_size
    assert large.train_module.optim.lr < short.config.train_module.optim.lr


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": "nowhere"}, "--data nowhere: no such file or folder"),
        ({"data": "empty"}, "--data empty: "),
        ({"data": "${HOME}"}, "--data ${HOME}: a config takes ${NAME} for a variable"),
        ({"tokenizer": "gpt3"}, "--tokenizer gpt3: give one of byte, bpe, gpt2, dolma2"),
        ({"size": "llama3_8"}, "did you mean 'llama3_8B'"),
        ({"size": "llama3_70B"}, "--size llama3_70B: needs "),
        ({"time": "soon"}, "--time soon: "),
        ({"time": "0.1s"}, "--time 0.1s: enough for "),
    ],
)
def test_answers_that_cannot_be_used_are_refused(changed: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        first_config(ASKED._replace(**changed), "cpu")
    assert message in str(error.value)
