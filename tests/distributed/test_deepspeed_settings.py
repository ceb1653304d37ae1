"""The JSON that DeepSpeed is given: the user's, between our defaults and what we own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.distributed.accelerator import deepspeed_settings
from toolkit.distributed.config import DataParallelConfig
from toolkit.distributed.environment import TrainingEnvironment
from toolkit.distributed.layout import resolve_layout

ROOT = Path(__file__).parents[2]


def settings(device: str, name: Any = "zero3", **dp: Any) -> dict[str, Any]:
    layout = resolve_layout("bf16", DataParallelConfig(name=name, **dp), {"WORLD_SIZE": "2"})
    environment = TrainingEnvironment(
        rank=0,
        local_rank=0,
        device=torch.device(device),
        layout=layout,
        seed=0,
    )
    return deepspeed_settings(environment, 1.0)


@pytest.mark.parametrize(("device", "is_pinned"), [("cuda", True), ("cpu", False)])
@pytest.mark.parametrize("source", ["shipped", "cpu_offload"])
def test_offloaded_state_is_pinned_where_a_gpu_copies_it(
    device: str, is_pinned: bool, source: str
) -> None:
    shipped = json.loads((ROOT / "ds_configs/zero3_offload.json").read_text())
    asked = {"deepspeed_config": shipped} if source == "shipped" else {"cpu_offload": True}
    zero = settings(device, **asked)["zero_optimization"]
    for part in ("offload_optimizer", "offload_param"):
        assert zero[part] == {"device": "cpu", "pin_memory": is_pinned}


def test_who_says_otherwise_is_heard() -> None:
    asked = {
        "zero_optimization": {
            "offload_optimizer": {"device": "cpu", "pin_memory": False, "ratio": 0.5},
            "overlap_comm": False,
            "reduce_bucket_size": "auto",
        },
        "communication_data_type": "bf16",
        "bf16": {"enabled": "auto"},
        "wall_clock_breakdown": True,
    }
    got = settings("cuda", deepspeed_config=asked)
    zero = got["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False, "ratio": 0.5}
    assert zero["overlap_comm"] is False
    assert "reduce_bucket_size" not in zero
    assert got["communication_data_type"] == "bf16"
    assert got["wall_clock_breakdown"] is True
    assert got["bf16"] == got["fp16"] == {"enabled": False}
    assert got["torch_autocast"]["enabled"] is True


@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda f: f.stem)
def test_shipped_files_ask_for_what_a_config_asks_for(file: Path) -> None:
    shipped = json.loads(file.read_text())
    name, _, offload = file.stem.partition("_")
    assert settings("cuda", name, deepspeed_config=shipped) == settings(
        "cuda", name, cpu_offload=bool(offload)
    )


def test_what_we_own_is_not_inherited() -> None:
    got = settings("cpu", "zero2")
    owned = {
        "gradient_clipping": 1.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "gradient_allreduce_op": "mean",
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "managed_gradient_accumulation": True,
    }
    assert {key: got[key] for key in owned} == owned
    assert got["zero_optimization"]["compute_grad_norm"] is True
