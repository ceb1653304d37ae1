"""What the running engines were told: nothing that numbers depend on is left to a library's
defaults, which change."""

import datetime
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.tiny import build, module_config, open_environment, train_steps
from tests.workers import WorkerPool
from toolkit.distributed.process_groups import COLLECTIVE_TIMEOUT

CLIP = 0.7


def timeouts() -> list[float]:
    """Seconds of each process group of this process, the smallest first."""
    groups = dist.distributed_c10d._world.pg_map
    cpu = torch.device("cpu")
    return sorted({g._get_backend(cpu).options._timeout.total_seconds() for g in groups})


def running(engine: str, dp: dict[str, Any], read: str) -> dict[str, Any]:
    c10d: Any = dist.distributed_c10d
    before, c10d.default_pg_timeout = c10d.default_pg_timeout, datetime.timedelta(seconds=77)
    config = module_config(engine, max_grad_norm=CLIP, dp=dp)
    env = open_environment(config)
    try:
        module = build(config, env)
        found = globals()[read](module.engine) | {"timeouts": timeouts()}
        train_steps(module, 0, 1)
        return found | {"timeouts after a step": timeouts()}
    finally:
        c10d.default_pg_timeout = before
        env.close()


def ddp_values(runtime: Any) -> dict[str, Any]:
    model = runtime.model
    return {
        "bucket_cap_mb": model.bucket_bytes_cap / 2**20,
        "forward_sync_buffers": model.forward_sync_buffers,
        "find_unused_parameters": model.find_unused_parameters,
        "gradient_as_bucket_view": model.gradient_as_bucket_view,
        "static_graph": model.static_graph,
        "mixed_precision": model.mixed_precision,
        "hooks": len(model._comm_hooks),
        "require_backward_grad_sync": model.require_backward_grad_sync,
    }


def fsdp_values(runtime: Any) -> dict[str, Any]:
    module = runtime.module
    found: dict[str, set] = {}
    for part in (module, *module.blocks):
        (group,) = part._get_fsdp_state()._fsdp_param_groups
        own = {
            "param_dtype": group.mp_policy.param_dtype,
            "reduce_dtype": group.mp_policy.reduce_dtype,
            "output_dtype": group.mp_policy.output_dtype,
            "cast_forward_inputs": group.mp_policy.cast_forward_inputs,
            "reduce_grads": group.reduce_grads,
            "all_reduce_grads": group.all_reduce_grads,
            "reshard_after_backward": group.reshard_after_backward,
            "divide_factor": group.gradient_divide_factor,
            "force_sum": group.force_sum_reduction_for_comms,
        }
        for name, value in own.items():
            found.setdefault(name, set()).add(value)
    return {name: values.pop() if len(values) == 1 else values for name, values in found.items()}


def zero_values(runtime: Any) -> dict[str, Any]:
    engine, zero = runtime._engine, runtime._zero
    return {
        "clip": (engine.gradient_clipping(), zero.clip_grad),
        "accumulation": engine.gradient_accumulation_steps(),
        "predivide": (engine.gradient_predivide_factor(), zero.gradient_predivide_factor),
        "postscale": (engine.postscale_gradients(), zero.postscale_gradients),
        "reduce_op": engine._config.gradient_allreduce_op,
        "communication": (engine.communication_data_type, zero.communication_data_type),
        "accumulate_in": engine.get_data_types(),
        "loss_scale": (zero.loss_scale, zero.dynamic_loss_scale),
        "half": (engine.fp16_enabled(), engine.bfloat16_enabled()),
        "autocast": engine.torch_autocast_enabled(),
        "norm": engine.zero_compute_grad_norm(),
        "reduce_scatter": (engine.zero_reduce_scatter(), zero.reduce_scatter),
        "overlap_comm": engine.zero_overlap_comm(),
        "contiguous": (engine.zero_contiguous_gradients(), zero.contiguous_gradients),
        "quantized": (engine.zero_quantized_weights(), engine.zero_quantized_gradients()),
        "round_robin": engine.zero_round_robin_gradients(),
        "groups": engine.zero_hpz_partition_size(),
    }


LONG = [COLLECTIVE_TIMEOUT.total_seconds()]


def test_ddp(workers: WorkerPool) -> None:
    for found in workers.run(2, running, "ddp", {}, "ddp_values"):
        assert found == {
            "bucket_cap_mb": 25,
            "forward_sync_buffers": False,
            "find_unused_parameters": False,
            "gradient_as_bucket_view": True,
            "static_graph": False,
            "mixed_precision": None,
            "hooks": 0,
            "require_backward_grad_sync": True,
            "timeouts": LONG,
            "timeouts after a step": LONG,
        }


@pytest.mark.parametrize(
    ("engine", "ranks", "dp", "reduce_dtype"),
    [
        ("fsdp", 2, {}, torch.float32),
        ("fsdp", 2, {"reduce_dtype": "bfloat16"}, torch.bfloat16),
        ("hsdp", 4, {"num_replicas": 2}, torch.float32),
    ],
)
def test_fsdp(
    workers: WorkerPool, engine: str, ranks: int, dp: dict, reduce_dtype: torch.dtype
) -> None:
    for found in workers.run(ranks, running, engine, dp, "fsdp_values"):
        assert found == {
            "param_dtype": None,
            "reduce_dtype": reduce_dtype,
            "output_dtype": None,
            "cast_forward_inputs": False,
            "reduce_grads": True,
            "all_reduce_grads": True,
            "reshard_after_backward": True,
            "divide_factor": None,  # the mean over all ranks
            "force_sum": False,
            "timeouts": LONG,
            "timeouts after a step": LONG,
        }


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3"])
def test_zero(workers: WorkerPool, engine: str) -> None:
    for found in workers.run(2, running, engine, {}, "zero_values"):
        fp32 = torch.float32
        assert found == {
            "clip": (CLIP, CLIP),
            "accumulation": 1,
            "predivide": (1.0, 1.0),
            "postscale": (True, True),
            "reduce_op": "mean",
            "communication": (fp32, fp32),
            "accumulate_in": (fp32, fp32),
            "loss_scale": (1.0, False),
            "half": (False, False),
            "autocast": False,
            "norm": True,
            "reduce_scatter": (True, True),
            "overlap_comm": True,
            "contiguous": (True, True),
            "quantized": (False, False),
            "round_robin": False,
            "groups": 1,
            "timeouts": LONG,
            "timeouts after a step": LONG,
        }
