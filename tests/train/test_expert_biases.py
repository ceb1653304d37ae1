"""Biases of routers and modules of multi-token prediction are state: saved and resumed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoint.exchange import save
from tests.tiny import build, module_config, open_environment, tiny_model, train_steps
from toolkit.checkpoint.load import load_checkpoint
from toolkit.errors import ConfigError
from toolkit.models.layer_configs import MoEConfig
from toolkit.models.lora_config import LoRAConfig
from toolkit.models.parameters import trained_parameters
from toolkit.train.callbacks.averages import Average
from toolkit.train.transformer import TransformerTrainModule

MOE = MoEConfig(
    num_experts=8,
    top_k=2,
    intermediate_size=12,
    shared_expert_intermediate_size=12,
    dense_layers=(0,),
    score_function="sigmoid",
    num_groups=4,
    top_k_groups=2,
    bias_update_rate=0.03,
    load_balancing_multiplier=0.0,
)
LORA = LoRAConfig(target_modules=("*.attention.*",))
BIAS, AHEAD = (f"model.{n}.feed_forward.router.score_bias" for n in ("blocks.1", "mtp.0.block"))


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small products are slower on several."""
    monkeypatch.setenv("TOOLKIT_NUM_THREADS", "1")


@contextlib.contextmanager
def opened(seed: int = 3, moe: MoEConfig = MOE) -> Iterator[TransformerTrainModule]:
    config = module_config("single")
    env = open_environment(config, seed=seed)
    with contextlib.closing(env):
        yield build(config, env, moe=moe, num_mtp_layers=1, init_std=0.1)


def biases(module: TransformerTrainModule) -> dict[str, torch.Tensor]:
    state = module.state_tensors()
    return {name: state[name].clone() for name in (BIAS, AHEAD)}


def test_a_resumed_run_is_bit_equal(tmp_path: Path) -> None:
    with opened() as module:
        train_steps(module, 0, 2)
        save(module, tmp_path, step=2)
        history, state = train_steps(module, 2, 4), module.state_tensors()
        with opened(seed=4) as other:
            load_checkpoint(tmp_path / "step2", tensors=other.state_tensors(), rank=0, group=None)
            other.state_filled()
            assert train_steps(other, 2, 4) == history
            for name, tensor in other.state_tensors().items():
                assert torch.equal(tensor, state[name]), name
    assert state[BIAS].abs().max() > 0.05
    assert state["model.mtp.0.projection.weight"].shape == (32, 64)


def test_a_step_that_is_left_out_leaves_biases_and_no_average_or_optimizer_knows_them() -> None:
    with opened() as module:
        train_steps(module, 0, 1)
        average = Average(module)
        average.copy()
        before = biases(module)
        forward = module.engine.module.forward

        def poisoned(*args, **kwargs):
            sums = forward(*args, **kwargs)
            return sums._replace(loss=sums.loss * float("nan"))

        module.engine.module.forward = poisoned  # type: ignore[method-assign]
        assert train_steps(module, 1, 2)[0]["skipped"] == 1.0
        module.engine.module.forward = forward  # type: ignore[method-assign]
        after = biases(module)
        assert all(torch.equal(after[name], before[name]) for name in before)
        train_steps(module, 2, 3)
        moved = biases(module)
        assert not any(torch.equal(moved[name], before[name]) for name in before)
        with average.held():
            assert torch.equal(module.state_tensors()[BIAS], moved[BIAS])
        assert not any("score_bias" in name for name in average.tensors)
        optimized = {
            id(p) for group in module.engine.optimizer.param_groups for p in group["params"]
        }
        assert id(module.state_tensors()[BIAS]) not in optimized


def test_an_adapter_cannot_hold_biases_that_move() -> None:
    model = tiny_model(moe=MOE)
    with pytest.raises(ConfigError, match=r"bias_update_rate: 0.03 changes the base.*set it to 0"):
        trained_parameters(model, lora=LORA)
    moe = MOE.replace(bias_update_rate=0.0)
    assert trained_parameters(model.replace(moe=moe), lora=LORA)
