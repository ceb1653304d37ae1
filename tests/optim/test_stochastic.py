"""AdamW with moments in bf16, rounded at random: right on average, bit-equal when run again."""

from typing import Any

import pytest
import torch

from tests.tiny import build, module_config, open_environment, train_steps
from tests.workers import WorkerPool
from toolkit.distributed.config import DataParallelConfig
from toolkit.distributed.layout import Layout
from toolkit.distributed.shards import local_tensor
from toolkit.distributed.sizes import check_optimizer
from toolkit.errors import CheckpointError, ConfigError
from toolkit.experiment.continuation import _check_optimizer_type
from toolkit.experiment.load import load_experiment
from toolkit.optim.config import AdamWConfig
from toolkit.optim.stochastic import StochasticAdamW, random_bits, rounded

CONFIG = AdamWConfig(lr=1e-3, state_dtype="bf16")


def test_rounding_keeps_the_mean_and_goes_to_neighbours() -> None:
    values = torch.tensor([1.0, 1.001, 1.0039, -3.14159, 1e-30, 0.0])
    draws = 20_000
    key = torch.tensor(7)
    bits = random_bits(key, 0, draws * len(values)).view(draws, -1)
    found = rounded(values.expand(draws, -1).contiguous(), bits).double()
    below, above = found.amin(0), found.amax(0)
    exact = values.double()
    assert ((below <= exact) & (exact <= above)).all()
    assert (above - below <= exact.abs() * 2**-7).all()  # neighbours in bf16
    deviation = (above - below) / 2 / draws**0.5
    assert ((found.mean(0) - exact).abs() <= 4 * deviation).all()
    assert (above - below)[[0, 5]].tolist() == [0.0, 0.0]  # what bf16 holds stays
    special = torch.tensor([torch.inf, -torch.inf, torch.nan])
    assert torch.equal(rounded(special, bits[0, :3])[:2], special[:2].bfloat16())
    assert rounded(special, bits[0, :3])[2].isnan()


def test_bits_are_even_and_do_not_hang_together() -> None:
    bits = random_bits(torch.tensor(3), 0, 100_000)
    other = random_bits(torch.tensor(4), 0, 100_000)
    for shift in range(0, 32, 5):
        ones = ((bits >> shift) & 1).double()
        assert ones.mean().item() == pytest.approx(0.5, abs=0.01)
        for compared in (((other >> shift) & 1).double(), ((bits >> (shift + 16)) & 1).double()):
            assert (ones * compared).mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(random_bits(torch.tensor(3), 500, 10), bits[500:510])


def test_moments_follow_those_of_fp32_where_rounding_to_nearest_stands_still() -> None:
    """A change of 0.1% a step is less than half of what bf16 resolves."""
    weight = torch.nn.Parameter(torch.zeros(4096))
    optimizer = StochasticAdamW([weight], {"w": weight}, lr=0.0, betas=(0.9, 0.999))
    nearest = torch.zeros(4096, dtype=torch.bfloat16)
    exact = 0.0
    for _ in range(2000):
        weight.grad = torch.ones(4096)
        optimizer.step()
        nearest = (nearest.float() * 0.999 + 0.001).bfloat16()
        exact = exact * 0.999 + 0.001
    mean = optimizer.state[weight]["exp_avg_sq"].double().mean().item()
    assert mean == pytest.approx(exact, rel=0.005)
    assert nearest.double().mean().item() < 0.7 * exact


def test_a_step_follows_torchs_and_one_not_taken_changes_nothing() -> None:
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 32).view(4, 8)) for _ in range(2))
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer: Any = StochasticAdamW([ours], {"w": ours}, **settings)
    reference = torch.optim.AdamW([theirs], **settings)
    optimizer.found_inf = torch.ones(())
    before = ours.detach().clone()
    for step in range(6):
        if step in (0, 4):  # before there are moments, and later
            ours.grad = torch.full((4, 8), torch.nan)
            kept = [t.clone() for t in optimizer.state[ours].values()] if step else []
            before = ours.detach().clone()
            optimizer.step()
            optimizer.found_inf = None
            assert torch.equal(ours.detach(), before)
            now = optimizer.state[ours].values()
            assert all(map(torch.equal, kept, now)) if step else not any(t.any() for t in now)
        gradient = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
        optimizer.found_inf = torch.ones(()) if step == 3 else None
    assert (ours - theirs).abs().max() < 0.002
    assert (ours - theirs).abs().max() > 0


def trained(engine: str, optim: AdamWConfig) -> Any:
    """Losses of six steps; of the last two again from the state after four; and that state."""
    config = module_config(engine, optim=optim)
    env = open_environment(config)
    try:
        module = build(config, env)
        losses = [record["loss"] for record in train_steps(module, 0, 4)]
        state = {k: local(t).clone() for k, t in module.state_tensors().items()}
        losses += [record["loss"] for record in train_steps(module, 4, 6)]
        for key, tensor in module.state_tensors().items():
            local(tensor).copy_(state[key])
        module.state_filled()
        again = [record["loss"] for record in train_steps(module, 4, 6)]
        assert all(t.dtype == local(t).dtype for t in module.state_tensors().values())
        return losses, again, state
    finally:
        env.close()


def local(tensor: torch.Tensor) -> torch.Tensor:
    return local_tensor(tensor.detach())


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_engines_train_alike_and_resume_bit_equal(
    workers: WorkerPool, engine: str, ranks: int
) -> None:
    exact = workers.run(1, trained, "single", CONFIG.replace(state_dtype="fp32"))[0][0]
    results = workers.run(ranks, trained, engine, CONFIG)
    for losses, again, state in results:
        assert losses == pytest.approx(exact, rel=1e-3)
        assert losses != exact
        assert again == losses[4:]
        kept = {k: t for k, t in state.items() if k.rpartition(".")[2].startswith("exp_avg")}
        assert {t.dtype for t in kept.values()} == {torch.bfloat16}
        assert len(kept) == 2 * sum(k.startswith("model.") for k in state)
    if engine == "ddp":
        (_, _, one), (_, _, other) = results
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_what_cannot_be_is_refused() -> None:
    layout = Layout(
        dp_shard=2, zero_stage=2, backend="deepspeed", dp_config=DataParallelConfig(name="zero2")
    )
    with pytest.raises(ConfigError, match=r"state_dtype: bf16 does not go with zero2; use ddp"):
        check_optimizer(layout, CONFIG)
    config = load_experiment("smoke", ["--train_module.optim.state_dtype=bf16"]).config
    stored = {"optim": {"type": "adamw"}}
    with pytest.raises(CheckpointError, match=r"optim.state_dtype \(was fp32, is bf16\)"):
        _check_optimizer_type("step3", stored, config)
