"""Numbers that no optimizer or schedule can work with are refused with their path."""

import pytest

from toolkit.errors import ConfigError
from toolkit.experiment.load import load_experiment
from toolkit.optim.base import GroupOverride
from toolkit.optim.config import AdamWConfig

OPTIM, SCHEDULER = "train_module.optim", "train_module.scheduler"


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (f"{OPTIM}.betas", "[0.9, 1.5]", "betas must each be in [0, 1): [0.9, 1.5]"),
        (f"{OPTIM}.weight_decay", "-0.1", "weight_decay must not be negative: -0.1"),
        (OPTIM, "{type: sgd, momentum: -1}", "momentum must not be negative: -1"),
        (f"{SCHEDULER}.warmup", "-5", "warmup must not be negative: -5"),
        (f"{SCHEDULER}.alpha_f", "-1", "alpha_f must not be negative: -1"),
        ("trainer.callbacks.sample_writer.top_k", "-1", "top_k must not be negative: -1"),
        ("trainer.callbacks.checkpointer.keep_last", "0", "keep_last must be greater than 0"),
        (
            f"{OPTIM}.group_overrides",
            "[{params: ['*'], opts: {weight_decay: true}}]",
            "group_overrides.0.opts.weight_decay: expected a number, not true",
        ),
        (
            f"{OPTIM}.group_overrides",
            "[{params: ['*'], opts: {betas: [0.9]}}]",
            "group_overrides.0.opts.betas: expected a list of 2 values, not [0.9]",
        ),
        (
            f"{OPTIM}.group_overrides",
            "[{params: ['*'], opts: {eps: 0}}]",
            "group_overrides.0.opts.eps must be greater than 0",
        ),
    ],
)
def test_numbers_out_of_range(path: str, value: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_experiment("quickstart", [f"--{path}={value}"])
    assert expected in str(error.value)
    section = path if path == OPTIM else path.rpartition(".")[0]
    assert section in str(error.value)


def test_a_group_may_have_no_learning_rate() -> None:
    frozen = GroupOverride(params=["embeddings.*"], opts={"lr": 0})
    assert AdamWConfig(group_overrides=(frozen,)).group_overrides[0].opts == {"lr": 0}
