"""Where training starts from."""

from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.checkpoint.find import Found
from toolkit.errors import CheckpointError, ConfigError
from toolkit.train.config import TrainerConfig
from toolkit.train.matching import renamed
from toolkit.train.restoring import Start, find_start

OWN, GIVEN = Path("run/checkpoints"), Path("given")


@pytest.mark.parametrize(
    ("own", "settings", "expected"),
    [
        (Found(OWN / "step2"), {}, Start(OWN / "step2", weights_only=False)),
        (Found(None), {}, Start(GIVEN / "step9", weights_only=True)),
        (Found(None), {"load_strategy": "never"}, None),
        (Found(None), {"load_path": None}, None),
        (
            Found(OWN / "step2", (OWN / "step3",)),
            {},
            Start(OWN / "step2", weights_only=False, rejected=(OWN / "step3",)),
        ),
    ],
)
def test_the_runs_own_checkpoints_come_first(
    own: Found, settings: dict[str, Any], expected: Start | None
) -> None:
    answers = {OWN: own, GIVEN: Found(GIVEN / "step9", (GIVEN / "step10",))}
    config = TrainerConfig(**({"load_path": str(GIVEN), "load_weights_only": True} | settings))
    assert find_start(config, OWN, answers.__getitem__) == expected


def test_load_path_that_must_hold_a_checkpoint_and_does_not(tmp_path: Path) -> None:
    config = TrainerConfig(load_path=str(tmp_path), load_strategy="always")
    with pytest.raises(CheckpointError, match=r"trainer\.load_path .* holds no valid checkpoint"):
        find_start(config, tmp_path / "own")


def test_a_run_that_has_trained_does_not_begin_elsewhere_by_itself(tmp_path: Path) -> None:
    folders = {OWN: Found(None), GIVEN: Found(GIVEN / "step9")}
    config = TrainerConfig(load_path=str(GIVEN), load_weights_only=True)
    with pytest.raises(
        CheckpointError, match=r"it has done 7 steps, .*\(it was never saved\)"
    ) as error:
        find_start(config, OWN, folders.__getitem__, reached=7)
    assert f"starts it again from trainer.load_path ({GIVEN / 'step9'})" in str(error.value)
    anew = config.replace(start_anew=True)
    start = find_start(anew, OWN, folders.__getitem__, reached=7)
    assert start == Start(GIVEN / "step9", weights_only=True)
    own = {OWN: Found(OWN / "step2"), GIVEN: Found(None)}
    assert find_start(config, OWN, own.__getitem__, reached=7) == Start(OWN / "step2", False)


@pytest.mark.parametrize("strategy", [None, "always"])
def test_a_given_load_path_must_be_there(tmp_path: Path, strategy: Any) -> None:
    config = TrainerConfig(load_path=str(tmp_path / "goood"), load_strategy=strategy)
    with pytest.raises(CheckpointError, match="goood: holds no valid checkpoint, there is no such"):
        find_start(config, tmp_path / "own")
    assert find_start(config.replace(load_strategy="if_available"), tmp_path / "own") is None


NAMES = ("model.blocks.0.attn.w", "optim.blocks.0.attn.w.exp_avg", "model.head.w")


def test_renamed_parameters_are_found_with_their_optimizer_state() -> None:
    tensors = {name: torch.ones(1) for name in NAMES}
    mapping = {r"blocks\.(\d+)\.attn": r"layers.\1.attention", "^head": "lm_head"}
    assert list(renamed(tensors, mapping)) == [
        "model.layers.0.attention.w",
        "optim.layers.0.attention.w.exp_avg",
        "model.lm_head.w",
    ]
    assert renamed(tensors, {}) == tensors


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"(": "x"}, "'\\(' -> 'x': missing \\), unterminated"),
        ({"attn": r"\3"}, "invalid group reference 3"),
        ({"exp_avg": "x"}, "'exp_avg' changes the name of no parameter"),
        ({"blocks.0.attn|head": "one"}, "gives two tensors one name"),
    ],
)
def test_a_mapping_that_makes_no_sense_is_refused(mapping: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        renamed({name: torch.ones(1) for name in NAMES}, mapping)
