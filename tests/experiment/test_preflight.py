"""Whether a run can be continued with a config."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.tiny import empty_weights, tiny_model
from toolkit.checkpoint.commit import save_checkpoint
from toolkit.errors import CheckpointError
from toolkit.experiment.config import ExperimentConfig
from toolkit.experiment.continuation import check_continuation
from toolkit.experiment.same_model import check_model
from toolkit.models.layer_configs import MoEConfig
from toolkit.optim.config import AdamWConfig, SGDConfig
from toolkit.train.config import TrainerConfig, TransformerTrainModuleConfig


class Loader:
    def __init__(self) -> None:
        self.state: Any = None
        self.batches = self

    def load_state_dict(self, state: Any) -> None:
        self.state = state

    def steps_of(self, value: int, unit: str) -> int:
        return value

    def check_repetitions(self, steps: int) -> None:
        self.steps = steps


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with one checkpoint of the tiny model under AdamW."""
    save_checkpoint(
        tmp_path / "checkpoints", step=1, tokens=0, tensors=empty_weights(tiny_model()),
        rank_state={"trainer": {"data": {"batch": 1}}}, engine="single", rank=0, group=None,
        extra={
            "model": msgspec.to_builtins(tiny_model()),
            "optim": msgspec.to_builtins(AdamWConfig()),
        },
    )  # fmt: skip
    return tmp_path


def check(folder: Path, *, optim: Any = None, trainer: Any = None, **model: Any) -> Any:
    config = ExperimentConfig(
        model=tiny_model(**model),
        train_module=TransformerTrainModuleConfig(optim=optim or AdamWConfig()),
        trainer=trainer or TrainerConfig(),
    )
    loader: Any = Loader()
    check_continuation(config, folder, loader)
    return loader.state


def test_the_same_model_and_optimizer_continue_with_the_data_state(run: Path) -> None:
    assert check(run, optim=AdamWConfig(lr=9.0)) == {"batch": 1}


def test_another_optimizer_is_refused_with_a_way_out(run: Path, tmp_path: Path) -> None:
    reason = r"optim\.type \(was adamw, is sgd\).*trainer\.load_weights_only=true"
    with pytest.raises(CheckpointError, match=reason):
        check(run, optim=SGDConfig())
    weights = TrainerConfig(load_path=str(run), load_weights_only=True)
    assert check(tmp_path / "new", optim=SGDConfig(), trainer=weights) is None


def test_experts_of_a_stored_run_are_compared_one_by_one() -> None:
    """Fields that its release did not have are at their defaults; rates and weights may change."""
    moe = MoEConfig(num_experts=4, top_k=2, intermediate_size=8)
    new = moe.replace(bias_update_rate=0.01)

    def compare(
        saved: MoEConfig, asked: MoEConfig, *without: str, weights_only: bool = False
    ) -> None:
        stored, given = (msgspec.to_builtins(tiny_model(moe=own)) for own in (saved, asked))
        for name in without:
            del stored["moe"][name]
        check_model("step1", stored, given, weights_only=weights_only)

    compare(moe, moe, "score_function", "num_groups", "bias_update_rate")
    compare(new, new.replace(bias_update_rate=0.0, load_balancing_multiplier=0.5))
    compare(moe, new, weights_only=True)  # whose shapes are checked
    for changed, named in (
        (new, r"model.moe.bias_update_rate \(was None"),
        (moe.replace(score_function="sigmoid"), r"moe.score_function \(was softmax, is sigmoid\)"),
    ):
        with pytest.raises(CheckpointError, match=named):
            compare(moe, changed, "score_function", "bias_update_rate")
    dense, sparse = (msgspec.to_builtins(tiny_model(moe=own)) for own in (None, moe))
    with pytest.raises(CheckpointError, match=r"model.moe \(was None, is experts\)"):
        check_model("step1", dense, sparse, weights_only=False)


def test_biases_that_a_checkpoint_lacks_are_named(tmp_path: Path) -> None:
    moe = MoEConfig(num_experts=4, top_k=2, intermediate_size=8)
    save_checkpoint(
        tmp_path / "checkpoints", step=1, tokens=0, tensors=empty_weights(tiny_model(moe=moe)),
        rank_state={}, engine="single", rank=0, group=None,
        extra={"model": msgspec.to_builtins(tiny_model(moe=moe))},
    )  # fmt: skip
    weights = TrainerConfig(load_path=str(tmp_path), load_weights_only=True)
    assert check(tmp_path / "new", trainer=weights, moe=moe) is None
    with pytest.raises(CheckpointError, match=r"has no tensor model\..*router\.score_bias"):
        check(tmp_path / "new", trainer=weights, moe=moe.replace(bias_update_rate=0.01))


@pytest.mark.parametrize("change", [{"rope_theta": 5e5}, {"max_sequence_length": 64}])
def test_longer_context_needs_a_new_run_from_the_weights(
    run: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match=next(iter(change))):
        check(run, **change)
    weights = TrainerConfig(load_path=str(run), load_weights_only=True)
    assert check(tmp_path / "new", trainer=weights, **change) is None
    with pytest.raises(CheckpointError, match="d_model"):
        check(tmp_path / "new", trainer=weights, d_model=64)
