"""What engines do for optimizers that do not do it in their kernel, and what they refuse."""

from typing import Any

import pytest
import torch

from tests.tiny import build, module_config, open_environment, train_steps
from tests.workers import WorkerPool
from toolkit.errors import ConfigError
from toolkit.optim.config import AdamWConfig


class Loop(torch.optim.Optimizer):
    """AdamW in a loop that knows nothing of `found_inf` and `grad_scale`."""

    def __init__(self, groups: Any, **defaults: Any) -> None:
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state |= {"step": torch.zeros(()), "start": p.clone()}
                    state |= {"m": torch.zeros_like(p), "v": torch.zeros_like(p)}
                state["step"] += 1
                first, second = group["betas"]
                state["m"].lerp_(p.grad, 1 - first)
                state["v"].mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                mean = state["m"] / (1 - first ** state["step"])
                root = (state["v"] / (1 - second ** state["step"])).sqrt() + group["eps"]
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * mean / root)


class Counting(Loop):
    """Keeps its counter as a number."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for state in self.state.values():
            state["count"] = state.get("count", 0) + 1


class Whole(Loop):
    needs_whole_matrices = True


class LoopConfig(AdamWConfig, kw_only=True, tag="loop"):
    kind: str = "Loop"

    def build(self, named_parameters: dict[str, torch.nn.Parameter]) -> torch.optim.Optimizer:
        settings = {"betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
        groups = [{"params": [p for p in named_parameters.values() if p.requires_grad]}]
        return globals()[self.kind](groups, lr=self.lr, **settings)


def history(engine: str | None, kind: str | None) -> tuple[list[dict[str, float]], bool]:
    """Steps of which the third is not finite; whether that one left everything as it was."""
    optim = AdamWConfig(lr=1e-3) if kind is None else LoopConfig(lr=1e-3, kind=kind)
    config = module_config(engine, optim=optim, max_grad_norm=0.5)
    env = open_environment(config)
    try:
        module = build(config, env)
        found = train_steps(module, 0, 2)
        before = {k: _local(t).clone() for k, t in module.state_tensors().items()}
        forward = module.engine.module.forward

        def poisoned(*args: Any, **kwargs: Any) -> Any:
            sums = forward(*args, **kwargs)
            return sums._replace(loss=sums.loss * float("nan"))

        module.engine.module.forward = poisoned
        found += train_steps(module, 2, 3)
        module.engine.module.forward = forward
        after = {k: _local(t) for k, t in module.state_tensors().items()}
        is_same = all(torch.equal(before[k], after[k]) for k in before)
        return found + train_steps(module, 3, 5), is_same
    finally:
        env.close()


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_an_optimizer_that_declares_nothing_is_clipped_and_skipped_by_the_engine(
    workers: WorkerPool, engine: str, ranks: int
) -> None:
    expected, _ = workers.run(ranks, history, engine, None)[0]
    found, is_same = workers.run(ranks, history, engine, "Loop")[0]
    assert is_same
    assert [step["skipped"] for step in found] == [0.0, 0.0, 1.0, 0.0, 0.0]
    for got, want in zip(found, expected, strict=True):
        if not want["skipped"]:
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)
            assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)


def state_at_start() -> dict[str, Any]:
    """What an optimizer that keeps a copy of the weights has before the first step."""
    config = module_config("single", optim=LoopConfig(lr=1e-3))
    env = open_environment(config)
    try:
        tensors = build(config, env).state_tensors()
        name = "blocks.0.attention.query.weight"
        return {
            "start": torch.equal(tensors[f"optim.{name}.start"], tensors[f"model.{name}"]),
            "step": tensors[f"optim.{name}.step"].item(),
            "m": tensors[f"optim.{name}.m"].abs().max().item(),
        }
    finally:
        env.close()


def test_the_state_before_the_first_step_is_the_optimizer_s_own(workers: WorkerPool) -> None:
    assert workers.run(1, state_at_start) == [{"start": True, "step": 0.0, "m": 0.0}]


def refusal(engine: str, kind: str) -> str:
    config = module_config(engine, optim=LoopConfig(lr=1e-3, kind=kind))
    env = open_environment(config)
    try:
        build(config, env)
    except ConfigError as error:
        return str(error)
    finally:
        env.close()
    return ""


def test_what_an_engine_cannot_do_for_an_optimizer_is_refused(workers: WorkerPool) -> None:
    assert workers.run(1, refusal, "single", "Counting") == [
        "train_module.optim: Counting keeps 'count' as int; make it a tensor, so that checkpoints "
        "hold it"
    ]
    assert workers.run(2, refusal, "ddp", "Whole") == ["", ""]
    for engine in ("fsdp", "zero2"):
        (message, _) = workers.run(2, refusal, engine, "Whole")
        assert message == (
            f"train_module.optim: Whole needs whole matrices, and {engine} cuts them over ranks; "
            "use ddp, or another optimizer"
        )
