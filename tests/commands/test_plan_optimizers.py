"""`toolkit plan` knows what each optimizer keeps, and refuses those that a layout cannot run."""

import json
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tests.tiny import module_config, tiny_model
from toolkit.cli import main as cli
from toolkit.commands.plan.devices import find_device
from toolkit.commands.plan.job import Job, ModelParts, state_tensors_of, type_of
from toolkit.commands.plan.pieces import states
from toolkit.config import convert
from toolkit.distributed.layout import Layout
from toolkit.models.layer_configs import MoEConfig
from toolkit.models.parameters import trained_parameters
from toolkit.optim.config import OptimConfig


def nbytes(value: torch.Tensor) -> int:
    if is_traceable_wrapper_subclass(value):
        return sum(getattr(value, name).nbytes for name in value.__tensor_flatten__()[0])
    return value.nbytes


@pytest.mark.parametrize(
    "kind",
    [
        *("adam", "sgd", "lion", "skip_step_lion", "adafactor", "adamw_8bit"),
        *("schedule_free_adamw", "muon", "normuon"),
    ],
)
def test_the_state_has_the_bytes_of_the_plan(kind: str) -> None:
    optim = convert({"type": kind}, OptimConfig)
    moe = MoEConfig(num_experts=4, top_k=2, intermediate_size=32, dense_layers=(0,))
    model = tiny_model(d_model=64, moe=moe)
    with mock.patch.object(torch, "compile", lambda function, **_: function):
        module = module_config(optim=optim).build(model.build(init_device="meta"))
    found = sum(nbytes(t) for own in module.engine.optimizer.state.values() for t in own.values())
    found += sum(nbytes(t) for t in module.engine._kept_of_rows().values())
    job = Job(
        model=model, parts=ModelParts(model, trained_parameters(model), 16, optim), layout=Layout(),
        sequence_length=16, rows=1, passes=1, precision="fp32", ac_config=None, is_compiled=False,
        state_tensors=state_tensors_of(optim), device=find_device("cpu", 1), machine=1,
        optimizer=type_of(optim),
    )  # fmt: skip
    # The four numbers of schedule_free_adamw are one tensor each for all parameters of a group.
    assert states(job, job.stages[0]).optimizer == pytest.approx(found, rel=1e-3, abs=0)


def test_a_plan_shows_it_and_refuses_what_cannot_run(capsys: pytest.CaptureFixture[str]) -> None:
    def plan(kind: str, *flags: str) -> int:
        optim = f"--train_module.optim.type={kind}"
        return cli.run(["plan", "llama_271M", "--world-size", "2", optim, "--json", *flags])

    found = {}
    for kind in ("adamw", "lion", "adafactor"):
        assert plan(kind) == 0
        found[kind] = json.loads(capsys.readouterr().out)["memory"]["optimizer"]
    assert found["lion"] == pytest.approx(found["adamw"] / 2, rel=1e-3)
    assert found["adafactor"] < found["adamw"] / 100
    assert plan("adafactor", "--train_module.dp_config.name=fsdp") == 2
    assert "adafactor needs whole parameters, and fsdp cuts them" in capsys.readouterr().err
