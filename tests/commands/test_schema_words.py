"""`toolkit schema PATH`, `toolkit models`: what configs may hold, in words."""

import json

import pytest

from toolkit.cli import main as cli
from toolkit.commands.schema import describe_path
from toolkit.config import leaves
from toolkit.errors import ConfigError
from toolkit.experiment.config import ExperimentConfig
from toolkit.models.config import TransformerConfig
from toolkit.models.presets import PRESETS, SOURCES
from toolkit.train.callbacks.config import CallbacksConfig


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.run(list(words)) == 0
    return " ".join(capsys.readouterr().out.split())


def test_a_section_names_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "schema", "trainer.callbacks")
    for name in CallbacksConfig.__struct_fields__:
        assert f" {name}: " in text
    assert "Tokens per second, MFU" in text
    text = said(capsys, "schema", "trainer.callbacks.checkpointer")
    assert "interval: a whole number" in text
    text = said(capsys, "schema", "optim")
    assert text.count("layer_lr_decay: ") == 1
    assert text.count(" lr: a number; default ") > 1
    assert "; default " in text


def test_a_choice_has_a_section_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "schema", "dataset.tokenizer")
    assert "dataset.tokenizer with type: byte" in text
    assert "A name stands for one too: gpt2, dolma2." in text
    assert "path: text; required" in text
    assert "Folder, `tokenizer.json` file, or hub name." in text


def test_one_type_is_shown_alone(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "schema", "train_module.optim.muon")
    assert text.startswith("train_module.optim with type: muon ")
    assert text.count("with type: ") == 1
    assert text == said(capsys, "schema", "optim", "--type", "muon")
    assert text == said(capsys, "schema", "optim.muon")
    assert cli.run(["schema", "optim", "--type", "mun"]) == 2
    assert "no type 'mun'; one of adafactor, adam, " in capsys.readouterr().err
    assert cli.run(["schema", "seed", "--type", "x"]) == 2
    assert "it has no types" in capsys.readouterr().err
    text = said(capsys, "schema", "optim.lr")
    assert "lr of sgd: a number; default 0.01" in text


@pytest.mark.parametrize(
    ("path", "full"),
    [
        ("train_module.optim.lr", "train_module.optim.lr"),
        ("optim.lr", "train_module.optim.lr"),
        ("callbacks.checkpointer", "trainer.callbacks.checkpointer"),
        ("train_module.optim.betas.1", "train_module.optim.betas.1"),
        ("train_module.optim.group_overrides", "train_module.optim.group_overrides, each"),
        ("init_seed", "seed"),
    ],
)
def test_paths_may_be_short(path: str, full: str) -> None:
    assert describe_path(path)[0].title.removesuffix(" of any type") == full


def test_an_item_of_a_list_is_neither_required_nor_has_it_a_default(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.run(["schema", "train_module.optim.betas.1"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["  1: a number"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("trainer.calbacks", "did you mean 'callbacks'?"),
        ("optim.lrr", "did you mean train_module.optim.lr"),
        ("enabled", "did you mean "),
        ("xyzzy", "no such field"),
    ],
)
def test_what_is_not_there_is_answered(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r".") as error:
        describe_path(path)
    assert message in str(error.value)


def test_every_path_of_a_config_is_described() -> None:
    config = ExperimentConfig(model=TransformerConfig.preset("quickstart"))
    for path, _ in leaves(config.to_dict()):
        sections = describe_path(path)
        assert sections, path
        assert sections[0].fields or sections[0].doc, path


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["models", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {preset["name"] for preset in listed} == set(PRESETS) == set(SOURCES)
    found = {preset["name"]: preset for preset in listed}
    assert found["gpt2_124M"]["parameters"] == 124_475_904
    assert found["llama3_8B"]["heads"] == "32/8"
    assert "olmo2_1B" in said(capsys, "models")
    assert TransformerConfig.preset("llama3_8B").num_layers == 32
    with pytest.raises(ConfigError, match="did you mean 'llama3_8B'"):
        TransformerConfig.preset("llama3_8")
