"""`gpt2` and `dolma2` stand for tokenizers; `merge` takes values by path."""

import json
from pathlib import Path

import pytest

from toolkit.errors import ConfigError
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.load import load_experiment
from toolkit.models.config import TransformerConfig

BIG = "--model.vocab_size=100352"


@pytest.mark.parametrize(
    ("name", "path"), [("gpt2", "openai-community/gpt2"), ("dolma2", "allenai/dolma2-tokenizer")]
)
def test_a_tokenizer_by_name(name: str, path: str, tmp_path: Path) -> None:
    file = tmp_path / "my.json"
    file.write_text(json.dumps({"model": {"preset": "quickstart"}, "dataset": {"tokenizer": name}}))
    for source, flags in (
        ("smoke", [f"--dataset.tokenizer={name}"]),
        ("smoke", [f"--dataset={{tokenizer: {name}}}"]),
        (str(file), []),
    ):
        stored = load_experiment(source, [*flags, BIG]).stored
        assert stored.dataset.tokenizer is not None
        assert stored.to_dict()["dataset"]["tokenizer"]["path"] == path


def test_merge_takes_values_by_path() -> None:
    config = ExperimentConfig(model=TransformerConfig.preset("quickstart"))
    merged = config.merge(
        ["train_module.optim.lr=6e-3", "--seed=3", "trainer.hard_stop={value: 5}"]
    )
    assert (merged.train_module.optim.lr, merged.seed) == (6e-3, 3)
    assert merged.trainer.hard_stop is not None
    assert merged.trainer.hard_stop.value == 5
    assert merged.model == config.model
    assert type(merged) is ExperimentConfig
    assert config.model.merge(["num_layers=2"]).to_transformer().num_layers == 2
    with pytest.raises(ConfigError, match="did you mean 'lr'"):
        config.merge(["train_module.optim.lrr=1"])
    with pytest.raises(ConfigError, match="seed: "):
        config.merge(["seed=x"])
    for words in ("seed=3", [3], {"seed": 3}.items()):
        with pytest.raises(ConfigError, match="merge takes a list of texts"):
            config.merge(words)  # type: ignore[arg-type]
