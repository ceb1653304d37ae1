"""What engines do for optimizers that do not do it in their kernel, and what they refuse."""

from typing import Any

import pytest
import torch

from tests.tiny import build, module_config, open_environment, train_steps
from tests.workers import WorkerPool
from toolkit.errors import ConfigError
from toolkit.optim.config import AdamWConfig, ClassOptimConfig
from toolkit.optim.curves import ConstantConfig
from toolkit.train.timeline import Progress


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


BY_CLASS = {
    "NAdam": {},
    "ASGD": {"lambd": 0.01},
    "Rprop": {},
    "Adagrad": {"initial_accumulator_value": 0.1},
    "SGD": {"momentum": 0.9, "dampening": 0.5},
}


def beside_torch(engine: str) -> dict[str, list[dict[str, float]]]:
    """Steps of torch's optimizers, of which the first is not taken. Asserts, where ranks can step
    their parts alone, that these are those of the same class without us."""
    found = {}
    env = open_environment(module_config(engine))
    try:
        for name, options in BY_CLASS.items():
            optim = ClassOptimConfig(target=f"torch.optim:{name}", lr=1e-2, options=options)
            warm = ConstantConfig(warmup=3)
            config = module_config(engine, optim=optim, scheduler=warm, max_grad_norm=None)
            module = build(config, env)
            module.state_tensors()  # as averages of weights ask, before the first step
            plain = {n: torch.nn.Parameter(t.clone()) for n, t in weights_of(module).items()}
            theirs = getattr(torch.optim, name)(plain.values(), lr=1e-2, **options)
            change = module.engine.step

            def step(*args: Any, module: Any = module, plain: Any = plain, change: Any = change):
                if module.progress.step == 0:
                    module.engine.scale_gradients(torch.tensor(float("nan")))
                for n, gradient in module.engine.gradient_shards().items():
                    plain[n].grad = gradient.clone()
                return change(*args)

            is_alone = not engine.startswith("zero")
            if is_alone:
                module.engine.step = step
            found[name] = []
            for number in range(4):
                module.progress = Progress(number, 0, 100, 0, 1)
                found[name] += train_steps(module, number, number + 1)
                theirs.param_groups[0]["lr"] = 1e-2 * min(1, (number + 1) / 3)
                if is_alone and number:
                    theirs.step()
                    for n, t in weights_of(module).items():
                        assert torch.equal(t, plain[n]), (name, n, number)
        return found
    finally:
        env.close()


def weights_of(module: Any) -> dict[str, torch.Tensor]:
    return module.engine.weight_shards()


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("fsdp", 2)])
def test_state_begins_as_the_optimizer_itself_begins_it(
    workers: WorkerPool, engine: str, ranks: int
) -> None:
    for found in workers.run(ranks, beside_torch, engine):
        for history in found.values():
            assert [record["skipped"] for record in history] == [1.0, 0.0, 0.0, 0.0]
