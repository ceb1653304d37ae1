"""A training step waits for no device and mixes none: shown on meta tensors, which have no values.

On them every `.item()`, `nonzero` or copy to the host fails by itself. What would work on a GPU but
wait for it, or run on the CPU unseen, fails here by the mode below.
"""

import contextlib
import importlib
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.tiny import module_config, tiny_model
from toolkit.distributed import materialize, torch_engine
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.distributed.layout import Layout
from toolkit.models import grouped
from toolkit.models.layer_configs import MoEConfig
from toolkit.models.lora_config import LoRAConfig
from toolkit.optim.config import (
    AdamWConfig,
    LionConfig,
    MuonConfig,
    NorMuonConfig,
    ScheduleFreeAdamWConfig,
)
from toolkit.train.callbacks.averages import Average
from toolkit.train.module import Progress
from toolkit.train.transformer import TransformerTrainModule

META = torch.device("meta")
SEQ = 16


class OneDevice(TorchDispatchMode):
    """Fails where an operator reads tensors of one device and gives one of another."""

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = operator(*args, **(kwargs or {}))
        taken, given = (self._devices(values) for values in ((args, kwargs), out))
        if len(taken | given) > 1:
            where = [frame for frame in traceback.extract_stack() if "/toolkit/" in frame.filename]
            place = f"{where[-1].filename}:{where[-1].lineno}" if where else "?"
            raise AssertionError(f"{operator} takes {taken} and gives {given}: {place}")
        return out

    def _devices(self, values: Any) -> set[str]:
        tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
        # A number that a kernel takes as an argument is no transfer.
        return {t.device.type for t in tensors if t.dim() or t.device.type != "cpu"}


class _AsIs:
    def prepare(self, *things: Any) -> Any:
        return things


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A train module whose parameters have no values."""
    monkeypatch.setattr(torch_engine, "build_accelerator", lambda *_: _AsIs())
    monkeypatch.setattr(materialize, "draw_initial_values", lambda *_: None)
    # What torch does not know of the meta device.
    adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_, **__: None)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    environment = TrainingEnvironment(
        rank=0,
        local_rank=0,
        device=META,
        layout=Layout(precision="fp32"),
        seed=0,
    )

    def make(model: dict[str, Any], **config: Any) -> TransformerTrainModule:
        settings = module_config(rank_microbatch_size=2 * SEQ, max_grad_norm=1.0, **config)
        return settings.build(
            tiny_model(**model).build(init_device="meta"), environment=environment
        )

    return make


def batch(*, masked: bool = False, documents: bool = False) -> dict[str, torch.Tensor]:
    found = {"input_ids": torch.zeros(4, SEQ, dtype=torch.int64, device=META)}
    if masked:
        found["label_mask"] = torch.ones(4, SEQ, dtype=torch.bool, device=META)
    if documents:
        found["document_ids"] = torch.zeros(4, SEQ, dtype=torch.int32, device=META)
    return found


def step(module: TransformerTrainModule, given: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the trainer does in a step, and in one that is looked at more closely."""
    with OneDevice():
        metrics = module.train_batch(given)
        norms = module.network_norms()
        metrics |= module.optim_step(Progress(1, 1, 100, 100, 1))
        with module.evaluating():
            sums = module.eval_batch(given)
    values = [metric.value for metric in metrics.values()] + list(norms.values()) + list(sums)
    assert {value.device.type for value in values if isinstance(value, torch.Tensor)} == {"meta"}
    return metrics


@pytest.mark.parametrize(
    ("model", "data", "config"),
    [
        ({}, {}, {}),
        ({}, {"masked": True}, {"z_loss_multiplier": 1e-4}),
        ({}, {"documents": True, "masked": True}, {}),
        ({"sliding_window": 8}, {"documents": True}, {}),
        ({}, {}, {"optim": AdamWConfig(lr=0.1), "freeze": ["embeddings.*"]}),
        ({}, {}, {"optim": LionConfig()}),
        ({}, {}, {"optim": ScheduleFreeAdamWConfig(weight_decay=0.1)}),
        ({}, {}, {"optim": MuonConfig()}),
        ({}, {}, {"optim": NorMuonConfig()}),
        ({}, {}, {"lora": LoRAConfig(rank=4, quantize_base="nf4")}),
        ({}, {}, {"lora": LoRAConfig(rank=4, quantize_base="int8")}),
    ],
    ids=[
        *("plain", "masked", "documents", "windows", "frozen"),
        *("lion", "schedule_free", "muon", "normuon", "nf4", "int8"),
    ],
)
def test_a_step_reads_nothing_back(on_meta: Any, model: dict, data: dict, config: dict) -> None:
    module = on_meta(model, **config)
    for _ in range(2):
        metrics = step(module, batch(**data))
    assert {"loss", "grad_norm", "skipped"} <= set(metrics)


def test_averages_read_nothing_back(on_meta: Any) -> None:
    module = on_meta({})
    average = Average(module)
    with OneDevice():
        average.copy()
        average.update(0.1)
        with average.held():
            module.eval_batch(batch())
    assert len(average.tensors) == len(module.trained_names)


def test_a_step_of_experts_reads_nothing_back(
    on_meta: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouped, "grouped_backend", lambda *_: "grouped_mm")
    monkeypatch.setattr(grouped.kernels, "leaves_empty_groups_undefined", lambda _: True)
    monkeypatch.setattr(grouped, "grouped_mm", _grouped_mm)
    experts = MoEConfig(
        num_experts=4,
        top_k=2,
        intermediate_size=16,
        score_function="sigmoid",
        num_groups=2,
        bias_update_rate=0.01,
    )
    module = on_meta({"moe": experts, "num_mtp_layers": 1})
    metrics = step(module, batch(masked=True, documents=True))
    assert {"expert_load_max", "mtp_loss"} <= metrics.keys()


def _grouped_mm(x: torch.Tensor, weight: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    """Of the shape of torch's, which takes no meta tensors in fp32; reads `offs` like it."""
    assert offs.device == x.device
    return (x[:, None] @ weight[0] + 0 * weight.sum()).squeeze(1)


@contextlib.contextmanager
def _caught() -> Iterator[list[str]]:
    found: list[str] = []
    try:
        with OneDevice():
            yield found
    except Exception as error:
        found.append(type(error).__name__)


def test_the_check_finds_what_it_is_for() -> None:
    x = torch.ones(3, device=META)
    for wait in (
        lambda: x.sum().item(),
        lambda: x.nonzero(),
        lambda: x.cpu(),
        lambda: torch.ones(3).to(META),
        lambda: bool((x > 0).all()),
        lambda: torch.add(x, torch.ones(3)),
        lambda: x[torch.zeros(1, dtype=torch.int64)],
    ):
        with _caught() as found:
            wait()
        assert found, wait
    with _caught() as found:
        x * torch.tensor(2.0)
    assert not found
